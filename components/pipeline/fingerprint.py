"""Which code decides an output, identified by what it does rather than by how it is written.

The code of a step is every definition in the project's own packages that its function reaches by name, including
through imports inside functions. Each definition is digested as a syntax tree: comments, docstrings, formatting and
type annotations don't count. Neither does the module that a definition is in, so code can be moved. What a name refers
to does count. Data files that code names (a word list, a template) count by their content, YAML files by their values.

Code that runs steps without deciding what they write is left out (`MACHINERY`). The engine is part of it: `FORMAT`
represents it in every key, and is raised when the engine changes what an output contains.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from components.pipeline.digests import json_digest, tree_files
from components.pipeline.stages import Stage
from components.pipeline.syntax import AT_IMPORT, PACKAGES, Body, find_source, read_source, table_of_texts
from univigu.files import file_sha256

FORMAT = 1
MACHINERY = {
    "components.pipeline",  # runs steps
    "components.settings",  # types the parameters; the values are in the recipe
    "components.tracking",  # logs them
    "components.prompts.workers",  # distributes their work over processes
    "univigu.errors",  # error classes
    "univigu.extras",  # says which extra a missing package is in
    "univigu.files",  # reads and writes files
    "univigu.hardware",  # knows how fast a GPU is
    "univigu.threads",  # distributes CPU cores over threads
    "univigu.training.memory",  # how much memory a run needs
    "univigu.training.memory_looks",
    "univigu.training.meta_tensors",
    "univigu.training.memory_check",  # whether it fits
    "univigu.training.throughput",  # how fast it is
    "univigu.training.previews",  # what it shows while it runs
    "components.training.previews",
    "components.training.train_stage:check_memory",
}
_DIGITS = 16  # kept of each digest: a manifest lists hundreds


class Definition(NamedTuple):
    """A top-level name of a module (function, class or constant), `AT_IMPORT`, or None for the whole module."""

    module: str
    name: str | None


def fingerprint(entries: Iterable[str], chosen: Mapping[str, Collection[str]] | None = None) -> dict[str, str]:
    """The digest of every definition and data file behind `entries`, by ``module:name`` or path.

    entries: ``module:name``, or a module for all of it. chosen: for a folder of data files, by its name, which files
    count (without suffix) in addition to those that code names; of other folders all files count. The digests identify
    what the code does; the keys say where it is, for people. Raises `LookupError` for an unknown entry.
    """
    _forget()
    found: dict[str, str] = {}
    waiting = {_entry(entry) for entry in entries}
    packages = (*PACKAGES, *(entry.module.partition(".")[0] for entry in waiting))
    reached: set[Definition] = set()
    while waiting:
        new = {one for wanted in waiting for one in _expand(wanted, packages)} - reached
        reached |= new
        waiting = set()
        for one in new:
            uses = _uses(one, packages)
            means = [[name, _meaning(target, packages)] for name, target in sorted(uses.items())]
            found[f"{one.module}:{one.name}"] = json_digest([_body(one).digest, means])
            waiting |= {target for target in uses.values() if isinstance(target, Definition)}
    texts = {text for one in reached for text in _body(one).texts}
    files = {name: path for one in reached for name, path in _data_files(one, chosen or {}, texts)}
    return {**found, **{name: _content_digest(path) for name, path in files.items()}}


def stage_code(stage: Stage, profile: Mapping[str, Any], entries: Sequence[str] = ()) -> dict[str, str]:
    """The fingerprint of a step with a profile: its function and the plug-ins that the profile names.

    entries: the functions to start from instead of the step's own, for the fingerprint of a part of the step.
    """
    _forget()
    carried = [module for package in stage.carries for module in modules_of(package)]
    entries = [*(entries or (stage.function, *carried))]
    chosen: dict[str, list[str]] = {}
    for where, key in stage.plugins.items():
        names = named_in(profile, key)
        module, _, table = where.partition(":")
        if table:
            choices = table_of_texts(find_source(module).bodies[table].trees)
            entries += [choices[name] for name in names if name in choices]
        elif read_source(module):
            entries += [f"{module}.{name}" for name in names if read_source(f"{module}.{name}")]
        else:
            chosen[module.rpartition(".")[2]] = names
    return {name: digest[:_DIGITS] for name, digest in fingerprint(entries, chosen).items()}


def _forget() -> None:
    """Look at the files again: they may have changed since the last fingerprint."""
    read_source.cache_clear()
    _names_in.cache_clear()
    _meaning.cache_clear()


def modules_of(package: str) -> list[str]:
    """Every module of a package, including the package itself."""
    top = find_source(package).path.parent
    files = (path.relative_to(top).with_suffix("") for path in sorted(top.rglob("*.py")))
    return [".".join([package, *(part for part in file.parts if part != "__init__")]) for file in files]


def named_in(profile: Mapping[str, Any], key: str) -> list[str]:
    """The names that a profile has at ``section.key``: a single name, a list of names, or the keys of a table.

    An entry of a list may be a name with its settings. Entries of a table with the mode ``off`` are left out.
    """
    value: Any = profile
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return [name for name, settings in value.items() if not _is_off(settings)]
    entries = value if isinstance(value, list) else [] if value is None else [value]
    return [str(next(iter(entry), "")) if isinstance(entry, Mapping) else str(entry) for entry in entries]


def _is_off(settings: Any) -> bool:
    return isinstance(settings, Mapping) and settings.get("mode") in ("off", False)  # YAML reads a bare off as false


def code_digest(code: Mapping[str, str]) -> str:
    """One digest of a fingerprint; it doesn't depend on where the code is."""
    return json_digest([FORMAT, sorted(code.values())])


def changed_code(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Each file in which two fingerprints differ, with the definitions that differ; moved code is left out."""
    old, new = set(before.values()), set(now.values())
    names = {name for name, digest in now.items() if digest not in old}
    names |= {name for name, digest in before.items() if digest not in new}
    files: dict[str, list[str]] = {}
    for name in sorted(names):
        module, _, definition = name.partition(":")
        files.setdefault(_shown(module) if ":" in name else name, []).append(definition)
    return [f"{file} ({', '.join(filter(None, parts))})" if any(parts) else file for file, parts in files.items()]


def _shown(module: str) -> str:
    """The path of a module's file, relative to the checkout."""
    checkout, source = Path(__file__).parents[2], read_source(module)
    if source and source.path.is_relative_to(checkout):
        return source.path.relative_to(checkout).as_posix()
    return f"{module.replace('.', '/')}.py"


# --- which definitions ------------------------------------------------------------------------------------------------


def _entry(text: str) -> Definition:
    module, _, name = text.partition(":")
    return Definition(module, name or None)


def _is_ours(target: str, packages: Collection[str]) -> bool:
    module = target.partition(":")[0]
    return module.partition(".")[0] in packages and read_source(module) is not None


def _expand(wanted: Definition, packages: Collection[str]) -> Iterator[Definition]:
    """The definitions that a name refers to, and the code that importing their module runs, without `MACHINERY`."""
    module, name = wanted
    parents = _parents(module)
    if f"{module}:{name}" in MACHINERY or not MACHINERY.isdisjoint(parents):
        return
    source = read_source(module)
    if source is None:
        raise LookupError(f"there is no module '{module}' in the project")
    for one in parents:
        if (known := read_source(one)) and AT_IMPORT in known.bodies:
            yield Definition(one, AT_IMPORT)
    if name is None:
        yield from (Definition(module, one) for one in source.bodies)
    elif name in source.bodies:
        yield wanted
    elif name in source.imports:
        if _is_ours(source.imports[name], packages):
            yield from _expand(_entry(source.imports[name]), packages)
    elif name in source.exports:
        yield from _expand(Definition(source.exports[name], name), packages)
    elif not name.startswith("__"):
        raise LookupError(f"'{module}' has no '{name}'")


@cache
def _parents(module: str) -> tuple[str, ...]:
    """The packages that a module is in, from the outermost, and the module itself."""
    return tuple(accumulate(module.split("."), "{}.{}".format))


def _uses(one: Definition, packages: Collection[str]) -> dict[str, Definition | str]:
    """What the names in a definition refer to: a definition of the project, or something outside it."""
    source, body = find_source(one.module), _body(one)
    names = {**source.imports, **body.imports}
    found: dict[str, Definition | str] = {}
    for chain in body.names:
        if chain[0] in names:
            used, target = _follow(chain, names[chain[0]], packages)
            found[used] = target
        elif chain[0] in source.bodies:
            found[chain[0]] = Definition(one.module, chain[0])
    return found


def _follow(chain: Sequence[str], target: str, packages: Collection[str]) -> tuple[str, Definition | str]:
    """The part of ``a.b.c`` that names a definition, and that definition; `target` is what ``a`` refers to."""
    used = chain[0]
    if not _is_ours(target, packages):
        return used, target
    for part in chain[1:]:
        if ":" in target:
            break
        used = f"{used}.{part}"
        target = f"{target}.{part}" if read_source(f"{target}.{part}") else f"{target}:{part}"
    return used, _entry(target)


@cache
def _meaning(target: Definition | str, packages: Collection[str]) -> Any:
    """The digests of what a name refers to; they don't depend on where it is. Empty for a whole module."""
    if isinstance(target, str):
        return target
    return [_body(one).digest for one in _expand(target, packages)] if target.name else []


# --- data files -------------------------------------------------------------------------------------------------------


def _data_files(
    one: Definition, chosen: Mapping[str, Collection[str]], texts: Collection[str]
) -> Iterator[tuple[str, Path]]:
    """Data files that a definition names, or whose folder it names, beside its module or at the top of its package.

    Yields each file's name in the fingerprint and its path."""
    package = one.module.partition(".")[0]
    if package not in PACKAGES:
        return
    top = find_source(package).path.parent
    folders = dict.fromkeys((find_source(one.module).path.parent, top))
    named = ((folder, text) for text in _body(one).texts for folder in folders)
    for path in (folder / text for folder, text in named if text.partition("/")[0] in _names_in(folder)):
        if path.is_file() and path.suffix != ".py":
            yield f"{package}/{path.relative_to(top).as_posix()}", path
        elif path.is_dir() and path != top and path.name != "__pycache__" and not any(path.glob("*.py")):
            for file in tree_files(path):
                if path.name not in chosen or file.stem in {*chosen[path.name], *texts}:
                    yield f"{package}/{file.relative_to(top).as_posix()}", file


@cache
def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder))


def _content_digest(path: Path) -> str:
    if path.suffix not in (".yaml", ".yml"):
        return file_sha256(path)
    import yaml

    return json_digest(yaml.safe_load(path.read_text(encoding="utf-8")))


def _body(one: Definition) -> Body:
    return find_source(one.module).bodies[one.name or AT_IMPORT]
