"""Work roots for the trials: what a copy of one shares with it, and what two of them must have in common."""

import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from univigu.files import link_or_copy

# Written in place, or locked: never shared between two roots.
_OWN = (".univigu", "mlflow.db", "mlruns", ".git", ".dvc")
# Read by nobody but people, with times in them; or ids and times of MLflow's, which `registry` looks at.
_UNLIKE = (
    *(".univigu/docs/", ".univigu/locks/", ".univigu/monitor/", ".univigu/runs/"),
    *("mlflow.db", "mlruns/", ".git/", ".dvc/"),
)
# Parameters that differ from run to run: a request's id, a ledger line's time, the digests that cover it, and the
# digest of a version's files, which name runs.
_UNLIKE_PARAMETERS = "('request', 'when', 'clock', 'previous', 'digest', 'signature', 'files')"
_CLOCKED = (
    "samples_per_second",
    "tokens_per_second",
    "seconds",
    "tflops",
    "mfu",
    "loading_share",
    "memory",
    "gib",
    "time",
)


def copy(root: Path, target: Path) -> None:
    """Copy a work root; finished outputs are hard links, as nothing writes into them."""
    target.mkdir(parents=True)
    for entry in root.iterdir():
        own = entry.name in _OWN
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=shutil.copy2 if own else link_or_copy)
        else:
            (shutil.copy2 if own else link_or_copy)(entry, target / entry.name)


def prepare(root: Path, place: Path) -> None:
    """Make `place` anew: a copy of a work root, and an empty folder for temporary files."""
    shutil.rmtree(place, ignore_errors=True)
    copy(root, place / "root")
    (place / "tmp").mkdir()


def state(root: Path) -> dict[str, str]:
    """All that is in a work root and doesn't depend on the clock: SHA-256 by path, and what the registry says."""
    found = {name: _digest(path) for name, path in _files(root) if not name.startswith(_UNLIKE)}
    return {**found, **registry(root)}


def fingerprint(place: Path) -> str:
    """A digest of all that the next run in a place could see, but for times in pages that nothing reads."""
    hashed = hashlib.sha256()
    for folder, _, names in sorted(os.walk(place)):
        hashed.update(f"{Path(folder).relative_to(place)}/\n".encode())
        for name in sorted(names):
            path = Path(folder, name)
            seen = path.relative_to(place / "root").as_posix() if path.is_relative_to(place / "root") else name
            page = seen.startswith((".univigu/docs/", ".univigu/monitor/", ".univigu/runs/"))
            hashed.update(f"{name} {path.lstat().st_size if page else _digest(path)}\n".encode())
    return hashed.hexdigest()


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """How the second state differs from the first."""
    missing = [f"{name} is missing" for name in sorted(one.keys() - other.keys())]
    more = [f"{name} is left over" for name in sorted(other.keys() - one.keys())]
    changed = [
        f"{name} differs" + (f": {one[name]} -> {other[name]}" if name.startswith("registry") else "")
        for name in sorted(one.keys() & other.keys())
        if one[name] != other[name]
    ]
    return missing + more + changed


def registry(root: Path) -> dict[str, str]:
    """What a SQLite store of MLflow's holds, without ids and times: how often each fact is there."""
    database = root / "mlflow.db"
    if not database.is_file():
        return {}
    with _copied(database) as copied, closing(sqlite3.connect(copied)) as store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        facts = [
            f"{name} {' '.join(map(str, row))}"
            for name, (table, query) in _QUERIES.items()
            if table in tables
            for row in store.execute(query)
        ]
    facts = [fact for fact in facts if not (fact.startswith("metric ") and any(word in fact for word in _CLOCKED))]
    return {f"registry: {fact}": str(count) for fact, count in Counter([*facts, *_artifacts(root)]).items()}


@contextmanager
def _copied(database: Path) -> Iterator[Path]:
    """A copy to read: what a killed process left beside its database is undone there, and stays for the next run."""
    with tempfile.TemporaryDirectory() as folder:
        for path in database.parent.glob(f"{database.name}*"):
            shutil.copy2(path, folder)
        yield Path(folder) / database.name


_COUNTS = "r.status IN ('FINISHED', 'RUNNING') AND r.lifecycle_stage = 'active'"  # others are marked as what went wrong
_OF_RUNS = f"FROM {{}} p JOIN runs r USING (run_uuid) WHERE {_COUNTS}"
_QUERIES = {  # a model of the status 3 is marked as failed; a request is known by a run's id
    "experiment": ("experiments", "SELECT name, lifecycle_stage FROM experiments"),
    "run": ("runs", f"SELECT name, status, lifecycle_stage FROM runs r WHERE {_COUNTS}"),
    "parameter": (
        "params",
        f"SELECT r.name, p.key, p.value {_OF_RUNS.format('params')} AND p.key NOT IN {_UNLIKE_PARAMETERS}",
    ),
    "metric": ("metrics", f"SELECT DISTINCT r.name, p.key, p.step {_OF_RUNS.format('metrics')}"),
    "version": ("model_versions", "SELECT name, version, status FROM model_versions"),
    "alias": ("registered_model_aliases", "SELECT name, alias, version FROM registered_model_aliases"),
    "model": (
        "logged_models",
        "SELECT name, status FROM logged_models WHERE status != 3 AND lifecycle_stage = 'active'",
    ),
    "tag": ("model_version_tags", "SELECT name, version, key FROM model_version_tags"),
}


def _artifacts(root: Path) -> Iterator[str]:
    """The logged models below the folder of artifacts, whole or not."""
    for path in (root / "mlruns").glob("models/*"):
        yield "a logged model" if any(path.rglob("MLmodel")) else "part of a logged model"


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
