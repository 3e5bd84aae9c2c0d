"""A whole evaluation of the bundled model on very few samples."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel

from components.evaluation.suite.data import Clip, Dataset, open_dataset, read_clip
from components.evaluation.suite.features import load_features
from components.evaluation.suite.run import Choice, choose_tasks, evaluate
from univigu.errors import BadInputError, ConfigError, MissingInputError
from univigu.evaluation.likelihood import BINS

from .conftest import HELDOUT


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """A random VideoMAE in transformers' layout."""
    folder = tmp_path_factory.mktemp("features")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VideoMAEModel(VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, **sizes)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def report(bundled, network, clip_folder):
    choice = Choice(count=2, features=network, clip=clip_folder)
    return evaluate(bundled, open_dataset(HELDOUT), choice)


def test_every_figure_has_its_interval_and_its_number_of_samples(report):
    assert list(report["scores"]) == ["caption", "generate", "joint"]
    for scores in report["scores"].values():
        for score in scores.values():
            assert list(score) == ["value", "low", "high", "n"]
            assert score["low"] <= score["high"]
            assert score["n"] == 2
    json.dumps(report)
    assert not report["failed"]
    assert [sample["task"] for sample in report["samples"]] == ["caption"] * 2 + ["generate"] * 2 + ["joint"] * 2


def test_a_trained_model_scores_high_and_its_video_helps(report):
    caption, generate, joint = (report["scores"][task] for task in ("caption", "generate", "joint"))
    assert caption["facts"]["value"] > 0.7
    assert sum(caption[name]["value"] for name in ("facts", "hallucination", "omission")) == pytest.approx(1, abs=1e-5)
    assert caption["video_gain"]["value"] == pytest.approx(
        caption["token_accuracy"]["value"] - caption["token_accuracy_without_video"]["value"], abs=1e-5
    )
    assert sum(name.startswith("token_accuracy.tau_") for name in caption) == BINS
    assert generate["facts"]["value"] > 0.7
    assert joint["cycle"]["value"] > 0.7
    assert generate["fvd"]["value"] >= 0


def test_what_needs_a_network_is_left_out_with_why_where_none_is_named(report):
    assert report["scores"]["generate"]["r_precision"]["n"] == 2  # it has one
    assert list(report["left_out"]) == ["caption"]
    assert "no --embedder was given" in report["left_out"]["caption"]["similarity"]


def test_a_clip_that_can_not_be_read_counts_as_wrong_in_every_figure(bundled, folder):
    whole = open_dataset(folder)
    (folder / "clip-1.mp4").write_bytes(b"This is no video." * 100)
    found = evaluate(bundled, whole, Choice(["caption"]))
    assert [row["id"] for row in found["failed"]] == ["clip-1.mp4"]
    scores = found["scores"]["caption"]
    assert {score["n"] for score in scores.values()} == {3}
    assert scores["empty"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert max(scores[name]["value"] for name in ("rouge_l", "token_accuracy", "retrieval.text_of_clip")) < 0.667
    assert "facts" not in scores
    (folder / "no.mp4").write_bytes(b"")
    lost = [Clip(str(n), ("a red seven",), partial(read_clip, folder / "no.mp4")) for n in range(2)]
    with pytest.raises(BadInputError, match="All 2 samples of the task 'caption' failed"):
        evaluate(bundled, Dataset("", "", tuple(lost)), Choice())


def test_tasks_without_samples_are_refused(folder):
    dataset = open_dataset(folder)
    assert choose_tasks(dataset, []) == ["caption", "generate", "joint"]
    with pytest.raises(BadInputError, match="1 samples for the task 'caption'"):
        choose_tasks(replace(dataset, clips=dataset.clips[:1]), ["caption"])
    with pytest.raises(BadInputError, match="nothing to evaluate on"):
        choose_tasks(Dataset("none", ""), [])
    with pytest.raises(ConfigError, match="no task 'dance'"):
        choose_tasks(dataset, ["dance"])


def test_a_folder_without_a_video_network_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="no video network"):
        load_features(tmp_path)
