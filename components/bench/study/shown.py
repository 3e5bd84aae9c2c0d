"""What the study's page shows of the reference arm beside its scores, read from the files in the arm's work roots."""

import base64
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.bench.study.arms import STEPS, Study
from components.bench.study.gallery import read_gallery
from components.bench.study.results import Evaluated
from components.bench.study.run import arm_root
from components.evaluation.confusion import count_confusions
from components.evaluation.report import line_chart
from components.evaluation.training_curves import ACCURACIES, read_training
from components.pipeline.stages import find_stage
from components.pipeline.tables import read_table

CONFUSED = "digit"  # the attribute of the confusion matrix
SAME, WRONG, MISSING = "same", "wrong", "missing"

Piece = tuple[str, str]  # SAME, WRONG or MISSING, and words


class Shown(NamedTuple):
    """Pictures and samples of the page; empty where the arm has none."""

    by_tau: Mapping[str, Any] | None = None  # a chart
    confusion: Mapping[str, Any] | None = None
    samples: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]] = {}  # by task, by rank


def read_shown(study: Study, budget: str, root: Path, evaluated: Sequence[Evaluated]) -> Shown:
    """What the page shows of the reference arm: of all its seeds, and samples of its first; empty if it hasn't run."""
    reference = next((one for one in evaluated if one.arm.name == study.reference), None)
    if reference is None:
        return Shown()
    folders = [arm_root(root, study, reference.arm, budget, seed) for seed in sorted(reference.tasks)]
    rows = [row for one in folders for row in read_table(one / find_stage(STEPS[-1]).home, "items").to_pylist()]
    heldout = [read_training(folder / find_stage(STEPS[-2]).home)["heldout"] for folder in folders]
    return Shown(accuracy_by_tau(heldout), count_confusions(rows, CONFUSED), group_samples(read_gallery(folders[0])))


def accuracy_by_tau(heldout: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The chart of the token accuracy by the text's time tau, with and without the video; None if it wasn't measured.

    heldout: for each seed, the contents of ``heldout.json``. Lines are means over seeds, bands are from the lowest to
    the highest.
    """
    lines, bands = {}, {}
    for label, name in ACCURACIES.items():
        runs = [one[name] for one in heldout if name in one and "tau" in one]
        if not runs:
            continue
        taus = next(one["tau"] for one in heldout if "tau" in one)
        bins = list(zip(*runs, strict=True))
        lines[label] = [(tau, sum(values) / len(values)) for tau, values in zip(taus, bins, strict=True)]
        if len(runs) > 1:
            bands[label] = [(tau, min(values), max(values)) for tau, values in zip(taus, bins, strict=True)]
    return line_chart("Share of held-out tokens right, by the text's time", "τ", lines, bands) if lines else None


def group_samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The samples of a gallery by task and rank, each with its video as a data URI, and captions with marked words."""
    samples: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        video = f"data:video/mp4;base64,{base64.b64encode(row['content']).decode()}"
        words = mark_words(row["true"], row["text"] or "") if row["true"] else []
        shown = {**row, "video": video, "words": words, "content": None}
        samples.setdefault(row["task"], {"best": [], "worst": []})[row["rank"]].append(shown)
    return samples


def mark_words(true: str, said: str) -> list[Piece]:
    """The words of a caption, marked against a true one: as there, wrong, or missing from it (Python's difflib)."""
    there, here = true.split(), said.split()
    pieces: list[Piece] = []
    for kind, at, to, begin, end in difflib.SequenceMatcher(None, there, here, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append((SAME, " ".join(here[begin:end])))
            continue
        pieces += [(WRONG, " ".join(here[begin:end]))] if end > begin else []
        pieces += [(MISSING, " ".join(there[at:to]))] if to > at else []
    return pieces
