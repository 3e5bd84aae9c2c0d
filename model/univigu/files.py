"""Files that must be whole: hashed, replaced at once, on the disk before anything names them, and bounded when read."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_JSON = 256 * 2**20  # bytes of a JSON file that is read as a whole: more is none of ours
LARGEST_YAML = 2**20  # bytes of a YAML file, which people write
DEEPEST_YAML = 50  # levels
MOST_YAML = 100_000  # values, those behind an alias counted where they are used


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):  # `hashlib.file_digest` needs Python 3.11
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises `OSError` where the file can't be read, and `ValueError` for anything that is no JSON of ours: damaged,
    not UTF-8, nested without end, or larger than `LARGEST_JSON`.
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

    Raises `OSError` where the file can't be read, and `ValueError`, in one line, for anything that isn't YAML as people
    write it: damaged, not UTF-8, larger than `LARGEST_YAML`, deeper than `DEEPEST_YAML`, or with aliases that stand for
    more than `MOST_YAML` values, or for themselves.
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
    """Before anything is built of it: the C parser's own limit is the stack."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind in ("MappingStartEvent", "SequenceStartEvent")
        depth -= kind in ("MappingEndEvent", "SequenceEndEvent")
        if depth > DEEPEST_YAML:
            raise ValueError(f"it is nested more than {DEEPEST_YAML} levels deep")


def _count_values(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias written out; a node that is being counted stands for itself."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias in it stands for itself")
        return known[id(node)]
    known[id(node)] = 0
    pairs = node.value if isinstance(node.value, list) else []
    inner = [one for pair in pairs for one in (pair if isinstance(pair, tuple) else (pair,))]
    known[id(node)] = count = 1 + sum(_count_values(one, known) for one in inner)
    if count > MOST_YAML:
        raise ValueError(f"its aliases stand for more than {MOST_YAML:,} values")
    return count


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once; it is on the disk when this returns."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    with replaced(path) as stream:
        stream.write(text.encode(errors="surrogatepass") + b"\n")  # as `json.loads` reads bytes


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes its place at once when the block ends well, and leaves nothing behind otherwise.

    A reader sees the old file or the new one, never half of it, also after a power cut.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Be sure that a file's bytes, or a folder's names, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't, for a folder
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
    """A `copy_function` of `shutil.copytree` that takes no room on the same disk, for files that nobody changes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
