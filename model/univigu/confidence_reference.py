"""The measures of held-out clips that a model carries, as ``confidence.json`` (see `univigu.confidence`).

It needs no torch, so a command can read it before it loads the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .errors import CorruptDataError
from .files import read_json_object, write_json

FILE = "confidence.json"
REGISTERED = ("pipeline", "evaluation")  # folders of a registered version: its model, and what measured it
RARE = 0.01  # the share of held-out clips that each measure would call unusual
MEASURES = ("confidence", "fidelity")
DECIMALS = 4


@dataclass(frozen=True)
class Reference:
    """The measures of held-out clips: their number, and of each measure the `RARE` quantile and the median."""

    clips: int
    least: Mapping[str, float]
    median: Mapping[str, float]


def read_reference(folder: Path) -> Reference | None:
    """The reference of the model in a folder; None where it has none.

    That of a registered version is beside it, as its evaluation wrote it. Raises `CorruptDataError` for a damaged file.
    """
    path = folder / FILE
    if not path.is_file() and folder.name == REGISTERED[0]:
        path = folder.with_name(REGISTERED[1]) / FILE
    if not path.is_file():
        return None
    try:
        values = read_json_object(path)
        least, median = ({name: float(values[key][name]) for name in values[key]} for key in ("least", "median"))
        return Reference(int(values["clips"]), least, median)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{path} can't be read ({error}); `univigu model calibrate` writes it again.") from error


def write_reference(folder: Path, measured: Sequence[Mapping[str, float | None]]) -> Reference:
    """Write the reference of the model in a folder, from the measures of each held-out clip (`measure`)."""
    known = {name: [v for one in measured if (v := one.get(name)) is not None] for name in MEASURES}
    least, median = (
        {name: round(float(np.quantile(values, share)), DECIMALS) for name, values in known.items() if values}
        for share in (RARE, 0.5)
    )
    reference = Reference(len(measured), least, median)
    write_json(folder / FILE, asdict(reference))
    return reference
