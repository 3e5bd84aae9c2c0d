"""How a good input becomes an odd one: by its bytes, and by its values where it is JSON or YAML."""

import json
import random
from collections.abc import Callable
from typing import Any

_SHARDS = (
    b"",
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\n",
    b'"',
    b"{",
    b"[",
    b"\xed\xa0\x80",
    b",",
)
_JUNK = (
    None,
    True,
    "",
    0,
    -1,
    2**31,
    2**63,
    2**64,
    1e308,
    float("nan"),
    float("inf"),
    "x",
    [],
    {},
    [[]],
    "\ud800",
    "../..",
)
_JUNK += ("a" * 10_000, "\x00", "/", "%s", "NaN", {"": None}, [None], -0.0, "1", "é", "stop", {"text": "a red one"})

Mutation = Callable[[random.Random, bytes], bytes]


def of_bytes(drawn: random.Random, content: bytes) -> bytes:
    """One to eight changes: flipped, lost, repeated, moved and foreign bytes, or an end that is missing."""
    changed = bytearray(content)
    for _ in range(drawn.choice((1, 1, 1, 2, 3, 8))):
        drawn.choice(_CHANGES)(drawn, changed)
    return bytes(changed)


def of_values(dump: Callable[[Any], str]) -> Callable[[random.Random, bytes], bytes]:
    """A mutation of JSON bytes: one to four values are replaced, left out or repeated, then written by `dump`."""

    def mutate(drawn: random.Random, content: bytes) -> bytes:
        value = json.loads(content)
        for _ in range(drawn.choice((1, 1, 2, 4))):
            value = _change_value(drawn, value)
        return dump(value).encode("utf-8", "surrogatepass")

    return mutate


def either(*mutations: Mutation) -> Mutation:
    return lambda drawn, content: drawn.choice(mutations)(drawn, content)


def _flip(drawn: random.Random, changed: bytearray) -> None:
    if changed:
        changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)


def _overwrite(drawn: random.Random, changed: bytearray) -> None:
    start, shard = _place(drawn, changed), drawn.choice(_SHARDS)
    changed[start : start + len(shard)] = shard


def _insert(drawn: random.Random, changed: bytearray) -> None:
    start = _place(drawn, changed)
    changed[start:start] = drawn.choice(_SHARDS) * drawn.choice((1, 1, 4, 300))


def _cut(drawn: random.Random, changed: bytearray) -> None:
    del changed[_place(drawn, changed) :]


def _lose(drawn: random.Random, changed: bytearray) -> None:
    start = _place(drawn, changed)
    del changed[start : start + drawn.choice((1, 4, 100))]


def _repeat(drawn: random.Random, changed: bytearray) -> None:
    start, target = _place(drawn, changed), _place(drawn, changed)
    changed[target:target] = changed[start : start + drawn.choice((1, 8, 512))]


def _place(drawn: random.Random, changed: bytearray) -> int:
    """Often near the beginning, where headers are."""
    return drawn.randint(0, min(len(changed), drawn.choice((32, 512, len(changed)))))


_CHANGES = (_flip, _flip, _overwrite, _insert, _cut, _lose, _repeat)


def _change_value(drawn: random.Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or drawn.random() < 0.05:
        return drawn.choice(_JUNK)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, action = drawn.choice(list(keys)), drawn.random()
    changed = dict(value) if isinstance(value, dict) else list(value)
    if action < 0.1:
        del changed[key]
    elif action < 0.15 and isinstance(changed, list):
        changed.insert(key, value[key])
    elif action < 0.15:
        changed[f"{key}x"] = value[key]
    else:
        changed[key] = _change_value(drawn, value[key])
    return changed
