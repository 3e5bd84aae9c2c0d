"""The evaluation: a perfect model scores one, a blind one the majority, and the same model always scores the same."""

import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from components.digits import benchmark, world
from components.evaluation import evaluate_model as evaluation
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import run_stage
from components.pipeline.stages import find_stage
from components.pipeline.tables import write_table
from univigu.confidence_reference import read_reference
from univigu.errors import ConfigError
from univigu.evaluation.claims import summarise

HELDOUT = Path(__file__).parents[3] / "data" / "heldout.json"
GROUPS = {"captions", "captions_without_video", "majority", "generation", "generation_base", "recogniser", "joint"}
TAU = [0.25, 0.75]


def commit(root, name, rejected=()):
    """Commit a stage's folder, with the files that are already in it, as its finished output."""
    home = root / find_stage(name).home
    home.mkdir(parents=True, exist_ok=True)
    write_table(home, "rejected", rejected)
    files = describe_files(home)
    reasons = dict.fromkeys((row["reason"] for row in rejected), 1)
    counts = {"rows_in": 9, "rows_out": 9 - len(rejected), "quarantined": len(rejected), "reasons": reasons}
    write_manifest(home, {"step": name, "digest": files_digest(files), "files": files, **counts})


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_wan_folder):
    """A work root with an untrained model, and earlier steps' records."""
    from univigu import UniViGUPipeline

    root = tmp_path_factory.mktemp("evaluation")
    shutil.copytree(tiny_wan_folder, root / "model/tiny-wan")
    (root / "data").mkdir()
    shutil.copy(HELDOUT, root / "data/heldout.json")
    settings = {"num_frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE, "max_sequence_length": 32}
    pipeline = UniViGUPipeline.from_wan(tiny_wan_folder, text_length=64, text_latent_dim=16, **settings)
    pipeline.save_pretrained(root / "data/stage2/model")
    scores = {"step": 2, "tau": TAU, "video_mse": [1.0, 0.5], "text_ce": [3.0, 1.0], "video_gain": 0.125}
    accuracy = {"token_accuracy": [0.25, 0.75], "token_accuracy_without_video": [0.125, 0.625]}
    for stage in ("stage1", "stage2"):
        (root / "data" / stage).mkdir(exist_ok=True)
        (root / "data" / stage / "curves.csv").write_text("step,video_mse,text_ce\n1,2.0,\n2,1.0,3.0\n")
        (root / "data" / stage / "heldout.json").write_text(json.dumps(scores | accuracy))
    rejected = [{"id": "1", "reason": "script", "detail": "markup", "row": '{"text": "<script>alert(1)</script>"}'}]
    commit(root, "curate-prompts", rejected)
    for name in ("validate-prompts", "synthesize-videos", "validate-clips", "caption-videos", "validate-pairs"):
        commit(root, name)
    commit(root, "train-stage-1")
    commit(root, "train-stage-2")
    return root


@pytest.fixture(scope="module")
def profile():
    profile = load_profile("smoke")
    profile["evaluate_model"].update(captions=3, generations=2, joint=3, batch_size=2)
    return profile


@pytest.fixture(scope="module")
def reports(root, profile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a server that is down
        run_stage("evaluate-model", profile, root)
    return root / "reports"


@pytest.mark.slow
def test_an_evaluation_does_not_need_mlflow(reports):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 9))
    assert (reports / "scores.json").is_file()


@pytest.mark.slow
def test_metrics_are_the_scores_of_the_items(reports):
    metrics = json.loads((reports / "scores.json").read_text())
    items = pd.read_parquet(reports / "items.parquet")
    assert metrics.keys() >= GROUPS
    assert items.groupby("task").size().to_dict() == {
        **dict.fromkeys(("captions", "captions_without_video", "majority", "recogniser", "joint", "joint_shuffled"), 3),
        **dict.fromkeys(("captions_in_1_steps", "captions_in_2_steps"), 3),
        **dict.fromkeys(("generation", "generation_base"), 2),
        **dict.fromkeys(("joint_video", "joint_text"), 3),
    }
    assert metrics["caption_steps"].keys() == {"1", "2"}
    for task in GROUPS:
        correct = [json.loads(text) for text in items[items["task"] == task]["correct"]]
        expected = summarise(correct, seed=0)
        if task == "joint":
            expected["agreement"] = expected.pop("mean")
            expected["agreement_shuffled"] = metrics["joint"]["agreement_shuffled"]
        assert metrics[task] == expected


def test_joint_items_are_scored_on_what_their_prompt_leaves_open(reports):
    items = pd.read_parquet(reports / "items.parquet")
    for row in items[items["task"] == "joint"].to_dict("records"):
        assert list(row["open_attributes"]) == benchmark.left_open(row["prompt"])
        assert json.loads(row["correct"]).keys() == json.loads(row["found"]).keys() == set(row["open_attributes"])


def test_joint_videos_and_texts_are_compared_with_what_their_prompt_states(reports):
    items = pd.read_parquet(reports / "items.parquet")
    for task in ("joint_video", "joint_text"):
        for row in items[items["task"] == task].to_dict("records"):
            assert json.loads(row["truth"]) == benchmark.asked(row["prompt"]) != {}
            assert not set(json.loads(row["truth"])) & set(benchmark.left_open(row["prompt"]))


def test_the_figures_of_training_are_in_metrics_plots_and_page(reports):
    metrics = json.loads((reports / "scores.json").read_text())
    assert metrics["stage1"]["video_gain"] == 0.125
    assert metrics["stage2"]["heldout_video_mse"] == 0.75
    assert (reports / "plots/stage1_curves.csv").read_text().splitlines()[0] == "step,video_mse,text_ce"
    assert len((reports / "plots/stage2_heldout.csv").read_text().splitlines()) == 1 + len(TAU)
    page = (reports / "report.html").read_text()
    assert "Stage 1: +12.5 points" in page


def test_the_funnel_of_the_data_is_a_table_with_the_reasons_of_each_step(reports):
    rows = pd.read_csv(reports / "plots/funnel.csv").fillna("").to_dict("records")
    assert [row["name"] for row in rows] == [
        *("curate-prompts", "validate-prompts", "synthesize-videos", "validate-clips"),
        *("caption-videos", "validate-pairs"),
    ]
    assert rows[0] == {"name": "curate-prompts", "rows_in": 9, "rows_out": 8, "quarantined": 1, "reasons": "script 1"}


def test_the_page_is_small_complete_and_safe(reports):
    page = (reports / "report.html").read_text()
    assert len(page) < 8_000_000
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", page) == []
    items = pd.read_parquet(reports / "items.parquet")
    wrong = [text for text in items[items["task"] == "captions"]["correct"] if "false" in text]
    assert page.count("<article") == 3 + 2 + 3 + len(wrong)
    assert "Confusions of the digit" in page
    assert (reports / "plots/confusion.csv").read_text().splitlines()[0] == "true,stated"


def test_what_dvc_shows_are_the_six_scores_that_tell_models_apart(reports):
    scores, shown = (json.loads((reports / name).read_text()) for name in ("scores.json", "metrics.json"))
    assert shown == {
        "captions": round(scores["captions"]["mean"]["value"], 3),
        "digit": round(scores["captions"]["digit"]["value"], 3),
        "blind": round(scores["captions_without_video"]["mean"]["value"], 3),
        "videos": round(scores["generation"]["mean"]["value"], 3),
        "joint": round(scores["joint"]["agreement"]["value"], 3),
        "gain": round(scores["stage2"]["video_gain"], 3),
    }


def test_an_evaluation_measures_held_out_clips_for_those_who_caption_their_own(reports):
    reference = read_reference(reports)
    assert reference.clips == 3
    assert reference.least.keys() == {"confidence", "fidelity"}
    assert 0 < reference.least["confidence"] <= reference.median["confidence"] < 1
    assert 0 < reference.least["fidelity"] <= reference.median["fidelity"] < 99


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(root, reports, profile):
    before = json.loads((reports / "manifest.json").read_text())
    run_stage("evaluate-model", profile, root)
    assert json.loads((reports / "manifest.json").read_text()) == before


def test_a_perfect_model_scores_one_and_a_blind_one_the_majority():
    heldout = benchmark.load_heldout(HELDOUT)
    chosen = {kind: heldout[kind][:64] for kind in evaluation.KINDS}
    rng = np.random.default_rng(0)
    truths = [benchmark.truth(item) for item in chosen["captions"]]
    asked = [benchmark.asked(item["prompt"]) for item in chosen["generations"]]
    scans = world.draw_scans(asked, world.heldout_scans(), seed=1)
    rendered = benchmark.render(chosen["captions"])
    drawn = world.render(asked, scans, seed=2)
    made = {
        "captions": {
            "seen": benchmark.recognise(rendered),
            "texts": [world.write_caption(truth, rng) for truth in truths],
            "texts_without_video": [world.write_caption(truths[0], rng)] * 64,
            "texts_in_2_steps": [""] * 64,
            "texts_in_8_steps": [world.write_caption(truth, rng) for truth in truths],
        },
        "generation": {"seen": benchmark.recognise(drawn)},
        "generation_base": {"seen": benchmark.recognise(np.roll(drawn, 1, axis=0))},
        "joint": {
            "seen": benchmark.recognise(rendered),
            "texts": [world.write_caption(truth, rng) for truth in truths],
        },
    }
    metrics = evaluation.summarise_rows(evaluation.score_everything(benchmark, chosen, made), seed=0)
    assert metrics["captions"]["mean"]["value"] == 1.0
    assert {steps: score["value"] for steps, score in metrics["caption_steps"].items()} == {"2": 0.0, "8": 1.0}
    assert metrics["recogniser"]["mean"]["value"] > 0.9
    assert metrics["generation"]["mean"]["value"] > 0.9
    assert metrics["joint"]["agreement"]["value"] > 0.9
    for name in benchmark.ATTRIBUTES:
        assert metrics["captions_without_video"][name]["value"] <= metrics["majority"][name]["value"] < 0.7
    assert metrics["generation_base"]["mean"]["value"] < 0.5
    assert metrics["joint"]["agreement_shuffled"]["value"] < 0.5


def test_a_joint_caption_that_states_nothing_or_everything_does_not_agree():
    item = {"id": "joint-0", "prompt": "a red seven", "seed": 0}
    video = world.sample_attributes(np.random.default_rng(0), digit="two", background="grey")
    for text in ("", "on a black, grey, white and brown background"):
        row = evaluation.make_joint_row("joint", benchmark, item, video, text)
        assert json.loads(row["correct"])["background"] is False
        assert "digit" not in json.loads(row["correct"])
    agreeing = evaluation.make_joint_row("joint", benchmark, item, video, "a two over grey")
    assert json.loads(agreeing["correct"])["background"] is True


def test_an_unknown_benchmark_and_too_many_items_are_rejected():
    with pytest.raises(ConfigError, match="choose one of digits, pairs"):
        evaluation.load_benchmark("sprites")
    with pytest.raises(ConfigError, match="asks for 3 held-out items"):
        benchmark.first_items({"joint": [{}, {}]}, "joint", 3)
