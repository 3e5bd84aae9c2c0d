"""Plans of the bundled profiles, held against figures known from elsewhere."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from components.cli.main import app
from components.cli.plan import as_text, usual_gpus
from components.pipeline.profiles import load_profile, with_settings
from components.planning import cost as planning
from components.planning.inference import make_inference_plan
from components.planning.meta_models import build_models
from univigu import wan
from univigu.errors import BadInputError, ConfigError, MissingInputError
from univigu.hardware import find_gpu
from univigu.planning import Tokens, count_flops
from univigu.training.engine import TrainingConfig
from univigu.training.memory_check import needed_memory

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def plan():
    return planning.make_plan(load_profile("wan-1.3b"), ROOT, 16, "h800", price=2.0)


@pytest.mark.slow
def test_the_papers_run_takes_about_a_week_and_every_known_figure_is_met(plan):
    shortest, longest = plan["days"]
    assert shortest < 7 < longest < 9
    assert all(stage["step_seconds"][0] <= 6.05 for stage in plan["training"].values())
    assert [check["figure"] for check in plan["checks"] if not check["agrees"]] == []
    assert plan["storage"]["latents_per_clip"] == 16 * 21 * 60 * 104 * 2
    joint = plan["training"]["stage_1"]["tasks"]["joint"]
    assert (joint["forward"] + joint["backward"]) / 1e15 == pytest.approx(0.86, abs=0.005)
    assert (joint["forward"] + joint["backward"] + joint["recomputation"]) / 1e15 == pytest.approx(1.15, abs=0.005)


@pytest.mark.slow
def test_operations_of_the_autoencoder_are_those_of_all_frames():
    profile = load_profile("tiny")
    video = profile["video"] | {"frames": 29}
    models = build_models(profile | {"video": video}, wan.config_folder(ROOT / profile["base"]))
    size = (1, 3, video["frames"], video["height"], video["width"])
    encode = count_flops(lambda: models.vae.encode(torch.empty(size)))
    decode = count_flops(lambda: models.vae.decode(torch.empty(1, *models.latents)))
    assert planning.autoencoder_flops(models, video) == (encode, decode)


@pytest.mark.slow
def test_with_a_task_per_step_no_gpu_waits_and_the_plan_says_what_that_saves(plan):
    profile = load_profile("wan-1.3b")
    sampled = {
        **profile,
        **{name: {**profile[name], "task_draw": "sample"} for name in ("train_stage_1", "train_stage_2")},
    }
    other = planning.make_plan(sampled, ROOT, 16, "h800")
    for stage in ("stage_1", "stage_2"):
        ours, theirs = plan["training"][stage], other["training"][stage]
        assert ours["task_draw"]["draw"] == "step"
        saved = 1 - ours["step_seconds"][0] / theirs["step_seconds"][0]
        assert saved == pytest.approx(ours["task_draw"]["saved_by_step"]) == theirs["task_draw"]["saved_by_step"]
        assert 0.02 < saved < 0.4
    assert "a task per step saves" in as_text("wan-1.3b", plan)
    assert "a task per step would save" in as_text("wan-1.3b", other)


@pytest.mark.slow
def test_an_mfu_above_what_is_known_is_said_to_disagree(plan):
    figures = {check["figure"]: check["agrees"] for check in planning.known_figures([0.6, 0.6])}
    assert [figure[:11] for figure, agrees in figures.items() if not agrees] == ["MFU of NeMo"]
    too_slow = planning.known_figures([0.1, 0.1])
    assert [figure["agrees"] for figure in too_slow] == [False, True, True, True, True]


@pytest.mark.slow
def test_memory_is_there_for_each_stage_of_zero_and_without_recomputation_nothing_fits(plan):
    table = plan["memory"]["stage_1"]["by_stage"]
    assert {name for name, row in table.items() if row["fits"]} == {f"zero_{n}_recomputed" for n in (1, 2, 3)}
    assert plan["memory"]["stage_1"]["chosen"] == "zero_2_recomputed"
    assert plan["memory"]["stage_1"]["fits"]


@pytest.mark.slow
def test_a_plan_counts_memory_as_training_does(plan):
    profile = load_profile("wan-1.3b")
    section = {**profile["train_stage_1"], "lora": {"rank": 32}, "gradient_checkpointing": 2}
    config = TrainingConfig.from_section(section, profile["seed"])
    models = build_models(profile, wan.config_folder(profile["base"]))
    found = planning.plan_memory(models, Tokens(32_760, 256, 512), config, 16, find_gpu("h800"), None)
    assert found["chosen"] == "zero_2_recomputed/2"
    every, half, none = (found["by_stage"][f"zero_2_{name}"] for name in ("recomputed", "recomputed/2", "kept"))
    assert half["activations"] == pytest.approx((every["activations"] + none["activations"]) / 2, rel=1e-6)
    assert 0 < found["learning"] < plan["memory"]["stage_1"]["learning"] / 2
    sizes = {"video_tokens": 32_760, "context_tokens": 512, "world_size": 16, "trainable": found["learning"]}
    needed = needed_memory(models.transformer.config, config, **sizes)
    assert needed.items() <= half.items()
    assert needed["total"] == max(found["by_task"].values())


@pytest.mark.slow
def test_what_runs_between_training_steps_is_counted_too(plan):
    memory = plan["memory"]["stage_1"]
    assert list(memory["by_task"]) == ["training step", "evaluation", "caption", "generate"]
    assert memory["by_stage"][memory["chosen"]]["total"] == max(memory["by_task"].values())


@pytest.mark.slow
def test_an_mfu_of_your_own_gives_one_time_within_the_default_range(plan):
    one = planning.make_plan(load_profile("wan-1.3b"), ROOT, 16, "h800", mfu=0.2)
    first, last = one["days"]
    assert plan["days"][0] < first == last < plan["days"][1]
    assert plan["gpu"]["mfu"] == [0.18, 0.23]


@pytest.mark.slow
def test_the_cost_is_every_gpu_hour_times_its_price(plan):
    stages = [plan["training"][f"stage_{n}"]["gpu_days"] for n in (1, 2)]
    synthesis = [plan["synthesis"][name] for name in ("gpu_days", "encoding_gpu_days")]
    for end, total in enumerate(plan["cost"]["total"]):
        days = [span[end] for span in (*stages, *synthesis)]
        assert total == pytest.approx(2.0 * 24 * sum(days))
    assert plan["captioning"]["requests_at_least"] == 10_000


@pytest.mark.slow
def test_people_read_what_machines_read(plan):
    text = as_text("wan-1.3b", plan)
    assert json.loads(json.dumps(plan)) == plan
    shortest, longest = plan["days"]
    assert f"training    {shortest:.3g} to {longest:.3g} days" in text
    assert "-> ZeRO 2, recomputed" in text
    assert text.count("agrees") == len(plan["checks"])
    assert all(each in text for each in plan["assumptions"])


@pytest.mark.slow
def test_a_model_that_is_too_large_for_the_gpu_is_said_to_be_with_what_would_fit():
    found = planning.make_plan(load_profile("wan-14b"), ROOT, 16, "h800", zero=1)
    assert not found["memory"]["stage_1"]["fits"]
    assert "The profile's choice doesn't fit; zero 3 recomputed would." in as_text("wan-14b", found)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"gpus": 12}, BadInputError, "can't be split evenly over 12"),
        ({"mfu": 40.0}, BadInputError, "MFU is 40"),
        ({"gpu": "abacus"}, ConfigError, "no GPU 'abacus'"),
        ({"zero": 0}, BadInputError, "no ZeRO stage 0 in bf16"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        planning.make_plan(load_profile("wan-1.3b"), ROOT, **{"gpus": 16, "gpu": "h800", **arguments})


@pytest.mark.parametrize("changed", ["video.frames=50", "video.width=50"])
def test_clips_that_the_base_can_not_take_are_refused_as_they_would_be_later(changed):
    profile = load_profile(with_settings("tiny", [changed]))
    for plan in (partial(planning.make_plan, gpus=8), partial(make_inference_plan, task="caption")):
        with pytest.raises(ConfigError, match=r"choose 4k \+ 1 frames and sides that are multiples of 8"):
            plan(profile, ROOT, gpu="h800")


def test_without_a_number_of_gpus_a_plan_is_for_as_many_as_share_the_batches():
    assert {name: usual_gpus(load_profile(name)) for name in ("tiny", "smoke", "wan-1.3b", "wan-5b", "wan-14b")} == {
        "tiny": 8,
        "smoke": 8,
        "wan-1.3b": 16,
        "wan-5b": 16,
        "wan-14b": 16,
    }


def test_a_base_that_is_neither_there_nor_known_is_refused(tmp_path):
    profile = {**load_profile("tiny"), "base": "model/someone-elses"}
    with pytest.raises(MissingInputError, match="no base at"):
        planning.make_plan(profile, tmp_path, 1, "h100")


@pytest.mark.slow
def test_the_command_prints_the_same_for_machines(plan):
    result = CliRunner().invoke(app, ["plan", "--profile", "wan-1.3b", "--price", "2", "--root", str(ROOT), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == plan


@pytest.mark.slow
def test_a_plan_is_made_with_the_settings_of_the_command_line(plan):
    settings = ["--set", "train_stage_2.steps=77", "--root", str(ROOT), "--json"]
    result = CliRunner().invoke(app, ["plan", "--profile", "wan-1.3b", *settings])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["training"]["stage_2"]["steps"] == 77
