"""The promotion ledger as a hash chain: what was changed, forged, back-dated or removed is found.

Each line of the ledger has a ``number``, the digest of the line before it (``previous``), a time (``when``) and its own
``digest``: SHA-256 over all of these, the decision and its scores. The first number's ``previous`` is a digest of the
lines that were written before there was a chain. Times never decrease, also if the machine's clock jumps back. The
registered model's tag `HEAD_TAG` has the newest number and digest, so that newer lines are missed when they are gone.

Someone who may write to MLflow's database can compute a whole new chain. Two settings prevent that:

- ``UNIVIGU_LEDGER_KEY``: a PEM file with an Ed25519 private key (RFC 8032), with which each digest is signed;
- ``UNIVIGU_LEDGER_MIRROR``: a folder or an address such as ``s3://bucket/ledger``, which gets a file for each line.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from univigu.errors import ConfigError, MissingInputError, TransientError, first_line

KEY, PUBLIC_KEY, MIRROR = "UNIVIGU_LEDGER_KEY", "UNIVIGU_LEDGER_PUBLIC_KEY", "UNIVIGU_LEDGER_MIRROR"
HEAD_TAG = "univigu.ledger.head"
SLACK_S = 600.0  # between a run's start and its line: a decision takes less than a lease, and clocks differ a little
_UNCOVERED = {"digest", "signature"}
_FILE = re.compile(r"(\d{8})-([0-9a-f]{64})\.json")


class Head(NamedTuple):
    """The newest line: its number, digest and time; number 0 and the digest of the older lines where there is none."""

    number: int
    digest: str
    when: str


class Fault(NamedTuple):
    """What is wrong with the ledger, and where: the run's id, or "" for a line that is gone."""

    run_id: str
    what: str


class Verified(NamedTuple):
    """The lines that were examined, those of them with a valid signature and in the mirror, and what is wrong."""

    lines: int
    older: int  # without a number, from before there was a chain
    signed: int
    mirrored: int
    faults: list[Fault]


# --- writing ---------------------------------------------------------------------------------------------------------


def next_link(facts: Mapping[str, str], scores: Mapping[str, float], runs: Sequence[Any]) -> dict[str, str]:
    """The params that chain a line with these ``facts`` and ``scores`` to the ledger's ``runs``.

    Raises ConfigError for a key that can't be read.
    """
    head = find_head(runs)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    link = {"number": str(head.number + 1), "previous": head.digest, "when": max(now, head.when)}
    link |= {"clock": now} if now < head.when else {}  # which has jumped back since the last line
    digest = line_digest({**facts, **link}, scores)
    return {**link, "digest": digest, **({"signature": sign(digest, os.environ[KEY])} if os.environ.get(KEY) else {})}


def find_head(runs: Sequence[Any]) -> Head:
    """The newest line among the ledger's runs."""
    numbered = [run for run in runs if _number(run)]
    if not numbered:
        return Head(0, _older_digest(runs), "")
    newest = max(numbered, key=_number).data.params
    return Head(int(newest["number"]), newest.get("digest", ""), newest.get("when", ""))


def line_digest(params: Mapping[str, str], scores: Mapping[str, float]) -> str:
    """SHA-256 of a line: its params but the digest and the signature, and its scores."""
    covered = {name: value for name, value in params.items() if name not in _UNCOVERED}
    return _digest({"params": covered, "scores": {name: repr(float(value)) for name, value in scores.items()}})


def sign(digest: str, key: str) -> str:
    """The signature of a digest with the private key in the PEM file ``key``, in base64."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = _load(key, KEY, lambda content: load_pem_private_key(content, None), Ed25519PrivateKey)
    return base64.b64encode(private.sign(digest.encode())).decode()


def mirror(run: Any) -> None:
    """Write a line to the mirror, if there is one; raises `TransientError` if that fails."""
    place, params = os.environ.get(MIRROR), run.data.params
    if not place or not _number(run):
        return
    import fsspec

    content = {"run_id": run.info.run_id, "params": dict(params), "scores": dict(run.data.metrics)}
    try:
        files, folder = fsspec.url_to_fs(place)
        files.makedirs(folder, exist_ok=True)
        name = f"{folder}/{int(params['number']):08d}-{params['digest']}.json"
        files.pipe_file(name, json.dumps(content, sort_keys=True, ensure_ascii=False).encode())
    except Exception as error:
        raise TransientError(
            f"The ledger's mirror {MIRROR} can't be written ({first_line(error)}), so the decision is not carried out; "
            "try again."
        ) from error


# --- verifying -------------------------------------------------------------------------------------------------------


def verify(runs: Sequence[Any], head: str | None) -> Verified:
    """Examine the ledger's runs; ``head`` is the registered model's `HEAD_TAG`.

    Signatures are checked if ``UNIVIGU_LEDGER_PUBLIC_KEY`` or ``UNIVIGU_LEDGER_KEY`` names a key, and the mirror if
    ``UNIVIGU_LEDGER_MIRROR`` does. Raises ConfigError for a key, and `TransientError` for a mirror, that can't be read.
    """
    lines = sorted((run for run in runs if _number(run)), key=_number)
    older = [run for run in runs if not _number(run)]
    faults = [*_changed(lines), *_broken_order(lines, older), *_back_dated(lines), *_missing_newest(lines, head)]
    signed, unsigned = _check_signatures(lines)
    mirrored, unmirrored = _check_mirror(lines)
    return Verified(len(lines), len(older), signed, mirrored, [*faults, *unsigned, *unmirrored])


def _changed(lines: Sequence[Any]) -> Iterator[Fault]:
    for run in lines:
        if line_digest(run.data.params, run.data.metrics) != run.data.params.get("digest"):
            yield Fault(run.info.run_id, f"line {_number(run)} was changed: its content doesn't have its digest")


def _broken_order(lines: Sequence[Any], older: Sequence[Any]) -> Iterator[Fault]:
    before = Head(0, _older_digest(older), "")
    for run in lines:
        params, number = run.data.params, _number(run)
        if number == before.number:
            yield Fault(run.info.run_id, f"there are two lines {number}, so one is forged")
            continue
        missing = range(before.number + 1, number)
        for gone in missing:
            yield Fault("", f"line {gone} was removed")
        if not missing and params.get("previous") != before.digest:
            what = f"line {number} doesn't follow line {before.number}" if before.number else "a line before line 1 was"
            detail = ", so one of them is forged" if before.number else " added, changed or removed"
            yield Fault(run.info.run_id, what + detail)
        before = Head(number, params.get("digest", ""), params.get("when", ""))


def _back_dated(lines: Sequence[Any]) -> Iterator[Fault]:
    before = ""
    for run in lines:
        number, when = _number(run), run.data.params.get("when", "")
        clock, started = _parse(run.data.params.get("clock", when)), run.info.start_time or 0
        if when < before:
            yield Fault(run.info.run_id, f"line {number} is back-dated: it is older than the one before it")
        elif abs(clock - started / 1000) > SLACK_S:
            yield Fault(run.info.run_id, f"line {number} is dated {when}, and its run started at another time")
        before = max(before, when)


def _missing_newest(lines: Sequence[Any], head: str | None) -> Iterator[Fault]:
    last = _number(lines[-1]) if lines else 0
    number, _, digest = (head or "").partition(" ")
    known = int(number) if number.isdecimal() else 0
    if lines and not known:
        yield Fault("", f"the model's tag {HEAD_TAG} is gone, so the newest lines may be, too")
    for gone in range(last + 1, known + 1):
        yield Fault("", f"line {gone} was removed")
    found = next((run for run in lines if _number(run) == known), None)
    if found is not None and found.data.params.get("digest") != digest:
        yield Fault(found.info.run_id, f"line {known} is not the one that the model's tag names")


def _check_signatures(lines: Sequence[Any]) -> tuple[int, list[Fault]]:
    """How many lines have a valid signature, and those without one after the first that has one."""
    key = os.environ.get(PUBLIC_KEY) or os.environ.get(KEY)
    if not key:
        return 0, []
    public = _public_key(key)
    valid = [_is_signed(run.data.params, public) for run in lines]
    first = valid.index(True) if True in valid else len(lines)
    wrong = [
        run
        for run, good in zip(lines, valid, strict=True)
        if not good and (_number(run) > first or "signature" in run.data.params)
    ]
    if True not in valid and lines:
        return 0, [Fault("", "no line is signed with this key")]
    return sum(valid), [Fault(run.info.run_id, f"line {_number(run)} is not signed with this key") for run in wrong]


def _check_mirror(lines: Sequence[Any]) -> tuple[int, list[Fault]]:
    """How many lines are in the mirror, and those that are in one of the two places only."""
    place = os.environ.get(MIRROR)
    if not place:
        return 0, []
    import fsspec

    try:
        files, folder = fsspec.url_to_fs(place)
        names = files.ls(folder, detail=False) if files.isdir(folder) else []
    except Exception as error:
        raise TransientError(f"The ledger's mirror {MIRROR} can't be read ({first_line(error)}); try again.") from error
    kept = {(int(match[1]), match[2]) for name in names if (match := _FILE.fullmatch(str(name).rpartition("/")[2]))}
    here = {(_number(run), run.data.params.get("digest", "")): run.info.run_id for run in lines}
    first = min(kept, default=(len(lines) + 1, ""))[0]  # there may have been lines before there was a mirror
    faults = [
        Fault("", f"line {number} of the mirror is not in the ledger") for number, _ in sorted(kept - here.keys())
    ]
    faults += [
        Fault(here[line], f"line {line[0]} is not in the mirror")
        for line in sorted(here.keys() - kept)
        if line[0] >= first
    ]
    return len(kept & here.keys()), faults


# --- keys and digests ------------------------------------------------------------------------------------------------


def _is_signed(params: Mapping[str, str], public: Any) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(base64.b64decode(params.get("signature", ""), validate=True), params.get("digest", "").encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _public_key(path: str) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    def load(content: bytes) -> Any:
        return load_pem_private_key(content, None) if b"PRIVATE" in content else load_pem_public_key(content)

    key = _load(path, PUBLIC_KEY, load, Ed25519PrivateKey | Ed25519PublicKey)
    return key.public_key() if isinstance(key, Ed25519PrivateKey) else key


def _load(path: str, variable: str, load: Any, kind: Any) -> Any:
    try:
        key = load(Path(path).read_bytes())
    except OSError as error:
        raise MissingInputError(
            f"The key {path} ({variable}) can't be read ({error.strerror}); check the path."
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} ({variable}) holds no key in PEM without a password; make one with openssl."
        ) from error
    if not isinstance(key, kind):
        raise ConfigError(f"{path} ({variable}) is no Ed25519 key; make one with `openssl genpkey -algorithm ed25519`.")
    return key


def _older_digest(runs: Sequence[Any]) -> str:
    """A digest of the lines without a number, in no order."""
    lines = [
        {
            "run_id": run.info.run_id,
            "params": dict(run.data.params),
            "scores": {k: repr(v) for k, v in run.data.metrics.items()},
        }
        for run in runs
        if run.data.params and not _number(run)
    ]
    return _digest(sorted(lines, key=lambda line: line["run_id"]))


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _number(run: Any) -> int:
    number = run.data.params.get("number", "")
    return int(number) if number.isdecimal() and len(number) < 12 else 0


def _parse(when: str) -> float:
    try:
        return datetime.fromisoformat(when).timestamp()
    except ValueError:
        return 0.0
