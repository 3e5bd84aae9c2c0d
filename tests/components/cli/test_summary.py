"""The summary speaks of the outputs that are there now."""

import json
import re

import pytest

from components.cli.summary import show, summarise, write_index
from components.evaluation.report import RUN
from components.pipeline.manifests import write_manifest
from components.pipeline.stages import STAGES
from univigu.errors import MissingInputError


def leave(root, stage, digest, record=None):
    home = root / stage.home
    home.mkdir(parents=True, exist_ok=True)
    rows = {"rows_in": 5, "rows_out": 4, "quarantined": 1}
    write_manifest(home, {"digest": digest, **rows})
    if record:
        (root / ".univigu/runs").mkdir(parents=True, exist_ok=True)
        known = {"name": stage.name, "seconds": 2.5, "peak_rss_mb": 100.0, "digest": record, **rows, "rows_in": 7}
        (root / f".univigu/runs/{stage.name}.json").write_text(json.dumps(known))


def test_a_step_that_ran_has_its_time_and_a_restored_one_has_none(tmp_path):
    leave(tmp_path, STAGES[0], "a", record="a")
    leave(tmp_path, STAGES[1], "b", record="of another profile")
    leave(tmp_path, STAGES[2], "c")
    run = summarise(tmp_path)
    assert [(step["seconds"], step["rows_in"]) for step in run["steps"]] == [(2.5, 7), (None, 5), (None, 5)]
    assert (run["total_seconds"], run["peak_rss_mb"], run["model_version"]) == (2.5, 100.0, None)
    assert run["machine"]["cores"] >= 1
    assert run["machine"]["processor"]
    show(tmp_path, run)
    assert json.loads((tmp_path / "reports/run.json").read_text()) == run


def test_a_summary_that_can_not_be_written_is_shown_and_named(tmp_path, capsys):
    leave(tmp_path, STAGES[0], "a", record="a")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/.run.json.partial").mkdir()  # a file that can't be written, also for root
    with pytest.raises(IsADirectoryError) as error:
        show(tmp_path, summarise(tmp_path))
    assert error.value.filename == str(tmp_path / "reports/run.json")
    assert "2 s in total" in capsys.readouterr().out


def test_the_registered_version_is_shown_with_the_sentence_that_decided_about_it(tmp_path, capsys):
    for stage in STAGES:
        leave(tmp_path, stage, "a")
    decision = "candidate, as captions.mean 0.231 is below its profile's least (0.5)"
    facts = {"name": "uni-vigu", "version": 3, "decision": decision}
    (tmp_path / "data/registered/registration.json").write_text(json.dumps(facts))
    show(tmp_path, summarise(tmp_path))
    assert f"registered: uni-vigu version 3 - {decision}" in " ".join(capsys.readouterr().out.split())


def test_the_page_is_written_with_the_date_the_version_the_machine_and_links(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for stage in STAGES:
        leave(tmp_path, stage, "a")
    facts = {"name": "uni-vigu", "version": 3, "decision": "champion, as the first <one>"}
    (tmp_path / "data/registered/registration.json").write_text(json.dumps(facts))
    (tmp_path / "reports/report.html").write_text(f"<h1>Page</h1>{RUN}<nav>")
    (tmp_path / "params.yaml").write_text("profile: tiny\n")
    (tmp_path / ".univigu/docs").mkdir(parents=True)
    (tmp_path / ".univigu/docs/index.html").write_text("")
    page = write_index(tmp_path, summarise(tmp_path)).read_text()
    for needed in ("<dd>tiny</dd>", "champion, as the first &lt;one&gt;", "cores; 0 s", "UTC</dd>", "not in git"):
        assert needed in page
    assert re.findall(r'href="(.*?)"', page) == [
        "../.univigu/docs/index.html",
        "http://127.0.0.1:5000/#/models/uni-vigu/versions/3",
    ]
    assert (tmp_path / "reports/report.html").read_text() == f"<h1>Page</h1>{RUN}<nav>"


def test_before_any_run_it_says_what_to_do(tmp_path):
    with pytest.raises(MissingInputError, match="make demo"):
        summarise(tmp_path)
