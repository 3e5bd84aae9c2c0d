"""`make architecture`: the rooms, the arrows between them, and the longest file and function, from the code itself.

A room is the library `univigu`, `dags`, `components`, or a folder directly below `components` with all in it. An
arrow goes from a room to another that it imports: at the top of a file, inside a function, or for types alone. The
order of the rooms is that of import-linter's layers in pyproject.toml.
"""

import ast
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grimp

REPO = Path(__file__).parents[1]
SOURCES = ("components", "model/univigu", "dags")
REPORT = REPO / "reports" / "architecture.json"


def main() -> None:
    """Write the report, and say what is in it."""
    report = describe()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{len(report['rooms'])} rooms, {len(report['arrows'])} arrows, {len(report['upward'])} upward, "
        f"{len(report['circles'])} circles; longest file {report['longest_files'][0]}, "
        f"longest function {report['longest_functions'][0]}"
    )


def describe() -> dict[str, Any]:
    """Everything that the report holds."""
    arrows = find_arrows()
    rooms = sorted({*arrows, *(target for targets in arrows.values() for target in targets)})
    floors = {room: floor for floor, layer in enumerate(_layers()) for room in layer}
    ranked = {room: floors.get(room, len(floors)) for room in rooms}  # the library is below all of them
    pairs = [(one, other) for one in rooms for other in arrows.get(one, ())]
    return {
        "rooms": rooms,
        "arrows": [f"{one} -> {other}" for one, other in pairs],
        "upward": [f"{one} -> {other}" for one, other in pairs if ranked[one] > ranked[other]],
        "circles": find_circles(arrows),
        "longest_files": _longest(_file_lines()),
        "longest_functions": _longest(_function_lines()),
    }


def room_of(module: str) -> str:
    """The room that a module is in."""
    top, *inner = module.split(".")
    return f"{top}/{inner[0]}" if top == "components" and inner and (REPO / top / inner[0]).is_dir() else top


def find_arrows() -> Mapping[str, Sequence[str]]:
    """Each room and the rooms that it imports."""
    sys.path[:0] = [] if str(REPO) in sys.path else [str(REPO)]  # `dags` is in no environment
    graph = grimp.build_graph("components", "univigu", "dags", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in sorted(graph.modules):
        used = {room_of(one) for one in graph.find_modules_directly_imported_by(module)}
        found.setdefault(room_of(module), set()).update(used)
    return {room: sorted(used - {room}) for room, used in found.items()}


def find_circles(arrows: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Groups of rooms each of which reaches every other one."""
    reached = {room: _reach(room, arrows) for room in arrows}
    groups = {tuple(sorted({room, *(one for one in reached[room] if room in reached[one])})) for room in arrows}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _reach(room: str, arrows: Mapping[str, Sequence[str]]) -> set[str]:
    reached: set[str] = set()
    ahead = [room]
    while ahead:
        new = set(arrows.get(ahead.pop(), ())) - reached
        reached |= new
        ahead += new
    return reached


def _layers() -> list[list[str]]:
    """The rooms of each floor, from the top; what is no folder belongs to `components` itself."""
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    inner = next(contract["layers"] for contract in contracts if contract.get("containers") == ["components"])
    floors = [[room_of(f"components.{room.strip()}") for room in layer.split("|")] for layer in inner]
    return [["dags"], *floors]


def _files() -> Iterator[Path]:
    for source in (*SOURCES, "tests"):
        yield from sorted((REPO / source).rglob("*.py"))


def _file_lines() -> Iterator[tuple[int, str]]:
    for file in _files():
        yield len(file.read_text().splitlines()), file.relative_to(REPO).as_posix()


def _function_lines() -> Iterator[tuple[int, str]]:
    for file in _files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{file.relative_to(REPO).as_posix()}:{node.name}"


def _longest(found: Iterator[tuple[int, str]], count: int = 10) -> list[list[Any]]:
    return [[lines, name] for lines, name in sorted(found, reverse=True)[:count]]


if __name__ == "__main__":
    main()
