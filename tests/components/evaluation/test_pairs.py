"""The benchmark `pairs`: captions against references, generations against prompts, and the whole step once."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from components.evaluation import pairs as benchmark
from components.evaluation.evaluate_model import score_everything, summarise_rows
from components.evaluation.samples import load_scorers
from components.evaluation.scorers import clip as clip_scorer
from components.pipeline.manifests import write_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import run_stage
from univigu.errors import BadInputError, ConfigError, CorruptDataError, MissingInputError
from univigu.evaluation.claims import summarise

REFERENCES = [
    "Two brown dogs run along a sandy beach while the camera follows.",
    "A red car turns slowly at a crossing while the camera follows.",
    "Three birds sit on a wire above a red roof while the camera follows.",
    "A chef cuts onions in a bright kitchen while the camera follows.",
]


def test_a_claim_is_stated_in_any_inflection_and_knows_its_group():
    said = benchmark.read_text("The DOG was running; two dogs ran. Red!")
    assert said == {
        "content:dog": "dog",
        "content:run": "run",
        "number:two": "two",
        "colour:red": "red",
        "content:ran": "ran",
    }
    assert benchmark.read_text("") == {}


def test_words_that_most_references_share_are_not_claims():
    common = benchmark.common_stems(REFERENCES)
    assert common == {"content:camera", "content:follow"}


def test_the_majority_has_the_most_common_claims():
    truths = [{"a:x": "x", "a:y": "y"}, {"a:x": "x"}, {"a:x": "x", "a:z": "z", "a:y": "y"}]
    assert benchmark.majority(truths) == {"a:x": "x", "a:y": "y"}


def test_claims_that_a_prompt_does_not_state_are_open():
    seen = benchmark.read_text("A red car turns at a crossing in the rain")
    assert benchmark.left_open("A car in the rain", seen) == ["colour:red", "content:cross", "content:turn"]


def made_of(texts):
    empty = [{} for _ in texts]
    seen = [benchmark.read_text(text) for text in texts]
    return {
        "captions": {"texts": texts, "texts_without_video": [texts[0]] * len(texts), "seen": seen, "previews": []},
        "generation": {"seen": seen},
        "generation_base": {"seen": empty},
        "joint": {"seen": seen, "texts": texts},
    }


def test_a_perfect_captioner_scores_one_and_a_constant_caption_scores_low():
    common = benchmark.common_stems(REFERENCES)
    items = [
        {
            "id": f"c{n}",
            "prompt": text,
            "seed": n,
            "claims": {c: v for c, v in benchmark.read_text(text).items() if c not in common},
        }
        for n, text in enumerate(REFERENCES)
    ]
    chosen = {"captions": items, "generations": items, "joint": [{**item, "prompt": "a scene"} for item in items]}
    rows = score_everything(benchmark, chosen, made_of(REFERENCES))
    metrics = summarise_rows(rows, seed=0)
    assert metrics["captions"]["mean"]["value"] == metrics["captions"]["content"]["value"] == 1.0
    assert metrics["captions_without_video"]["mean"]["value"] < 0.5
    assert metrics["majority"]["mean"]["value"] < 0.6
    assert metrics["generation"]["mean"]["value"] == 1.0
    assert metrics["generation_base"]["mean"]["value"] == 0.0
    assert metrics["joint"]["agreement"]["value"] == 1.0 > metrics["joint"]["agreement_shuffled"]["value"]
    assert set(metrics["captions"]) == {"mean", "content", "colour", "number"}


def test_several_claims_count_towards_one_attribute_and_its_interval_is_over_items():
    correct = [{"a:1": True, "a:2": False, "a:3": False}, {"a:1": True}]
    scores = summarise(correct)
    assert scores["a"]["value"] == scores["mean"]["value"] == 0.5
    assert scores["a"]["n"] == 2


def test_prompts_are_read_from_jsonl(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n{"prompt": "one"}\n')
    assert [item["prompt"] for item in benchmark.read_prompts(path)] == ["one", "two"]
    path.write_text('{"text": "one"}\n')
    with pytest.raises(CorruptDataError, match="is not JSONL"):
        benchmark.read_prompts(path)
    with pytest.raises(MissingInputError, match="no prompts at"):
        benchmark.read_prompts(tmp_path / "none.jsonl")


# --- the whole step --------------------------------------------------------------------------------------------------


@pytest.fixture
def root(digits_root, recommit, speaking_model, clip_folder):
    """A work root as after both stages: every fourth clip of stage 2 held out, with a caption for each."""
    root, rows, _ = digits_root
    shutil.copytree(speaking_model, root / "data/stage2/model")
    shutil.copytree(clip_folder, root / "model/clip")
    prompts = ["a red dog runs", "two birds fly over a lake", "a green car"]
    (root / "data/prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    pairs = [
        {
            "id": f"{row['stage']}-{row['id']}",
            "clip_id": row["id"],
            "stage": row["stage"],
            "split": "heldout" if number % 4 == 1 else "train",
            "prompt": row["prompt"],
            "caption": REFERENCES[number % 4] if row["stage"] == 2 else None,
            "shard": row["shard"],
            "member": row["member"],
        }
        for number, row in enumerate(rows)
    ]
    recommit(root, "validate-pairs", {"pairs": pairs, "rejected": []})
    for step in ("train-stage-1", "train-stage-2"):
        recommit(root, step, {"rejected": []})
    recommit(root, "synthesize-videos", {"rejected": []})
    recommit(root, "validate-clips", {"rejected": []})
    for step in ("curate-prompts", "validate-prompts", "caption-videos"):
        recommit(root, step, {"rejected": []})
    counts = {"rows_in": 12, "rows_out": 12, "quarantined": 0, "reasons": {}}
    for manifest in root.glob("data/**/manifest.json"):
        write_manifest(manifest.parent, {**json.loads(manifest.read_text()), **counts})
    return root


def real_profile():
    profile = load_profile("smoke")
    sizes = {"captions": 9, "generations": 3, "joint": 2, "batch_size": 2, "compared_caption_steps": [2]}
    profile["evaluate_model"].update(sizes, benchmark="pairs", precision="bf16", scorers={"clip": "model/clip"})
    profile["heldout"] = "data/prompts.jsonl"
    return profile


@pytest.mark.slow
def test_a_model_is_evaluated_on_held_out_pairs_only(root):
    assert not (root / "data/heldout.json").exists()
    run_stage("evaluate-model", real_profile(), root)
    items = pd.read_parquet(root / "reports/items.parquet")
    pairs = pd.read_parquet(root / "data/pairs/pairs.parquet")
    heldout = pairs[(pairs["split"] == "heldout") & (pairs["stage"] == 2)]
    assert set(items[items["task"] == "captions"]["clip_id"]) == set(heldout["clip_id"])
    metrics = json.loads((root / "reports/scores.json").read_text())
    assert {"captions", "captions_without_video", "majority", "generation", "generation_base", "joint"} <= set(metrics)
    assert "recogniser" not in metrics
    assert metrics["generation_clip"]["retrieval"]["n"] == metrics["generation_base_clip"]["mean"]["n"] == 3
    assert set(metrics["captions"]["mean"]) == {"value", "low", "high", "n"}
    page = (root / "reports/report.html").read_text()
    wrong = [text for text in items[items["task"] == "captions"]["correct"] if "false" in text]
    assert page.count("<article") == len(heldout) + 3 + 2 + min(len(wrong), 6)
    assert "held-out clips whose reference captions were not used in training" in page
    assert (root / "reports/gallery.webp").stat().st_size > 1000


def test_trained_prompts_and_clips_of_other_sizes_are_left_out(root):
    profile = real_profile()
    trained = pd.read_parquet(root / "data/pairs/pairs.parquet").query("split == 'train'")["prompt"].iloc[0]
    (root / "data/prompts.jsonl").write_text(json.dumps({"prompt": trained}) + "\n")
    with pytest.raises(BadInputError, match="All prompts of the profile's 'heldout' were used in training"):
        run_stage("evaluate-model", profile, root)
    profile["video"] = {**profile["video"], "height": 64}
    with pytest.raises(BadInputError, match="has a clip of 9x64x32"):
        run_stage("evaluate-model", profile, root)


def test_clip_finds_the_prompt_whose_embedding_a_video_has(clip_folder):
    scorer = clip_scorer.load(clip_folder)
    rng = np.random.default_rng(0)
    videos = scorer.videos(rng.integers(0, 255, (2, 9, 32, 32, 3), dtype=np.uint8))
    assert [video.shape for video in videos] == [(8,), (8,)]
    prompts = ["a red digit", "a green five moving right", "two"]
    alone = [scorer.nearest(videos, [prompt]) for prompt in prompts]
    assert alone == [[prompt] * 2 for prompt in prompts]
    assert set(scorer.nearest(videos, prompts * 2)) <= set(prompts)


def test_a_missing_or_unknown_scorer_is_reported(root, tmp_path):
    with pytest.raises(MissingInputError, match="no CLIP model at"):
        clip_scorer.load(tmp_path)
    profile = real_profile()
    profile["evaluate_model"]["scorers"] = {"oracle": "model/clip"}
    with pytest.raises(ConfigError, match="no scorer 'oracle'"):
        run_stage("evaluate-model", profile, root)
    assert load_scorers({}, None) == {}
