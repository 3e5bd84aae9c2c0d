"""Metrics say what runs have recorded: real runs of small steps, MLflow runs, and the captioner's journal."""

import importlib
import math
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import engine
from components.captions.captioners.client.journal import Journal
from components.cli.metrics import metrics
from components.orchestration.airflow_server import free_port
from components.orchestration.metrics import EXPORTED, read_samples, registry
from components.pipeline.notes import DEFERRED, QUEUE, TRAINING, MetricsNote, QueueNote, note_path, write_note
from components.training.tracked_run import start_run
from univigu.errors import BadInputError, ConfigError, CorruptDataError, PreemptedError
from univigu.training.loop import SKIPPED_AT_MOST, _Run

PARAMETERS = {"train_stage_1": {"steps": 100, "batch_size": 4, "checkpoint_every": 20}}
FIGURES = {"samples_per_second": 8.0, "tokens_per_second": 640.0, "loading_share": 0.25, "mfu": 0.4}


def values(root):
    """The metrics by name, or by name and labels where there are labels."""
    found = read_samples(root)
    assert {len(EXPORTED[one.name][1]) - len(one.labels) for one in found} == {0}
    return {(one.name, *one.labels) if one.labels else one.name: one.value for one in found}


def train(root):
    return start_run(root, "train-stage-1", parameters=PARAMETERS, tags={}, datasets={})


def note_of(root, name="train-stage-1"):
    """The note that `train` writes, without MLflow."""
    settings = {f"{name.replace('-', '_')}.{key}": value for key, value in PARAMETERS["train_stage_1"].items()}
    return MetricsNote(note_path(root, TRAINING, name), settings)


@pytest.mark.slow
def test_a_training_run_shows_its_speed_what_is_left_and_the_time_between_its_checkpoints(tmp_path):
    began = time.time()
    with suppress(PreemptedError), train(tmp_path) as run:
        run.log(1, {"loss": 3.0})  # of the run before it was interrupted
        assert not [one for one in read_samples(tmp_path) if "training" in one.name]
        run.log(10, {"loss": 2.0, "grad_norm": 1.5, "learning_rate": 1e-4, **FIGURES})
        found = values(tmp_path)
        step = ("train-stage-1",)
        expected = {
            "active": 1,
            "step": 10,
            "steps": 100,
            "loss": 2.0,
            "gradient_norm": 1.5,
            "learning_rate": 1e-4,
            "samples_per_second": 8,
            "tokens_per_second": 640,
            "mfu_ratio": 0.4,
            "data_wait_ratio": 0.25,
            "remaining_seconds": 90 * 4 / 8,
            "checkpoint_interval_seconds": 20 * 4 / 8,
        }
        assert {name: found[(f"univigu_training_{name}", *step)] for name in expected} == expected
        assert began <= found[("univigu_training_checkpoint_timestamp_seconds", *step)] <= time.time()
        run.log(11, {"loss": 1.0, **FIGURES})
        raise PreemptedError("saved step 11")
    found = values(tmp_path)
    assert found[("univigu_training_active", *step)] == 0
    assert found[("univigu_training_step", *step)] == 11
    assert found[("univigu_training_loss", *step)] == 1.0


def test_the_newest_checkpoint_counts_unless_the_run_was_resumed_after_it(tmp_path):
    saved = tmp_path / ".univigu/scratch/train-stage-1/checkpoints/latest"
    saved.parent.mkdir(parents=True)
    saved.touch()
    os.utime(saved, (1e9, 1e9))
    name = ("univigu_training_checkpoint_timestamp_seconds", "train-stage-1")
    note_of(tmp_path).add(1, {"loss": 2.0, **FIGURES})
    resumed = values(tmp_path)[name]
    assert abs(resumed - time.time()) < 600
    os.utime(saved, (resumed + 50, resumed + 50))
    assert values(tmp_path)[name] == resumed + 50


def test_a_loss_that_is_not_finite_is_the_last_loss_until_the_step_succeeds(root, monkeypatch):
    note_of(root, "first").add(1, {"loss": 2.0, **FIGURES})
    steps_under_test = importlib.import_module("steps_under_test")
    working = steps_under_test.double
    run = _Run.__new__(_Run)
    run.skipped_in_a_row = SKIPPED_AT_MOST - 1
    monkeypatch.setattr(steps_under_test, "double", lambda _: run.record(2, {"loss": math.nan}, [], 0, 0))
    with pytest.raises(CorruptDataError, match="nan at step 2"):
        engine.run(root)
    found = values(root)
    assert math.isnan(found["univigu_training_loss", "first"])
    assert found["univigu_step_failed", "first", "CorruptDataError"] == 1
    monkeypatch.setattr(steps_under_test, "double", working)
    engine.run(root)
    found = values(root)
    assert found["univigu_training_loss", "first"] == 2.0
    assert ("univigu_step_failed", "first", "CorruptDataError") not in found


def test_a_step_shows_its_rows_and_what_it_quarantined_by_reason(root):
    (root / "numbers.json").write_text("[1, 2, -3, 4, 5]")
    engine.run(root)
    found = values(root)
    assert found["univigu_step_rows_in", "first"] == 5
    assert found["univigu_step_rows_out", "first"] == 4
    assert found["univigu_step_quarantined_rows", "first", "negative"] == 1
    assert abs(found["univigu_step_finished_timestamp_seconds", "first"] - time.time()) < 600
    assert found["univigu_step_peak_memory_bytes", "first"] > 2**20


def test_captions_show_their_speed_and_cost_also_while_they_are_made(tmp_path, recommit):
    journal = Journal(tmp_path / ".univigu/answers/caption-videos/openai.sqlite")
    journal.keep("0", {}, {"requests": 1, "usd": 0.5})
    journal.charge({"requests": 1, "usd": 0.25})
    assert values(tmp_path)["univigu_caption_spent_total", "usd"] == 0.75
    record = {"seconds": 4.0, "rows_in": 10, "rows_out": 8, "peak_rss_mb": 1.0, "reasons": {"refusal": 2}}
    write_note(tmp_path / ".univigu/runs/caption-videos.json", record)
    write_note(tmp_path / "data/captions/manifest.json", {"facts": {"usage": {"usd": 0.75, "tokens": 900}}})
    found = values(tmp_path)
    assert found["univigu_captions_per_second"] == 2
    assert found["univigu_step_quarantined_rows", "caption-videos", "refusal"] == 2
    assert {unit: found["univigu_caption_usage", unit] for unit in ("usd", "tokens")} == {"usd": 0.75, "tokens": 900}
    journal.close()


def test_a_trainjob_that_waits_shows_for_how_long(tmp_path):
    note = QueueNote(note_path(tmp_path, QUEUE, "train-stage-1"), "train-stage-1-0123", "train-stage-1")
    note.update(True)
    labels = ("train-stage-1", "train-stage-1-0123")
    time.sleep(0.05)
    assert values(tmp_path)[("univigu_queue_waiting", *labels)] == 1
    assert values(tmp_path)[("univigu_queue_wait_seconds", *labels)] >= 0.05
    note.update(False)
    ended = values(tmp_path)[("univigu_queue_wait_seconds", *labels)]
    time.sleep(0.05)
    assert values(tmp_path)[("univigu_queue_wait_seconds", *labels)] == ended
    assert values(tmp_path)[("univigu_queue_waiting", *labels)] == 0


def test_what_cannot_be_read_is_counted_and_hides_nothing_else(tmp_path):
    for number, text in enumerate(("", "[]", '{"run": "a"}', '{"run": "a", "since": {}, "end": 1}', "\0" * 9)):
        path = note_path(tmp_path, DEFERRED, str(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    journal = tmp_path / ".univigu/answers/caption-videos/openai.sqlite"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(b"no database" * 100)
    write_note(note_path(tmp_path, DEFERRED, "b"), {"run": 'a "name"\n', "since": 1, "end": 2})
    found = values(tmp_path)
    assert found["univigu_unreadable_files"] == 6
    assert found["univigu_deferred_end_timestamp_seconds", 'a "name"\n'] == 2
    read_back = {family.name: family for family in text_string_to_metric_families(exposition(tmp_path))}
    (sample,) = read_back["univigu_deferred_end_timestamp_seconds"].samples
    assert sample.labels == {"run": 'a "name"\n'}


def exposition(root):
    return generate_latest(registry(root)).decode()


def test_each_exported_name_is_in_every_answer_with_a_description(tmp_path):
    families = {family.name: family for family in text_string_to_metric_families(exposition(tmp_path))}
    assert set(families) == {name.removesuffix("_total") for name in EXPORTED}
    assert all(family.documentation for family in families.values())


def test_the_command_writes_a_textfile_as_node_exporter_reads_it_and_says_what_is_wrong(tmp_path):
    target = tmp_path / "univigu.prom"
    metrics(tmp_path, target)
    assert "univigu_disk_free_bytes" in target.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["univigu.prom"]
    for arguments, error, said in (
        ({"textfile": tmp_path / "a.txt"}, BadInputError, "ends with .prom"),
        ({"textfile": target, "port": 1}, ConfigError, "contradict each other"),
        ({"root": tmp_path / "nowhere"}, BadInputError, "is not a folder"),
    ):
        with pytest.raises(error, match=said):
            metrics(**{"root": tmp_path, **arguments})


def test_the_command_serves_the_metrics_as_they_are_when_asked(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "components.cli.main", "metrics", "--root", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/metrics"
        for end in (5.0, 6.0):
            write_note(note_path(tmp_path, DEFERRED, "a"), {"run": "a", "since": 1, "end": end})
            body = urllib.request.urlopen(address, timeout=10).read().decode()
            assert f'univigu_deferred_end_timestamp_seconds{{run="a"}} {end}' in body
    finally:
        process.terminate()
        process.wait()


def test_a_work_root_that_is_read_only_or_full_stops_no_training(tmp_path):
    blocked = tmp_path / ".univigu/monitor"
    blocked.parent.mkdir()
    blocked.write_text("not a folder")
    note = note_of(tmp_path)
    note.add(1, {"loss": 2.0, **FIGURES})
    note.end("FINISHED")
    assert blocked.read_text() == "not a folder"
