"""Answers to questions about a profile, computed once: a plan takes half a minute, most of it imports and counting.

An answer is in ``.univigu/plans`` under a digest of all that it depends on: the question, the profile, the base's
configs, all code of the project, and the versions of the libraries that are counted. Nothing heavy is imported for an
answer that is there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import univigu
from components.pipeline.state import STATE
from univigu.files import write_json

PLANS = "plans"
COUNTED = ("torch", "diffusers", "transformers", "deepspeed")


def remembered(kind: str, profile: Mapping[str, Any], root: Path, **question: Any) -> dict[str, Any]:
    """The plan of a ``kind``, training or inference, computed unless the same question was answered before.

    ``question`` are the arguments of `cost.make_plan` or `inference.make_inference_plan` besides profile and root.
    """
    asked = json.dumps([kind, profile, question], sort_keys=True, default=str)
    file = root / STATE / PLANS / f"{_digest(asked, profile, root)}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass  # not computed yet, or half written
    found = json.loads(json.dumps(_answer(kind, profile, root, question)))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    except OSError:
        pass  # a folder that can't be written to has its answers computed each time
    return found


def _answer(kind: str, profile: Mapping[str, Any], root: Path, question: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "training":
        from components.planning.cost import make_plan

        return make_plan(profile, root, **question)
    from components.planning.inference import make_inference_plan

    return make_inference_plan(profile, root, **question)


def _digest(asked: str, profile: Mapping[str, Any], root: Path) -> str:
    digest = hashlib.sha256(asked.encode())
    digest.update(" ".join(version(name) for name in COUNTED).encode())
    for path in _files(root / str(profile["base"])):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _files(base: Path) -> Iterator[Path]:
    """All code and its data, and the base's configs; without the base, the published ones are beside the code."""
    for package in (Path(str(univigu.__file__)).parent, Path(__file__).parents[1]):
        yield from sorted(path for path in package.rglob("*") if path.suffix in (".py", ".yaml", ".json"))
    yield from sorted(base.glob("*/config.json"))
