"""Work made by another recipe: it is set aside under a name, never deleted, and resumed on request.

``.univigu/aside/<step>/<key>`` holds what runs with that recipe key have left: ``scratch`` (checkpoints and curves of a
training), ``shards`` with their ``records``, ``answers`` from a paid service, or a whole ``output`` that was damaged.
`univigu run STEP --resume-from FOLDER` resumes from it even if something has changed since, and the manifest records
that; `--restart` sets everything aside. Only users delete these folders.
"""

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from components.pipeline.digests import tree_files
from components.pipeline.manifests import Recipe, read_manifest
from components.pipeline.shard_records import read_record, record_keys, write_record
from components.pipeline.state import STATE
from components.pipeline.workspace import Workspace
from univigu.errors import BadInputError, MissingInputError
from univigu.files import link_or_copy, read_json_object, write_json

KEY_FILE, RECIPE_FILE, RESUMED_FILE = "run-key", "recipe.json", "resumed.json"  # in scratch
UNKNOWN = "unknown"
_KEY_LENGTH = 12  # characters of a key in a folder's name


# --- setting aside ----------------------------------------------------------------------------------------------------


def keep_foreign_work(step: Workspace) -> None:
    """Before a run: set aside the work of an unfinished run with another recipe, and print what differs."""
    before = _recipe_of_work(step)
    kept = keep_foreign_shards(step)
    key = read_text(step.scratch / KEY_FILE) or UNKNOWN
    if key != step.key and _is_work(step.scratch):
        kept |= _move(step, key, {"scratch": step.scratch})
    _tell(step, before.differences(step.recipe) if before else [], kept)


def keep_foreign_shards(step: Workspace) -> set[Path]:
    """Set aside the finished shards in the staging folder that another recipe made; returns their new folders."""
    kept: set[Path] = set()
    for path in sorted(step.records.glob("*.json")):
        record, folder = read_record(path), step.out / "shards" / path.stem
        if record and record["run"] != step.key and folder.is_dir():
            moves = {f"shards/{path.stem}": folder, f"records/{path.name}": path}
            kept |= _move(step, record["run"], moves)
    return kept


def keep_committed_shard(step: Workspace, name: str, rows_digest: str) -> None:
    """Before a shard is made again: keep the committed one that another recipe made from the same rows."""
    path, folder = step.records / f"{name}.json", step.previous / "shards" / name
    record = read_record(path)
    if not record or record["run"] == step.key or record["of"] != rows_digest or not folder.is_dir():
        return
    place = _home(step, record["run"])
    if (place / "records" / path.name).exists():
        return
    is_first = not place.exists()
    shutil.rmtree(place / "shards" / name, ignore_errors=True)
    shutil.copytree(folder, place / "shards" / name, copy_function=link_or_copy)
    (place / "records").mkdir(exist_ok=True)
    shutil.copyfile(path, place / "records" / path.name)
    if is_first:
        before = _committed_recipe(step)
        _tell(step, before.differences(step.recipe) if before else [], {place})


def keep_everything(step: Workspace) -> set[Path]:
    """Set aside everything that runs have left, whatever their recipe, paid answers included; returns the new folders.

    The committed output stays, but its shards are not reused.
    """
    moves = {
        "scratch": step.scratch,
        "shards": step.out / "shards",
        "records": step.records,
        "answers": _answers(step),
    }
    there = {part: path for part, path in moves.items() if (_is_work(path) if part == "scratch" else tree_files(path))}
    return _move(step, read_text(step.scratch / KEY_FILE) or step.key, there) if there else set()


def keep_damaged_output(step: Workspace, output: Path, entries: Iterable[str]) -> None:
    """Set aside a committed output that doesn't match its manifest, for inspection."""
    moves = {f"output/{entry}": output / entry for entry in sorted(entries) if (output / entry).exists()}
    (place,) = _move(step, "damaged", moves)
    print(f"{step.stage.name}: the damaged output is set aside in {place}", file=sys.stderr)


def note_recipe(step: Workspace) -> None:
    """Write the recipe beside the checkpoints, so that a later run can say what differs."""
    if not (step.scratch / RECIPE_FILE).is_file():
        write_json(step.scratch / RECIPE_FILE, step.recipe._asdict())


# --- resuming ---------------------------------------------------------------------------------------------------------


def resume_work(step: Workspace, folder: Path) -> set[Path]:
    """Make the next run resume from the checkpoints and shards in `folder`, as if this recipe had made them.

    folder: one that was set aside, another work root's scratch folder, or the step's own output with its shards.
    Returns the folders in which the work that it would have resumed is now set aside. Raises `MissingInputError` if
    `folder` holds no work of the step, and `BadInputError` if a run resumes from it anyway.
    """
    if folder.resolve() == step.previous:
        for path in sorted(step.records.glob("*.json")):
            _take_record(step, path)
        return set()
    scratch = folder / "scratch" if (folder / "scratch").is_dir() else folder
    records, answers = sorted((folder / "records").glob("*.json")), folder / "answers"
    has_checkpoints = (scratch / KEY_FILE).exists() and _is_work(scratch)
    if not (has_checkpoints or records or tree_files(answers)):
        raise MissingInputError(f"{folder} holds no work of '{step.stage.name}' to resume; {_choices(step)}.")
    if scratch.resolve() == step.scratch:
        raise BadInputError(f"'{step.stage.name}' resumes from {folder} in any case; run it without --resume-from.")
    kept = keep_everything(step)
    if has_checkpoints:
        _take_scratch(step, scratch)
    for path in records:
        shard = folder / "shards" / path.stem
        if shard.is_dir():
            shutil.copytree(shard, step.out / "shards" / path.stem, copy_function=link_or_copy)
        _take_record(step, path)
    if tree_files(answers):
        shutil.copytree(answers, _answers(step))
    return kept


def resumed_from(step: Workspace) -> list[str]:
    """The keys of the other recipes with which the work of this run began; usually none."""
    found = set(_resumed(step.scratch))
    for path in step.records.glob("*.json"):
        if (record := read_record(path)) and record["run"] == step.key:
            found |= {str(key) for key in record.get("resumed_from", ())}
    return sorted(found)


def list_kept(root: Path, step: str = "*") -> list[Path]:
    """The folders of set-aside work under a work root, of one step or of all."""
    return sorted((root / STATE / "aside").glob(f"{step}/*"))


def _take_scratch(step: Workspace, scratch: Path) -> None:
    began = [*_resumed(scratch), read_text(scratch / KEY_FILE) or UNKNOWN]
    shutil.rmtree(step.scratch, ignore_errors=True)
    shutil.copytree(scratch, step.scratch, copy_function=_link_checkpoint)
    (step.scratch / RECIPE_FILE).unlink(missing_ok=True)
    write_json(step.scratch / RESUMED_FILE, {"runs": began})
    (step.scratch / KEY_FILE).write_text(step.key)


def _take_record(step: Workspace, path: Path) -> None:
    """Mark a finished shard as made by this recipe, and record which recipe made it."""
    record = read_record(path)
    if record:
        began = {*record.get("resumed_from", ()), record["run"]} - {step.key}
        note = {"resumed_from": sorted(began)} if began else {}
        step.records.mkdir(parents=True, exist_ok=True)
        write_record(step.records / path.name, {**record, **record_keys(step, record["of"]), **note})


def _link_checkpoint(source: str, target: str) -> None:
    """Link checkpoints, which are written once; copy the files beside them, which are appended to."""
    (link_or_copy if "checkpoints" in Path(source).parts else shutil.copy2)(source, target)


def _choices(step: Workspace) -> str:
    kept = ", ".join(str(path) for path in list_kept(step.root, step.stage.name))
    return f"its set-aside work is in {kept}" if kept else "none of its work is set aside"


# --- what exists ------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a small file; "" if it is missing or damaged."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _answers(step: Workspace) -> Path:
    return step.root / STATE / "answers" / step.stage.name


def _is_work(scratch: Path) -> bool:
    """Whether a run left folders there, such as checkpoints, and not only notes."""
    return any(file.parent != scratch for file in tree_files(scratch))


def _recipe_of_work(step: Workspace) -> Recipe | None:
    """The recipe of the unfinished run, otherwise of the committed output."""
    try:
        return Recipe(**read_json_object(step.scratch / RECIPE_FILE))
    except (OSError, ValueError, TypeError):
        return _committed_recipe(step)


def _committed_recipe(step: Workspace) -> Recipe | None:
    try:
        return Recipe.of(read_manifest(step.previous, step.stage.name))
    except (OSError, BadInputError):
        return None


def _resumed(scratch: Path) -> list[str]:
    try:
        return [str(key) for key in read_json_object(scratch / RESUMED_FILE)["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _home(step: Workspace, key: str) -> Path:
    return step.root / STATE / "aside" / step.stage.name / key[:_KEY_LENGTH]


def _move(step: Workspace, key: str, moves: dict[str, Path]) -> set[Path]:
    """Move files and folders (by their new names) into the folder of a recipe; returns that folder."""
    place, number = _home(step, key), 1
    while any((place / part).exists() for part in moves):
        number += 1
        place = place.with_name(f"{key[:_KEY_LENGTH]}-{number}")
    for part, source in moves.items():
        (place / part).parent.mkdir(parents=True, exist_ok=True)
        try:
            source.rename(place / part)
        except FileNotFoundError:  # another process of this step has moved it already
            continue
    return {place}


def _tell(step: Workspace, differences: Sequence[str], kept: set[Path]) -> None:
    if not kept:
        return
    name, places = step.stage.name, [str(path) for path in sorted(kept)]
    why = f": {'; '.join(differences)}" if differences else ""
    print(
        f"{name} starts again{why}. Its finished work is kept in {', '.join(places)}; `univigu run {name} "
        f"--resume-from {places[0]}` resumes from there.",
        file=sys.stderr,
    )
