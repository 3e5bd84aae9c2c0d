"""The folders of registered models that commands have looked up: asking MLflow takes longer than a caption.

They are in ``.univigu/models.json``, and count as long as the work root's own ``mlflow.db`` has not been written to
since. Nothing is kept of other stores.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.pipeline.state import STATE
from univigu.files import read_json_object, write_json

FILE = "models.json"
MOST = 20  # addresses


def known_folder(address: str, store: str, root: Path, look_up: Callable[[], Path]) -> Path:
    """The folder of a registered model: what `look_up` returns, unless that is known; ``store`` is the registry's."""
    home = root.resolve()
    before = _state(home, store)
    if before is None:
        return look_up()
    known = _read(home, before)
    found = home / str(known.get(address, ""))
    if address in known and found.is_relative_to(home) and (found / "model_index.json").is_file():
        return found
    found = look_up().resolve()
    if found.is_relative_to(home) and _state(home, store) == before:
        folders = {**dict(list(known.items())[1 - MOST :]), address: found.relative_to(home).as_posix()}
        with suppress(OSError):  # in a folder that can't be written to, it is looked up each time
            (home / STATE).mkdir(exist_ok=True)
            write_json(home / STATE / FILE, {"database": before, "folders": folders})
    return found


def _state(home: Path, store: str) -> list[int] | None:
    """What changes whenever the store is written to; None for another store than the work root's own, or under way."""
    database = home / "mlflow.db"
    if store != f"sqlite:///{database}" or any(home.glob("mlflow.db-*")):
        return None
    facts = database.stat()
    return [facts.st_mtime_ns, facts.st_size, facts.st_ino]


def _read(home: Path, state: list[int]) -> dict[str, Any]:
    try:
        kept = read_json_object(home / STATE / FILE)
        return kept["folders"] if kept["database"] == state and isinstance(kept["folders"], dict) else {}
    except (OSError, ValueError, KeyError):
        return {}
