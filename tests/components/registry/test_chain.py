"""The ledger's hash chain finds what was done to its lines in MLflow's database, behind MLflow's back."""

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest

from components.registry import chain, ledger, promotion
from components.tracking import tracking_uri
from univigu.errors import ConfigError, GateFailedError, MissingInputError, TransientError

NAME = "chained"
LINES = 6


def make_key(path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public = path.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path, public


@pytest.fixture(scope="module")
def kept(versions, tmp_path_factory):
    """A ledger of six lines, one of them a refusal, signed and mirrored; the database's file and the mirror."""
    folder = tmp_path_factory.mktemp("keys")
    key, public = make_key(folder / "ledger.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(chain.KEY, str(key))
        patch.setenv(chain.MIRROR, str(folder / "mirror"))
        for right in (10, 30, 5, 38):
            versions.add(NAME, right)
        promotion.promote(NAME, 1, "the first", root=versions.root)
        promotion.promote(NAME, 2, "better", root=versions.root)
        with pytest.raises(GateFailedError):
            promotion.promote(NAME, 3, "no better", root=versions.root)
        promotion.rollback(NAME, "to see", root=versions.root)
        promotion.rollback(NAME, "back again", root=versions.root)
        promotion.promote(NAME, 4, "best", root=versions.root)
    return versions.root, public, folder / "mirror"


@pytest.fixture
def copy(kept, tmp_path, monkeypatch):
    """A copy of that ledger to tamper with: its root; without the key and the mirror."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(kept[0] / "mlflow.db", root / "mlflow.db")
    for name in (chain.KEY, chain.PUBLIC_KEY, chain.MIRROR):
        monkeypatch.delenv(name, raising=False)
    return root


def verify(root, name=NAME):
    return ledger.verify_ledger(name, root)


def change(root, *statements):
    """Change the database by SQL; returns the last statement's rows."""
    with sqlite3.connect(root / "mlflow.db") as database:
        for statement, values in statements:
            rows = database.execute(statement, values).fetchall()
    database.close()
    return rows


def line_ids(root):
    """The run of each line, by number."""
    lines = (
        "SELECT value, run_uuid FROM params p JOIN runs USING (run_uuid) JOIN experiments e USING (experiment_id) "
        "WHERE p.key = 'number' AND e.name = ?"
    )
    rows = change(root, (lines, (f"{NAME}/promotions",)))
    return {int(number): run for number, run in rows}


@pytest.mark.slow
def test_an_untouched_ledger_is_whole_signed_and_mirrored(kept, monkeypatch):
    root, public, mirror = kept
    monkeypatch.setenv(chain.PUBLIC_KEY, str(public))
    monkeypatch.setenv(chain.MIRROR, str(mirror))
    assert verify(root) == chain.Verified(LINES, 0, LINES, LINES, [])
    assert len(list(mirror.iterdir())) == LINES
    assert json.loads(min(mirror.iterdir()).read_text())["params"]["why"] == "the first"


def tamper(root, kind, choice):
    """One of many ways to falsify a ledger."""
    ids = line_ids(root)
    number = choice.randint(1, LINES)
    run = ids[number]
    if kind == "changed":
        keys = [
            row[0]
            for row in change(
                root, ("SELECT key FROM params WHERE run_uuid = ? AND key NOT IN ('digest', 'signature')", (run,))
            )
        ]
        change(
            root,
            (
                "UPDATE params SET value = value || ? WHERE run_uuid = ? AND key = ?",
                (choice.choice("x0 "), run, choice.choice(keys)),
            ),
        )
    elif kind == "score":
        scored = [n for n in ids if change(root, ("SELECT key FROM latest_metrics WHERE run_uuid = ?", (ids[n],)))]
        run = ids[choice.choice(scored)]
        for table in ("metrics", "latest_metrics"):
            change(root, (f"UPDATE {table} SET value = value + 0.01 WHERE run_uuid = ?", (run,)))
    elif kind == "removed":
        change(root, ("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (run,)))
    elif kind == "back-dated":
        days = choice.randint(1, 400)
        change(root, ("UPDATE runs SET start_time = start_time - ? WHERE run_uuid = ?", (days * 86_400_000, run)))
    elif kind == "forged":
        forge(root, run, choice.choice(["same", "next"]))
    else:  # the newest lines, one by one
        for gone in range(number, LINES + 1):
            change(root, ("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (ids[gone],)))


def forge(root, run, place):
    """Write a line through MLflow, with a chain of its own, as someone with a client can."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(root))
    experiment = client.get_experiment_by_name(f"{NAME}/promotions").experiment_id
    runs = [one for one in client.search_runs([experiment]) if one.data.params]
    facts = {key: value for key, value in client.get_run(run).data.params.items() if key not in ("digest", "signature")}
    if place == "next":
        facts |= {"number": str(len(runs) + 1), "previous": "0" * 64}
    facts |= {"who": "somebody else"}
    forged = client.create_run(experiment).info.run_id
    for key, value in {**facts, "digest": chain.line_digest(facts, {})}.items():
        client.log_param(forged, key, value)
    client.set_terminated(forged)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["changed", "score", "removed", "back-dated", "forged", "newest"])
def test_falsified_lines_are_found_without_key_and_mirror(copy, kind):
    untouched = (copy / "mlflow.db").read_bytes()
    choice = random.Random(kind)
    for _ in range(4 if kind == "forged" else 20):
        tamper(copy, kind, choice)
        assert verify(copy).faults, kind
        (copy / "mlflow.db").write_bytes(untouched)
    assert not verify(copy).faults


def rewrite(root):
    """Change a line and compute the rest of the chain anew, with the tag: as someone with the whole database can."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(root))
    previous = None
    for number, run in sorted(line_ids(root).items()):
        found = client.get_run(run)
        params = dict(found.data.params) | ({"who": "somebody else"} if number == 3 else {})
        params |= {"previous": previous} if previous and number > 3 else {}
        previous = chain.line_digest(params, found.data.metrics)
        params |= {"digest": previous}
        for key, value in params.items():
            change(root, ("UPDATE params SET value = ? WHERE run_uuid = ? AND key = ?", (value, run, key)))
    client.set_registered_model_tag(NAME, chain.HEAD_TAG, f"{LINES} {previous}")


@pytest.mark.slow
def test_a_chain_that_was_computed_anew_is_found_by_its_signatures_and_by_the_mirror(copy, kept, monkeypatch, tmp_path):
    rewrite(copy)
    assert not verify(copy).faults
    monkeypatch.setenv(chain.PUBLIC_KEY, str(kept[1]))
    found = verify(copy)
    assert found.signed == 2
    assert [fault.what for fault in found.faults] == [f"line {n} is not signed with this key" for n in (3, 4, 5, 6)]
    monkeypatch.delenv(chain.PUBLIC_KEY)
    monkeypatch.setenv(chain.MIRROR, str(kept[2]))
    found = verify(copy)
    assert found.mirrored == 2
    assert len(found.faults) == 8
    monkeypatch.setenv(chain.PUBLIC_KEY, str(make_key(tmp_path / "other.pem")[1]))
    assert "no line is signed with this key" in {fault.what for fault in verify(copy).faults}


@pytest.mark.slow
def test_the_command_names_what_is_wrong_and_ends_with_its_code(copy):
    command = [
        sys.executable,
        "-m",
        "components.cli.main",
        "model",
        "history",
        "--verify",
        "--name",
        NAME,
        "--root",
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{LINES} lines; 0 signed, 0 in the mirror\n"), done.stderr
    change(copy, ("UPDATE params SET value = 'nobody' WHERE run_uuid = ? AND key = 'who'", (line_ids(copy)[2],)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 74
    assert "line 2 was changed" in done.stdout
    assert done.stderr.startswith(f"univigu: The history of '{NAME}' is not what was written: line 2 was changed")


def test_older_lines_without_a_number_are_covered_by_the_first_that_has_one(versions, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(chain, "next_link", lambda *_: {})
        versions.add("older", 10)
        promotion.promote("older", 1, "before there was a chain", root=versions.root)
    versions.add("older", 30)
    promotion.promote("older", 2, "after", root=versions.root)
    found = verify(versions.root, "older")
    assert (found.lines, found.older, found.faults) == (1, 1, [])
    (_, old) = promotion.history("older", root=versions.root)
    change(versions.root, ("UPDATE params SET value = 'x' WHERE run_uuid = ? AND key = 'why'", (old.id,)))
    assert "a line before line 1 was added, changed or removed" in [
        f.what for f in verify(versions.root, "older").faults
    ]


def test_a_clock_that_jumps_back_leaves_no_fault(versions, monkeypatch):
    versions.add("jumping", 10)
    promotion.promote("jumping", 1, "the first", root=versions.root)

    class Earlier(chain.datetime):
        @classmethod
        def now(cls, zone=None):
            return chain.datetime.fromtimestamp(time.time() - 300, zone)

    versions.add("jumping", 30)
    with monkeypatch.context() as patch:
        patch.setattr(chain, "datetime", Earlier)
        promotion.promote("jumping", 2, "better", root=versions.root)
    assert verify(versions.root, "jumping").faults == []


def test_a_mirror_that_can_not_be_written_stops_the_decision(versions, monkeypatch, tmp_path):
    versions.add("unmirrored", 10)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(chain.MIRROR, str(tmp_path / "file/mirror"))
    with pytest.raises(TransientError, match="mirror UNIVIGU_LEDGER_MIRROR can't be written"):
        promotion.promote("unmirrored", 1, "the first", root=versions.root)
    assert versions.aliases("unmirrored") == (None, None)
    monkeypatch.setenv(chain.MIRROR, str(tmp_path / "mirror"))
    promotion.promote("unmirrored", 1, "the first", root=versions.root)  # the next holder completes the decision
    assert versions.aliases("unmirrored")[0] == 1
    assert verify(versions.root, "unmirrored").faults == []


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [(None, MissingInputError, "can't be read"), ("no key", ConfigError, "holds no key in PEM")],
)
def test_a_key_that_is_none_is_one_sentence(versions, monkeypatch, tmp_path, content, error, message):
    versions.add("unsigned", 10)
    if content:
        (tmp_path / "key.pem").write_text(content)
    monkeypatch.setenv(chain.KEY, str(tmp_path / "key.pem"))
    with pytest.raises(error, match=message):
        promotion.promote("unsigned", 1, "the first", root=versions.root)
    assert promotion.history("unsigned", root=versions.root) == []
