"""Registrations that were killed, or whose disk was full: repeated, they have the same result, and leave no files."""

import os
import sqlite3
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from components.registry import promotion
from components.tracking import tracking_uri
from univigu import registry

KILLED = """
import os, resource, signal, sys
from pathlib import Path
import mlflow.pyfunc, scipy.stats, sqlalchemy.orm  # once, not in each child
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
from components.registry import promotion, register_model
from components.pipeline.runner import run_stage
from univigu import registry
from univigu.errors import DiskFullError
sqlalchemy.orm.configure_mappers()
root, calls = Path(sys.argv[1]), {"n": 0}

def die():  # as in a power failure
    os.kill(os.getpid(), signal.SIGKILL)

def fill():  # files can't grow beyond this size
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))

def strike_at(owner, name, call, strike):  # right before that call
    real = getattr(owner, name)
    def struck(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == call:
            strike()
        return real(*args, **kwargs)
    setattr(owner, name, struck)

for name, place, attribute, call, strike, ends in (
    ("kill-uploading", mlflow.models.model, "_use_logged_model", 1, die, -signal.SIGKILL),
    ("kill-uploaded", mlflow.tracking.fluent, "finalize_logged_model", 1, die, -signal.SIGKILL),
    ("kill-entered", registry, "set_alias", 1, die, -signal.SIGKILL),
    ("kill-decided", registry, "set_alias", 2, die, -signal.SIGKILL),
    ("kill-untagged", registry, "set_tags", 1, die, -signal.SIGKILL),
    ("kill-unwritten", register_model, "write_json", 7, die, -signal.SIGKILL),
    ("kill-full", mlflow.models.model, "_use_logged_model", 1, fill, DiskFullError.exit_code),
    ("kill-full-late", registry, "set_alias", 2, fill, DiskFullError.exit_code),
):
    if not (child := os.fork()):
        strike_at(place, attribute, call, strike)
        settings = {"name": name, "champion_metric": "captions.mean", "least_scores": {}, "promotion": "automatic"}
        try:
            run_stage("register-model", {"register_model": settings}, root)
        except DiskFullError as error:
            os._exit(error.exit_code)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == ends, (name, code)
"""
KILL_POINTS = ("uploading", "uploaded", "entered", "decided", "untagged", "unwritten", "full", "full-late")


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """The folder for temporary files; at each of `KILL_POINTS` a registration was killed, or its disk was full."""
    world.train("killed")
    temporary = tmp_path_factory.mktemp("temporary")
    repo = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(world.root)],
        env={**os.environ, "PYTHONPATH": f"{repo / 'model'}:{repo}", "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return temporary


@pytest.fixture(scope="module")
def repeated(world, killed):
    """Repeat the registration that was killed at a point, once for all tests; returns its facts."""
    return cache(lambda point: world.register(f"kill-{point}"))


@pytest.mark.slow
@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_killed_registration_that_is_repeated_has_the_same_result_as_without_the_kill(world, repeated, point):
    name, facts = f"kill-{point}", repeated(point)
    assert (facts["version"], facts["decision"]) == (1, "champion, as the first one (captions.mean 0.375)")
    version = registry.find_version(name, 1, tracking_uri(world.root))
    assert version.aliases == ["candidate", "champion"]
    assert version.tags["univigu.decision"] == facts["decision"]
    assert [(line.version, line.outcome) for line in promotion.history(name, root=world.root)] == [(1, "promoted")]
    runs = (
        "SELECT runs.name, status FROM runs JOIN experiments USING (experiment_id) WHERE "
        "runs.lifecycle_stage = 'active' AND (runs.name = ? OR experiments.name = ?) ORDER BY runs.start_time"
    )
    with sqlite3.connect(world.root / "mlflow.db") as database:
        found = database.execute(runs, (f"register {name}", f"{name}/promotions")).fetchall()
    assert found == [(f"register {name}", "FINISHED"), ("promote version 1", "FINISHED")]


@pytest.mark.slow
def test_killed_registrations_leave_no_files(world, killed, repeated):
    for point in KILL_POINTS:
        repeated(point)
    with sqlite3.connect(world.root / "mlflow.db") as database:
        sources = database.execute("SELECT source FROM model_versions").fetchall()
    models = {source.rpartition("/")[2] for (source,) in sources}
    assert {folder.name for folder in (world.root / "mlruns/models").iterdir()} == models
    assert list(killed.iterdir()) == []
    for place in ("staging", "scratch", "aside"):
        assert not (world.root / ".univigu" / place / "register-model").exists()
