"""Work that doesn't fit the present recipe: set aside by name, never deleted, and taken up again when asked to.

Below ``.univigu/aside/<step>/<key>`` is what runs with that recipe key had left: ``scratch`` (a training's checkpoints
and curves), ``shards`` with their ``records``, ``answers`` that a service was paid for, or a whole ``output`` that was
found damaged. `univigu run STEP --resume-from FOLDER` goes on from it, whatever has changed since, and the manifest
then says so; `--restart` sets everything aside. Only people delete it.
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
    """Before a run: set aside what an unfinished run by another recipe left, and say what differs."""
    before = _recipe_of_work(step)
    kept = keep_foreign_shards(step)
    key = read_text(step.scratch / KEY_FILE) or UNKNOWN
    if key != step.key and _is_work(step.scratch):
        kept |= _move(step, key, {"scratch": step.scratch})
    _tell(step, before.differences(step.recipe) if before else [], kept)


def keep_foreign_shards(step: Workspace) -> set[Path]:
    """Set aside the finished shards in the staging folder that another recipe made; returns where they are now."""
    kept: set[Path] = set()
    for path in sorted(step.records.glob("*.json")):
        record, folder = read_record(path), step.out / "shards" / path.stem
        if record and record["run"] != step.key and folder.is_dir():
            moves = {f"shards/{path.stem}": folder, f"records/{path.name}": path}
            kept |= _move(step, record["run"], moves)
    return kept


def keep_committed_shard(step: Workspace, name: str, rows_digest: str) -> None:
    """Before a shard is made again that the output has by another recipe from the same rows: keep that one, too."""
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
    """Set aside all that runs have left, whatever their recipe, and what a service was paid for; returns where it is.

    The committed output stays; its shards are not used again.
    """
    moves = {
        "scratch": step.scratch,
        "shards": step.out / "shards",
        "records": step.records,
        "answers": _answers(step),
    }
    there = {part: path for part, path in moves.items() if (_is_work(path) if part == "scratch" else tree_files(path))}
    return _move(step, read_text(step.scratch / KEY_FILE) or step.key, there) if there else set()


def keep_refused_output(step: Workspace, output: Path, entries: Iterable[str]) -> None:
    """Set aside a committed output that isn't what its manifest says, for a person to look at."""
    moves = {f"output/{entry}": output / entry for entry in sorted(entries) if (output / entry).exists()}
    (place,) = _move(step, "damaged", moves)
    print(f"{step.stage.name}: the damaged output is set aside in {place}", file=sys.stderr)


def note_recipe(step: Workspace) -> None:
    """Write beside the checkpoints what they are made by, so that a later run can name the difference."""
    if not (step.scratch / RECIPE_FILE).is_file():
        write_json(step.scratch / RECIPE_FILE, step.recipe._asdict())


# --- taking up again --------------------------------------------------------------------------------------------------


def take_up(step: Workspace, folder: Path) -> set[Path]:
    """Have the next run go on from the checkpoints and shards in `folder`, as if this recipe had made them.

    folder: set aside, or another work root's scratch, or the step's own output with its shards. Returns where what it
    would have gone on from is now. Raises `MissingInputError` where there is nothing to go on from.
    """
    if folder.resolve() == step.previous:
        for path in sorted(step.records.glob("*.json")):
            _take_record(step, path)
        return set()
    scratch = folder / "scratch" if (folder / "scratch").is_dir() else folder
    records, answers = sorted((folder / "records").glob("*.json")), folder / "answers"
    has_checkpoints = (scratch / KEY_FILE).exists() and _is_work(scratch)
    if not (has_checkpoints or records or tree_files(answers)):
        raise MissingInputError(f"There is nothing of '{step.stage.name}' to go on from in {folder}; {_choices(step)}.")
    if scratch.resolve() == step.scratch:
        raise BadInputError(f"'{step.stage.name}' goes on from {folder} by itself; run it without --resume-from.")
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
    """The keys of the recipes that began what this run has ended; usually none."""
    found = set(_resumed(step.scratch))
    for path in step.records.glob("*.json"):
        if (record := read_record(path)) and record["run"] == step.key:
            found |= {str(key) for key in record.get("resumed_from", ())}
    return sorted(found)


def list_kept(root: Path, step: str = "*") -> list[Path]:
    """What is set aside below a work root, of one step or of all."""
    return sorted((root / STATE / "aside").glob(f"{step}/*"))


def _take_scratch(step: Workspace, scratch: Path) -> None:
    began = [*_resumed(scratch), read_text(scratch / KEY_FILE) or UNKNOWN]
    shutil.rmtree(step.scratch, ignore_errors=True)
    shutil.copytree(scratch, step.scratch, copy_function=_link_checkpoint)
    (step.scratch / RECIPE_FILE).unlink(missing_ok=True)
    write_json(step.scratch / RESUMED_FILE, {"runs": began})
    (step.scratch / KEY_FILE).write_text(step.key)


def _take_record(step: Workspace, path: Path) -> None:
    """Have a finished shard count as made by this recipe; what made it is noted."""
    record = read_record(path)
    if record:
        began = {*record.get("resumed_from", ()), record["run"]} - {step.key}
        note = {"resumed_from": sorted(began)} if began else {}
        step.records.mkdir(parents=True, exist_ok=True)
        write_record(step.records / path.name, {**record, **record_keys(step, record["of"]), **note})


def _link_checkpoint(source: str, target: str) -> None:
    """Checkpoints are written once, so a link will do; what is beside them is added to."""
    (link_or_copy if "checkpoints" in Path(source).parts else shutil.copy2)(source, target)


def _choices(step: Workspace) -> str:
    kept = ", ".join(str(path) for path in list_kept(step.root, step.stage.name))
    return f"set aside are {kept}" if kept else "nothing of it is set aside"


# --- what is there ----------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A small file's text; nothing where it is missing or damaged."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _answers(step: Workspace) -> Path:
    return step.root / STATE / "answers" / step.stage.name


def _is_work(scratch: Path) -> bool:
    """Whether a run left more there than notes: folders, such as checkpoints."""
    return any(file.parent != scratch for file in tree_files(scratch))


def _recipe_of_work(step: Workspace) -> Recipe | None:
    """The recipe of the unfinished run, or else of the committed output."""
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
    """Rename files and folders, by the names that they get, into the folder of a recipe; returns that folder."""
    place, number = _home(step, key), 1
    while any((place / part).exists() for part in moves):
        number += 1
        place = place.with_name(f"{key[:_KEY_LENGTH]}-{number}")
    for part, source in moves.items():
        (place / part).parent.mkdir(parents=True, exist_ok=True)
        try:
            source.rename(place / part)
        except FileNotFoundError:  # another part of the step was faster
            continue
    return {place}


def _tell(step: Workspace, differences: Sequence[str], kept: set[Path]) -> None:
    if not kept:
        return
    name, places = step.stage.name, [str(path) for path in sorted(kept)]
    why = f": {'; '.join(differences)}" if differences else ""
    print(
        f"{name} starts again{why}. What was finished is kept in {', '.join(places)}; `univigu run {name} "
        f"--resume-from {places[0]}` goes on from there.",
        file=sys.stderr,
    )
