"""The project's own modules as syntax trees, read without importing them, reduced to what affects behaviour."""

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from components.pipeline.digests import json_digest

PACKAGES = ("components", "univigu")  # the project's own; a step's own module counts in any package
MOVED = {  # a place as code names it now -> its former name, from which keys were first made
    "'components.captions'": "'components'",
    "'components.prompts'": "'components'",
    "components/captions/captioners": "components/captioners",
}
_WITH_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)  # no expression has an import statement in it
AT_IMPORT = ""  # names the statements that define nothing and run when the module is imported
_LONGEST_NAME = 100  # characters of a string that may name a data file


class Body(NamedTuple):
    """The code of a definition, and what the imports inside it bind."""

    trees: Sequence[ast.AST]
    imports: Mapping[str, str]
    texts: Collection[str]  # strings in it that may be a data file's name
    names: Collection[tuple[str, ...]]  # what it names: ("a", "b", "c") for ``a.b.c``
    digest: str


class Source(NamedTuple):
    """A module's file, read once. Imports map a local name to what it refers to: ``numpy``, ``univigu.flow:euler``."""

    path: Path
    bodies: Mapping[str, Body]
    imports: Mapping[str, str]
    exports: Mapping[str, str]  # name -> module, in a package that imports its names lazily


@lru_cache(maxsize=4096)
def read_source(module: str) -> Source | None:
    """A module, read without importing it; None if it has no file. Cached for the time of one fingerprint."""
    file = _file(module)
    if file is None:
        return None
    facts = file.stat()
    return _parse(file, module, facts.st_mtime_ns, facts.st_size)


def find_source(module: str) -> Source:
    """A module that must exist; raises `LookupError` otherwise."""
    source = read_source(module)
    if source is None:
        raise LookupError(f"there is no module '{module}'")
    return source


def _file(module: str) -> Path | None:
    top, *parts = module.split(".")
    home = _home(top)
    if home is None or (parts and home.name != "__init__.py"):
        return None
    place = home.parent.joinpath(*parts)
    files = (place / "__init__.py", place.with_suffix(".py")) if parts else (home,)
    return next((file for file in files if file.is_file()), None)


def _home(top: str) -> Path | None:
    try:
        spec = find_spec(top)
    except ValueError:  # the main program
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@lru_cache(maxsize=1024)
def _parse(path: Path, module: str, _modified: int, _size: int) -> Source:
    tree = ast.parse(path.read_bytes())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    imports = _imports([node for node in tree.body if not _is_definition(node)], package)
    exports = _exports(tree)
    found: dict[str, list[ast.AST]] = {}
    for node in tree.body:
        cleaned = node if _is_definition(node) else _BehaviourOnly().visit(node)
        for statement in cleaned if isinstance(cleaned, list) else [cleaned] if cleaned else []:
            for name in _bound(statement) or [AT_IMPORT]:
                found.setdefault(name, []).append(statement)
    return Source(path, _Bodies(found, package), imports, exports)


class _Bodies(Mapping[str, Body]):
    """The bodies of a module's names, each reduced when it is first looked at: most are never reached."""

    def __init__(self, statements: Mapping[str, Sequence[ast.AST]], package: str) -> None:
        self._statements, self._package = statements, package
        self._reduced: dict[str, Body] = {}

    def __getitem__(self, name: str) -> Body:
        if name not in self._reduced:
            self._reduced[name] = self._reduce(self._statements[name])
        return self._reduced[name]

    def __contains__(self, name: object) -> bool:
        return name in self._statements

    def __iter__(self) -> Iterator[str]:
        return iter(self._statements)

    def __len__(self) -> int:
        return len(self._statements)

    def _reduce(self, statements: Sequence[ast.AST]) -> Body:
        inner = _imports(filter(_is_definition, statements), self._package)
        trees = [_BehaviourOnly().visit(node) if _is_definition(node) else node for node in statements]
        names, texts = _names_and_texts(trees)
        return Body(trees, inner, texts, names, json_digest([_dump(tree) for tree in trees]))


def _dump(tree: ast.AST) -> str:
    """A tree as text with the former names of moved places, so that moving them changes no key."""
    text = ast.dump(tree)
    for place, former in MOVED.items():
        text = text.replace(place, former)
    return text


def _is_definition(node: ast.AST) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _bound(node: ast.AST) -> list[str]:
    """The names that a top-level statement of a module defines."""
    if _is_definition(node):
        return [node.name]
    if isinstance(node, ast.Assign):
        names = [one for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        return [one.id for one in names if isinstance(one.ctx, ast.Store)]
    return []


def _imports(nodes: Iterable[ast.AST], package: str) -> dict[str, str]:
    """What the import statements in `nodes` bind, without those for type checkers."""
    found: dict[str, str] = {}
    ahead = list(nodes)
    while ahead:
        node = ahead.pop(0)
        if isinstance(node, ast.If) and _is_for_type_checkers(node):
            ahead += node.orelse
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                ours = origin.partition(".")[0] in (*PACKAGES, package.partition(".")[0])
                found[alias.asname or alias.name] = inner if ours and _file(inner) else f"{origin}:{alias.name}"
        else:
            ahead += (child for child in ast.iter_child_nodes(node) if isinstance(child, _WITH_STATEMENTS))
    return found


def _exports(tree: ast.Module) -> dict[str, str]:
    """The names that a package imports lazily: those in a table of strings beside `__getattr__`."""
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
        return {}
    return table_of_texts(tree.body)


def table_of_texts(statements: Iterable[ast.AST]) -> dict[str, str]:
    """The entries of all dictionaries from strings to strings that the statements assign."""
    tables = [node.value for node in statements if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    return {
        name.value: value.value
        for table in tables
        for name, value in zip(table.keys, table.values, strict=True)
        if isinstance(name, ast.Constant) and isinstance(value, ast.Constant)
        if isinstance(name.value, str) and isinstance(value.value, str)
    }


# --- reducing a tree --------------------------------------------------------------------------------------------------


def dotted(node: ast.AST) -> list[str]:
    """The parts of ``a.b.c``, or an empty list for any other node."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _names_and_texts(trees: Sequence[ast.AST]) -> tuple[set[tuple[str, ...]], set[str]]:
    """What the trees name, and the strings in them that may be a file's name."""
    names: set[tuple[str, ...]] = set()
    texts: set[str] = set()
    ahead = [*trees]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and _may_name_a_file(node.value):
                texts.add(node.value)
        elif chain := dotted(node):
            names.add(tuple(chain))
        else:
            ahead += ast.iter_child_nodes(node)
    return names, texts


def _may_name_a_file(text: str) -> bool:
    return 1 < len(text) < _LONGEST_NAME and text.isprintable() and not text.startswith((".", "/"))


def _is_for_type_checkers(node: ast.If) -> bool:
    return dotted(node.test)[-1:] == ["TYPE_CHECKING"]


class _BehaviourOnly(ast.NodeTransformer):
    """Removes docstrings and annotations, which have no effect, and imports, whose names are followed instead."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            # pyrefly: ignore[missing-attribute]
            node.body = [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: Any) -> Any:
        given = node.args
        node.returns = node.type_comment = None
        for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if one:
                one.annotation = one.type_comment = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        fields = {id(child) for child in node.body if isinstance(child, ast.AnnAssign)}  # a dataclass reads them
        body = [child if id(child) in fields else self.visit(child) for child in node.body]
        node.body = [child for child in body if child is not None] or [ast.Pass()]
        node.decorator_list = [self.visit(one) for one in node.decorator_list]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        value = node.value and self.visit(node.value)
        return value and ast.Assign([self.visit(node.target)], value, None)

    def visit_If(self, node: ast.If) -> Any:
        if not _is_for_type_checkers(node):
            return self.generic_visit(node)
        kept = [self.visit(child) for child in node.orelse]
        return [child for child in kept if child is not None] or None

    def visit_Expr(self, node: ast.Expr) -> Any:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> Any:
        node.kind = None
        return node

    def visit_Import(self, node: ast.AST) -> None:
        return None

    visit_ImportFrom = visit_Pass = visit_Import  # noqa: N815
