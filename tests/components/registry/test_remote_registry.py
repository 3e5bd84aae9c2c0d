"""The registry on a server: fetching from it, changing it at the same time, and a server that goes down meanwhile."""

import time

import mlflow
import pytest

from components.registry import promotion
from mlflow_gate import gated
from python_process import run_python
from univigu import registry
from univigu.confidence_reference import read_reference, write_reference
from univigu.errors import TransientError


@pytest.fixture
def gate(mlflow_server, monkeypatch, impatient):
    """MLflow's server behind a gate; named by MLFLOW_TRACKING_URI."""
    with gated(mlflow_server) as gate:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.url)
        yield gate


@pytest.mark.slow
def test_a_fetched_model_comes_with_the_measures_of_its_evaluation_where_its_version_has_them(mlflow_server, tmp_path):
    (tmp_path / "artifacts/pipeline").mkdir(parents=True)
    (tmp_path / "artifacts/pipeline/model_index.json").write_text("{}")
    (tmp_path / "artifacts/evaluation").mkdir()
    (tmp_path / "artifacts/evaluation/scores.json").write_text("{}")
    with registry.opened(mlflow_server.url):
        client = mlflow.MlflowClient()
        client.create_registered_model("fetched")
        experiment = client.create_experiment("fetched")
        for version in (1, 2):
            run = client.create_run(experiment)
            if version == 2:
                written = write_reference(tmp_path / "artifacts/evaluation", [{"fidelity": 30.0}, {"fidelity": 31.0}])
            client.log_artifacts(run.info.run_id, str(tmp_path))
            client.create_model_version("fetched", run.info.artifact_uri, run.info.run_id)
    older, newer = (registry.pipeline_folder(f"models:/fetched/{number}", mlflow_server.url) for number in (1, 2))
    for folder in (older, newer):
        assert not folder.is_relative_to(tmp_path)
        assert [file.name for file in folder.iterdir()] == ["model_index.json"]
    assert read_reference(older) is None
    assert read_reference(newer) == written
    assert {file.name for file in newer.with_name("evaluation").iterdir()} == {"confidence.json"}


def fails_soon(gate, call):
    """Call while the gate closes: it ends with the error for a server that is down; then open the gate."""
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"MLflow's store at .* does not answer"):
        call()
    assert time.monotonic() - began < 60
    gate.closed = False


@pytest.mark.slow
def test_a_registration_while_mlflow_goes_down_is_repeated_with_the_same_result(gate, world):
    # while it uploads; and when the decision is written, before the alias has moved
    for request in ("PUT /api/2.0/mlflow-artifacts/artifacts", "registered-models/set-tag"):
        gate.closes_at.append(request)
        fails_soon(gate, lambda: world.register("down-too"))
        assert gate.closes_at == []
    facts = world.register("down-too")
    assert (facts["version"], facts["decision"]) == (1, "champion, as the first one (captions.mean 0.375)")
    (version,) = registry.versions("down-too")
    assert version.aliases == ["candidate", "champion"]
    assert [line.outcome for line in promotion.history("down-too", root=world.root)] == ["promoted"]


@pytest.mark.slow
def test_a_version_whose_confirmation_is_lost_is_not_created_twice(gate, world):
    gate.loses.append("model-versions/create")
    assert world.register("lost")["version"] == 1
    assert gate.loses == []
    assert [int(one.version) for one in registry.versions("lost")] == [1]


@pytest.mark.slow
def test_a_promotion_while_mlflow_goes_down_is_repeated_with_the_same_result(gate, versions):
    for right in (10, 30):
        versions.add("down", right)
    promotion.promote("down", 1, "the first", root=versions.root)
    gate.closes_after.append(
        "POST /api/2.0/mlflow/registered-models/alias"
    )  # the champion has moved, and `previous` has not
    fails_soon(gate, lambda: promotion.promote("down", 2, "better", root=versions.root))
    assert versions.aliases("down") == (2, None)
    line = promotion.promote("down", 2, "better", root=versions.root)
    assert (line.outcome, line.version, line.replaced) == ("promoted", 2, 1)
    assert versions.aliases("down") == (2, 1)
    assert [one.version for one in promotion.history("down", root=versions.root)] == [2, 1]


COMPETE = """
import sys, time
from pathlib import Path
from components.registry import promotion
version, root, go = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
import mlflow
go.with_name(f"ready-{version}").touch()
while not go.exists():
    time.sleep(0.01)
for number in range(3):
    promotion.promote("race", version, f"round {number}", force=True, root=root)
"""


@pytest.mark.slow
def test_two_concurrent_promotions_leave_a_consistent_ledger(mlflow_server, versions, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    for right in (10, 20):
        versions.add("race", right)
    racers = [run_python(COMPETE, version, versions.root, tmp_path / "go") for version in (1, 2)]
    while not all((tmp_path / f"ready-{version}").exists() for version in (1, 2)):
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    for racer in racers:
        assert racer.wait(timeout=240) == 0, racer.stderr.read()
    story = promotion.history("race", root=versions.root)[::-1]
    assert sorted((line.version, line.why) for line in story) == [(v, f"round {n}") for v in (1, 2) for n in range(3)]
    champion = previous = None
    for line in story:
        assert line.replaced == champion
        assert line.outcome == ("unchanged" if line.version == champion else "promoted")
        if line.version != champion:
            champion, previous = line.version, champion
    assert versions.aliases("race") == (champion, previous)
