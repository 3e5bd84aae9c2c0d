import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from as_command import AS_COMMAND
from univigu import wan
from univigu.errors import ConfigError, PreemptedError
from univigu.training import checkpoints
from univigu.training.engine import TrainingConfig
from univigu.training.loop import train

SCRIPT = Path(__file__).with_name("tiny_run.py")
spec = importlib.util.spec_from_file_location("tiny_run", SCRIPT)
tiny_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_run)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder and the weights of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, tiny_run.run(folder)


def assert_same_run(folder, weights, whole_run):
    whole_folder, whole_weights = whole_run
    assert all(torch.equal(weights[name], whole_weights[name]) for name in whole_weights)
    for name in ("curves.csv", "heldout.json", "heldout.csv"):
        assert (folder / name).read_bytes() == (whole_folder / name).read_bytes()


def read_column(folder, name):
    with (folder / "curves.csv").open(newline="") as stream:
        return [row[name] for row in csv.DictReader(stream)]


def read_losses(folder):
    return [float(loss) for loss in read_column(folder, "loss")]


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_bits(tmp_path, whole_run, capsys):
    command = [sys.executable, str(AS_COMMAND), str(SCRIPT), str(tmp_path), "{}", "5", "KILL"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "checkpoints" / "latest").read_text())["step"] == 3
    reported = {}
    weights = tiny_run.run(tmp_path, lambda step, metrics: reported.setdefault(step, {}).update(metrics))
    assert "Resuming after step 3 of 8" in capsys.readouterr().err
    assert sorted(reported) == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]  # no report is lost by the kill
    assert [f"{reported[step]['loss']:.6g}" for step in sorted(reported)] == read_column(tmp_path, "loss")
    assert_same_run(tmp_path, weights, whole_run)


def test_on_sigterm_a_run_saves_its_current_step_and_can_be_resumed(tmp_path, whole_run):
    def stop(step, metrics):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="saved step 5 of 8") as stopped:
        tiny_run.run(tmp_path, stop)
    assert stopped.value.exit_code == 81
    assert_same_run(tmp_path, tiny_run.run(tmp_path), whole_run)


def test_stopping_between_micro_batches_keeps_the_last_complete_step(tmp_path):
    settings = {"micro_batch_size": 4, "steps": 4, "checkpoint_every": 9}
    whole = tiny_run.run(tmp_path / "whole", **settings)

    passes = []

    def stop_in_the_second_step(*_):
        passes.append(1)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match="saved step 1 of 4"):
        tiny_run.run(tmp_path / "cut", before_forward=stop_in_the_second_step, **settings)
    resumed = tiny_run.run(tmp_path / "cut", **settings)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_stopping_right_after_a_checkpoint_does_not_change_it(tmp_path):
    passes, saved = [], []

    def stop_in_the_third_step(*_):
        passes.append(1)
        if len(passes) == 5:
            saved.extend((path, path.stat().st_ino) for path in (tmp_path / "checkpoints").rglob("rank-*"))
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {"micro_batch_size": 4, "steps": 4, "checkpoint_every": 2}
    with pytest.raises(PreemptedError, match="saved step 2 of 4"):
        tiny_run.run(tmp_path, before_forward=stop_in_the_third_step, **settings)
    assert saved
    assert saved == [(path, path.stat().st_ino) for path in (tmp_path / "checkpoints").rglob("rank-*")]


def test_instead_of_a_damaged_checkpoint_the_one_before_it_is_used(tmp_path, whole_run, capsys):
    with pytest.raises(PreemptedError):
        tiny_run.run(tmp_path, lambda step, metrics: step == 7 and os.kill(os.getpid(), signal.SIGTERM))
    saved = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == ["step-00000006", "step-00000007"]
    weights = saved[1] / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] + b"x" * 100)
    assert checkpoints.newest_valid(tmp_path / "checkpoints") == saved[0]
    assert "damaged" in capsys.readouterr().err
    assert_same_run(tmp_path, tiny_run.run(tmp_path), whole_run)
    assert (tmp_path / "checkpoints/damaged-step-00000007/rank-00000.safetensors").is_file()


@pytest.mark.parametrize("name", ["curves.csv", "evaluations.json", "heldout.csv", "heldout.json"])
@pytest.mark.parametrize("content", ["", "step,loss\n1,2", "[]"])
def test_lost_records_are_restored_from_the_checkpoint(tmp_path, whole_run, name, content):
    with pytest.raises(PreemptedError):
        tiny_run.run(tmp_path, lambda step, metrics: step == 5 and os.kill(os.getpid(), signal.SIGTERM))
    (tmp_path / name).write_text(content)
    assert_same_run(tmp_path, tiny_run.run(tmp_path), whole_run)


def test_a_burst_of_signals_stops_a_run_once(tmp_path):
    def burst(step, metrics):
        if step == 2:
            command = "import os; [os.kill(os.getppid(), 15) for _ in range(20_000)]"
            subprocess.run([sys.executable, "-c", command], check=True)

    with pytest.raises(PreemptedError, match="saved step 2"):
        tiny_run.run(tmp_path, burst)


def test_without_a_valid_checkpoint_training_starts_again(tmp_path, whole_run):
    with pytest.raises(PreemptedError):
        tiny_run.run(tmp_path, lambda step, metrics: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
    for manifest in (tmp_path / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert_same_run(tmp_path, tiny_run.run(tmp_path), whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"micro_batch_size": 2}])
def test_zero_and_micro_batches_do_not_change_the_curve(tmp_path, whole_run, settings):
    weights = tiny_run.run(tmp_path, **settings)
    assert read_losses(tmp_path) == pytest.approx(read_losses(whole_run[0]), rel=1e-4)
    assert all(torch.allclose(weights[name], tensor, atol=1e-3) for name, tensor in whole_run[1].items())


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 3), (3, 2), (2, 0)])
def test_a_run_resumes_in_another_zero_stage(tmp_path, whole_run, capsys, before, after):
    def stop(step, metrics):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError):
        tiny_run.run(tmp_path, stop, zero_stage=before)
    weights = tiny_run.run(tmp_path, zero_stage=after)
    assert "Resuming after step 4 of 8" in capsys.readouterr().err
    assert read_losses(tmp_path) == pytest.approx(read_losses(whole_run[0]), rel=1e-4)
    assert all(torch.allclose(weights[name], tensor, atol=1e-3) for name, tensor in whole_run[1].items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with pytest.raises(PreemptedError):
        tiny_run.run(tmp_path, lambda step, metrics: os.kill(os.getpid(), signal.SIGTERM))
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    tensors = load_file(saved / "rank-00000.safetensors")
    del tensors["transformer.text_space.weight"]
    save_file(tensors, saved / "rank-00000.safetensors")
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["rank-00000.safetensors"] = checkpoints._describe(saved / "rank-00000.safetensors")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"no 'transformer\.text_space\.weight', so it is of another model"):
        tiny_run.run(tmp_path)


@pytest.mark.slow
def test_in_bf16_the_curve_is_close_and_the_final_weights_are_fp32(tmp_path, whole_run):
    weights = tiny_run.run(tmp_path, precision="bf16", zero_stage=1)
    assert read_losses(tmp_path) == pytest.approx(read_losses(whole_run[0]), rel=0.1)
    assert weights["blocks.0.ffn.net.2.weight"].dtype == torch.float32


EVERYTHING = {  # the settings of a run at full size
    "precision": "bf16",
    "zero_stage": 3,
    "offload": ("optimizer", "parameters"),
    "micro_batch_size": 4,
    "gradient_checkpointing": 2,
    "lora": {"rank": 4, "targets": ("to_q", "to_v")},
    "freeze": ("token_table",),
    "ema_decay": 0.9,
    "text_draws": 2,
    "objective": {"coupled_times": 0.5},
    "steps": 4,
    "sizes": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 2, "offload": ("optimizer",)},
        {"zero_stage": 3, "offload": ("optimizer", "parameters")},
        {"gradient_checkpointing": 1},
        {"gradient_checkpointing": 2, "zero_stage": 3},
    ],
)
def test_saving_memory_does_not_change_the_curve(tmp_path, whole_run, settings):
    weights = tiny_run.run(tmp_path, **settings)
    assert read_losses(tmp_path) == pytest.approx(read_losses(whole_run[0]), rel=1e-5)
    assert all(torch.allclose(weights[name], tensor, atol=1e-5) for name, tensor in whole_run[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_average_of_the_weights_is_evaluated_and_saved(tmp_path, whole_run, zero_stage):
    seen = []

    def note_weights(module, _):
        seen.append({name: tensor.clone() for name, tensor in module.transformer.state_dict().items()})

    tiny_run.run(tmp_path / "seen", before_forward=note_weights)
    seen = [*seen[::1], whole_run[1]]
    assert len(seen) == 9
    expected = dict(seen[0])
    for step, weights in enumerate(seen[1:], 1):
        decay = min(0.8, (1 + step) / (10 + step))
        expected = {name: decay * tensor + (1 - decay) * weights[name] for name, tensor in expected.items()}

    weights = tiny_run.run(tmp_path / "average", ema_decay=0.8, zero_stage=zero_stage)
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert not all(torch.allclose(weights[name], tensor, atol=1e-4) for name, tensor in whole_run[1].items())
    assert read_losses(tmp_path / "average") == pytest.approx(read_losses(whole_run[0]), rel=1e-5)
    averaged, plain = ((folder / "heldout.json").read_text() for folder in (tmp_path / "average", whole_run[0]))
    assert averaged != plain


def test_adapters_train_the_video_side_and_are_merged_at_the_end(tmp_path, whole_run):
    weights = tiny_run.run(tmp_path, lora={"rank": 4, "targets": ["to_q"]}, freeze=["token_table"])
    assert weights.keys() == whole_run[1].keys()
    start = tiny_run.make_objective(tiny_run.open_data(tmp_path)[0]).transformer.state_dict()
    changed = {name for name, tensor in start.items() if not torch.equal(weights[name], tensor)}
    assert {name for name in changed if not wan.is_text_side(name)} == {
        f"blocks.{block}.{attention}.to_q.weight" for block in (0, 1) for attention in ("attn1", "attn2")
    }
    assert "blocks.0.ffn_text.net.2.weight" in changed
    assert "text_space.weight" not in changed


def test_unmerged_adapters_add_up_to_the_merged_weights(tmp_path):
    lora = {"rank": 4, "alpha": 8, "targets": ["to_q"]}
    merged = tiny_run.run(tmp_path / "merged", lora=lora, steps=2)
    apart = tiny_run.run(tmp_path / "apart", lora={**lora, "merge": False}, steps=2)
    start = tiny_run.make_objective(tiny_run.open_data(tmp_path)[0]).transformer.state_dict()
    adapted = {name.removesuffix(".base_layer.weight") for name in apart if name.endswith(".base_layer.weight")}
    assert len(adapted) == 4
    for name in adapted:
        up, down = (apart[f"{name}.lora_{letter}.trained.weight"] for letter in "BA")
        assert torch.equal(apart[f"{name}.base_layer.weight"], start[f"{name}.weight"])
        torch.testing.assert_close(start[f"{name}.weight"] + up @ down, merged[f"{name}.weight"])
        assert up.any()


@pytest.mark.slow
def test_in_bf16_frozen_weights_keep_their_bits(tmp_path):
    start = tiny_run.make_objective(tiny_run.open_data(tmp_path)[0]).transformer.state_dict()
    weights = tiny_run.run(tmp_path, steps=2, precision="bf16", zero_stage=1, freeze=["video"])
    for name, tensor in start.items():
        assert wan.is_text_side(name) or torch.equal(weights[name], tensor), name
    assert not torch.equal(weights["text_embedder.proj_in.weight"], start["text_embedder.proj_in.weight"])


@pytest.mark.slow
def test_a_run_with_all_settings_on_resumes(tmp_path):
    whole = tiny_run.run(tmp_path / "whole", **EVERYTHING)
    with pytest.raises(PreemptedError):
        tiny_run.run(
            tmp_path / "cut", lambda step, metrics: step == 2 and os.kill(os.getpid(), signal.SIGTERM), **EVERYTHING
        )
    weights = tiny_run.run(tmp_path / "cut", **EVERYTHING)
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
    for name in ("curves.csv", "heldout.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_samples_are_requested_periodically_and_at_the_end(tmp_path):
    steps = []
    dataset, heldout = tiny_run.open_data(tmp_path)
    config = TrainingConfig(**{**tiny_run.SETTINGS, "steps": 5, "samples_every": 2})
    train(tiny_run.make_objective(dataset), dataset, heldout, config, tmp_path, sample=steps.append)
    assert steps == [2, 4, 5]


@pytest.mark.slow
def test_a_few_samples_of_two_sizes_are_memorised(tmp_path):
    few = slice(0, 6)
    settings = {"steps": 120, "batch_size": 4, "checkpoint_every": 200, "heldout_every": 30, "learning_rate": 1e-2}
    tiny_run.run(tmp_path, parts=(few, few), sizes=2, **settings)
    evaluations = json.loads((tmp_path / "evaluations.json").read_text())
    for name in ("text_ce", "video_mse"):
        first, last = (sum(scores[name]) for scores in (evaluations[0], evaluations[-1]))
        assert last < 0.97 * first, name
    assert evaluations[-1]["samples"] == 6


@pytest.mark.slow
def test_training_reduces_the_heldout_losses(tmp_path):
    few = slice(0, 4)
    settings = {"steps": 80, "checkpoint_every": 100, "heldout_every": 20, "learning_rate": 1e-2}
    tiny_run.run(tmp_path, parts=(few, few), **settings)
    evaluations = json.loads((tmp_path / "evaluations.json").read_text())
    assert [scores["step"] for scores in evaluations] == [20, 40, 60, 80]
    for name in ("text_ce", "video_mse"):
        first, last = (sum(scores[name]) for scores in (evaluations[0], evaluations[-1]))
        assert last < 0.97 * first, name
    assert evaluations[-1]["video_gain"] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"freeze": ["no_such_part"]},
        {"freeze": ["video", "text"]},
        {"lora": {"rank": 0}},
        {"lora": {"targets": ["to_nothing"]}},
        {"lora": {"ranks": 4}},
    ],
)
def test_a_run_without_trainable_weights_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError):
        tiny_run.run(tmp_path, **wrong)


def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    tiny_run.run(tmp_path, steps=1)
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    tensors = load_file(saved / "rank-00000.safetensors")
    tensors["transformer.proj_out.weight"] = torch.zeros(16, 48)
    save_file(tensors, saved / "rank-00000.safetensors")
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["rank-00000.safetensors"] = checkpoints._describe(saved / "rank-00000.safetensors")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"'transformer\.proj_out\.weight' has the shape \(16, 48\)"):
        tiny_run.run(tmp_path, steps=2)


def test_another_implementation_of_attention_gives_the_same_curve(tmp_path, whole_run):
    tiny_run.run(tmp_path, attention_backend="_native_math")
    assert read_losses(tmp_path) == pytest.approx(read_losses(whole_run[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": "blocks"}, "The blocks can't be compiled, because torch finds no C"),
        ({"compile": "blocks", "zero_stage": 3}, "ZeRO 3 gathers weights within a block"),
        ({"compile": "all"}, "Unknown compile 'all'; use none or blocks"),
    ],
)
def test_blocks_that_can_not_be_compiled_are_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=message):
        tiny_run.run(tmp_path, **settings)


def test_an_implementation_of_attention_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"attention backend 'fastest' can't be used here .* leave it empty"):
        tiny_run.run(tmp_path, attention_backend="fastest")
