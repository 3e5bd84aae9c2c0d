"""What `univigu evaluate` evaluates on: clips with reference captions, and prompts.

DATA is one of:

- a folder of videos, with a table ``metadata.jsonl``, ``.csv`` or ``.parquet``, or with a text beside each video;
- such a table itself, whose files are named relative to its folder. Several rows about one file are several references;
- a JSONL file of prompts alone, ``{"prompt": ...}``, for generation;
- a held-out set with a known truth, such as ``data/heldout.json``;
- a folder in the layout of a published benchmark (`benchmarks`).

Nothing is left out silently: a clip without a reference, or a row that can't be used, is an error.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from components.clips.import_files import find_fault, list_videos
from components.clips.import_texts import BESIDE, FILE, Fault, Names, read_sidecars, read_table
from components.evaluation.pairs import read_prompts
from components.pipeline.digests import json_digest
from components.prompts.filters import control_damage, repair, text_damage
from components.prompts.records import Broken, file_format, open_jsonl, parse, printable
from univigu.errors import BadInputError, MissingInputError

if TYPE_CHECKING:
    import numpy as np

WORLDS = {"digits": "components.digits.evaluation"}  # whose truth is known
LARGEST_SPECIFICATION = 64 << 20  # bytes of a JSON file
NAMED = 3  # faults in a message


@dataclass(frozen=True)
class Clip:
    """A clip to caption; `read` returns its frames, uint8 (F, H, W, 3), and raises `BadInputError` if it can't."""

    id: str
    references: tuple[str, ...]
    read: "Callable[[], np.ndarray]"
    seed: int = 0
    truth: Mapping[str, str] = field(default_factory=dict)  # by attribute


@dataclass(frozen=True)
class Prompt:
    """A prompt to generate from; `sample` is the number of the video among those of its prompt."""

    id: str
    text: str
    seed: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Dataset:
    """What a model is evaluated on; `world` knows the truth, and reads texts and videos, where there is one."""

    name: str
    sha256: str  # of the ids and texts
    clips: tuple[Clip, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    joint: tuple[Prompt, ...] = ()
    world: ModuleType | None = None
    # writes what the benchmark needs, where the data is that of a published one (`benchmarks`)
    benchmark: Any = None

    def first(self, count: int) -> "Dataset":
        """The first `count` clips and prompts of each kind."""
        parts = self.clips[:count], self.prompts[:count], self.joint[:count]
        return Dataset(self.name, self.sha256, *parts, self.world, self.benchmark)


def open_dataset(path: Path) -> Dataset:
    """The whole dataset at `path`; see the module for its kinds.

    Raises `MissingInputError` if there is nothing there, and `BadInputError` with the number of its faults and the
    first of them if it has any.
    """
    from components.evaluation.suite import benchmarks

    if path.is_dir():
        return benchmarks.open_benchmark(path) or _open_folder(path)
    if not path.is_file():
        raise MissingInputError(f"There is no folder or file '{path}' to evaluate on; check --data.")
    if path.suffix.lower() == ".json":
        return _open_world(path)
    form, _ = file_format(path.name)
    if not form:
        raise BadInputError(
            f"'{path}' is neither a folder nor a table; give a folder of videos with captions, a table that ends in "
            ".jsonl, .csv or .parquet, or a held-out set such as data/heldout.json."
        )
    if form == "jsonl" and _has_prompts_alone(path):
        prompts = tuple(Prompt(one["id"], one["prompt"], one["seed"]) for one in read_prompts(path))
        return Dataset(path.name, _digest([], prompts), prompts=prompts, joint=prompts)
    return _of_rows(path.name, path.parent, list_videos(path.parent)[0], read_table(path), whole=False)


def make_dataset(name: str, clips: Sequence[Clip], prompts: Sequence[Prompt], **more: Any) -> Dataset:
    """A dataset of these clips and prompts, which are also those of the joint task."""
    prompts = tuple(prompts)
    return Dataset(name, _digest(clips, prompts), tuple(clips), prompts, prompts, **more)


def read_clip(path: Path) -> "np.ndarray":
    """The frames of a video file, uint8 (F, H, W, 3)."""
    from univigu.video import MAX_FRAMES, read_video

    return read_video(path, MAX_FRAMES)[0]


def refuse(where: str, faults: Sequence[str], remedy: str) -> None:
    """Raise `BadInputError` that counts the faults and quotes the first ones; return if there are none."""
    if faults:
        named = "; ".join(printable(fault) for fault in faults[:NAMED]) + ("; ..." if faults[NAMED:] else "")
        raise BadInputError(f"{where} can't be evaluated on: {len(faults)} faults ({named}). {remedy}")


def _open_world(path: Path) -> Dataset:
    if path.stat().st_size > LARGEST_SPECIFICATION:
        raise BadInputError(f"'{path}' has more than {LARGEST_SPECIFICATION >> 20} MiB; give a held-out set.")
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["world"]
        world = import_module(WORLDS[name])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInputError(
            f"'{path}' is no held-out set of a known world ({', '.join(WORLDS)}); give one, or a folder or table of "
            "clips with captions."
        ) from error
    items = world.open_items(path)

    def render(item: Mapping[str, Any]) -> "np.ndarray":
        return world.render([item])[0]

    clips = tuple(
        Clip(one["id"], tuple(world.references(one)), partial(render, one), one["seed"], world.truth(one))
        for one in items["captions"]
    )
    prompts, joint = (
        tuple(Prompt(one["id"], one["prompt"], one["seed"]) for one in items[kind]) for kind in ("generations", "joint")
    )
    return Dataset(name, items["sha256"], clips, prompts, joint, world)


def _open_folder(folder: Path) -> Dataset:
    names, faults = list_videos(folder)
    refuse(f"'{folder}'", [f"'{name}': {why}" for name, (_, why) in faults.items()], "Correct or remove them.")
    table = next((folder / name for name in BESIDE if (folder / name).is_file()), None)
    rows: Iterable[tuple[str, Any]] = read_table(table) if table else read_sidecars(folder, names)
    return _of_rows(folder.name or str(folder), folder, names, rows, whole=True)


def _of_rows(name: str, folder: Path, videos: Sequence[str], rows: Iterable[tuple[str, Any]], whole: bool) -> Dataset:
    """A dataset of the rows of a table. whole: every video of the folder needs a row."""
    captions: dict[str, list[str]] = {}
    prompts: dict[str, str] = {}
    faults, names = [], Names(videos)
    for where, row in rows:
        found = row if isinstance(row, Broken | Fault) else names.find(row["file"])
        if isinstance(found, Broken | Fault):
            faults.append(f"{where}: {found.why if isinstance(found, Broken) else found.detail}")
            continue
        if fault := find_fault(folder, folder / found):
            faults.append(f"{where}: {fault[1]}")
            continue
        caption, prompt = repair(row["caption"]), repair(row["prompt"])
        damage = [kind for kind in (row["caption"], row["prompt"]) if control_damage(kind) or text_damage(repair(kind))]
        if damage or not (caption or prompt):
            faults.append(f"{where}: its text is {'damaged' if damage else 'empty'}")
            continue
        captions.setdefault(found, []).extend([caption] if caption else [])
        prompts.setdefault(found, prompt)
    if whole and not captions and not faults:
        raise MissingInputError(
            f"No video in '{folder}' has a reference: put NAME.txt beside NAME.mp4, or a metadata.jsonl with "
            'rows {"file_name": ..., "caption": ...} into the folder.'
        )
    missing = [video for video in videos if video not in captions] if whole else []
    missing += [video for video, texts in captions.items() if not texts and not prompts[video]]
    faults += [f"'{video}' has no reference" for video in missing]
    refuse(f"'{name}'", faults, "Correct them: no clip is left out silently.")
    clips = [
        Clip(video, tuple(dict.fromkeys(captions[video])), partial(read_clip, folder / video), number)
        for number, video in enumerate(sorted(captions))
        if captions[video]
    ]
    texts = dict.fromkeys(prompts[video] or captions[video][0] for video in sorted(captions))
    return make_dataset(name, clips, [Prompt(f"prompt-{n:04d}", text, n) for n, text in enumerate(texts)])


def _has_prompts_alone(path: Path) -> bool:
    """Whether the first row of a JSONL file names no file, and has a prompt."""
    first = next((parse(line) for _, line in open_jsonl(path)), None)
    return isinstance(first, Mapping) and "prompt" in first and not set(first) & set(FILE)


def _digest(clips: Sequence[Clip], prompts: Sequence[Prompt]) -> str:
    return json_digest([[[one.id, *one.references] for one in clips], [[one.id, one.text] for one in prompts]])
