"""Reading and writing files safely: hashed, replaced atomically, synced to disk, and with limits when read."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_JSON = 256 * 2**20  # bytes of a JSON file that is read as a whole: none of ours is larger
LARGEST_YAML = 2**20  # bytes of a YAML file, which is written by hand
DEEPEST_YAML = 50  # levels
MOST_YAML = 100_000  # values; those of an alias count each time it is used


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):  # `hashlib.file_digest` needs Python 3.11
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises `OSError` where the file can't be read, and `ValueError` for invalid JSON: damaged, not UTF-8, nested too
    deeply, or larger than `LARGEST_JSON`.
    """
    with path.open("rb") as stream:
        content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"{path} is larger than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises as `read_json` does, and `ValueError` where it holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_yaml(path: Path) -> Any:
    """The value in a YAML file of one document; raises as `read_yaml_documents` does."""
    documents = read_yaml_documents(path)
    if len(documents) > 1:
        raise ValueError("it holds more than one document")
    return documents[0] if documents else None


def read_yaml_documents(path: Path) -> list[Any]:
    """The values in a YAML file, of plain types.

    Raises `OSError` where the file can't be read, and `ValueError`, with a message of one line, for invalid YAML:
    damaged, not UTF-8, larger than `LARGEST_YAML`, deeper than `DEEPEST_YAML`, or with aliases that expand to more than
    `MOST_YAML` values or contain themselves.
    """
    with path.open("rb") as stream:
        return _parse_documents(stream.read(LARGEST_YAML + 1))


def parse_yaml(text: str) -> Any:
    """The value in a YAML text; raises `ValueError` as `read_yaml` does."""
    documents = _parse_documents(text.encode(errors="surrogatepass"))
    if len(documents) > 1:
        raise ValueError("it holds more than one document")
    return documents[0] if documents else None


def _parse_documents(content: bytes) -> list[Any]:
    if len(content) > LARGEST_YAML:
        raise ValueError(f"it is larger than {LARGEST_YAML >> 20} MiB")
    import yaml

    try:
        text = content.decode("utf-8-sig")
        _require_shallow(yaml.parse(text, yaml.CSafeLoader))
        loader, documents = yaml.CSafeLoader(text), []
        while loader.check_node():
            node = loader.get_node()
            _count_values(node, {})
            documents.append(loader.construct_document(node))
        return documents
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from error


def _require_shallow(events: Iterable[Any]) -> None:
    """Raise `ValueError` for deep nesting, before values are built: the C parser's only limit is the stack."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind in ("MappingStartEvent", "SequenceStartEvent")
        depth -= kind in ("MappingEndEvent", "SequenceEndEvent")
        if depth > DEEPEST_YAML:
            raise ValueError(f"it is nested more than {DEEPEST_YAML} levels deep")


def _count_values(node: Any, known: dict[int, int]) -> int:
    """The number of values in a node, with aliases expanded; `known` has 0 for a node whose count is in progress."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias in it contains itself")
        return known[id(node)]
    known[id(node)] = 0
    pairs = node.value if isinstance(node.value, list) else []
    inner = [one for pair in pairs for one in (pair if isinstance(pair, tuple) else (pair,))]
    known[id(node)] = count = 1 + sum(_count_values(one, known) for one in inner)
    if count > MOST_YAML:
        raise ValueError(f"its aliases expand to more than {MOST_YAML:,} values")
    return count


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; it is on the disk when this returns."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    with replaced(path) as stream:
        stream.write(text.encode(errors="surrogatepass") + b"\n")  # `json.loads` decodes bytes the same way


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces `path` atomically if the block succeeds, and is removed otherwise.

    A reader sees the old file or the new one, never a part of it, even after a power failure.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)  # the name that the user knows
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't sync a folder
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything below a folder, and the folder itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A `copy_function` for `shutil.copytree` that makes hard links on the same disk; for files that never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
