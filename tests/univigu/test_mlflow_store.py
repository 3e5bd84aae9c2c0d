"""MLflow's store: created atomically, and its failures reported in one sentence without secrets."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import mlflow.exceptions
import pytest
import requests
import sqlalchemy.exc
from mlflow.store.db import utils

from univigu.errors import BadInputError, CorruptDataError, DiskFullError, TransientError
from univigu.mlflow_store import make_database, opened, short_timeouts, store_error, without_password, without_secrets

SERVER = "http://ann:s3cret@host:5000"


@pytest.mark.parametrize(
    "text",
    [
        "https://ann:{}@host/x",
        "mysql://ann:x'{}@host/x",
        "postgresql+psycopg2://ann:{}@host:5432/db?sslmode=require",
        "s3://AKIA:{}@bucket/models",
        "https://b.s3.example.com/x?X-Amz-Signature={}&X-Amz-Date=1",
        "https://host/x?access_token={}",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey={};EndpointSuffix=core",
        "Authorization: Bearer {}",
        "Authorization: Basic {}",
        "x-api-key: {}",
        '{{"secret_key": "{}"}}',
        "password = {}",
    ],
)
def test_a_secret_in_third_party_text_is_masked(text):
    secret = "Zm9vOmJhcg0123"
    assert secret not in without_secrets(f"it failed: {text.format(secret)} (403)")
    assert "***" in without_secrets(text.format(secret))


@pytest.mark.parametrize("prefix", ["ghp_", "hf_", "sk-", "glpat-", "AKIA"])
def test_a_token_is_recognised_by_its_format(prefix):
    token = prefix + "ABCDEFGH12345678" + ("" if prefix == "AKIA" else "abcdefgh")
    assert without_secrets(f"denied to {token}.") == "denied to ***."


def test_secrets_of_the_environment_are_masked(monkeypatch):
    for name in ("MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "CAPTION_API_KEY"):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
        assert without_secrets(f"sent value-of-{name.lower()}, and refused") == "sent ***, and refused"
    error_shown = store_error(mlflow.exceptions.MlflowException("bad token value-of-mlflow_tracking_token"), SERVER)
    assert "value-of" not in str(error_shown)
    assert "s3cret" not in str(error_shown)


def test_plain_texts_are_not_changed():
    for text in (
        "captions.mean 0.600 against version 1's 0.375 on the same 20 items",
        "models:/uni-vigu@champion in sqlite:////work/mlflow.db",
        "tokenizer: google/umt5-xxl, max_tokens=32, hf-internal-testing/tiny-random",
        "a" * 64,
    ):
        assert without_secrets(text) == text
    assert without_password("/work/mlruns") == "/work/mlruns"


@pytest.mark.parametrize(
    ("error", "kind", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError, 73, "The disk is full at"),
        (sqlite3.OperationalError("database or disk is full"), DiskFullError, 73, "The disk is full at"),
        (sqlite3.OperationalError("disk I/O error"), CorruptDataError, 74, "The disk fails at"),
        (sqlite3.OperationalError("attempt to write a readonly database"), BadInputError, 65, "can't be used"),
        (OSError(errno.EROFS, "Read-only file system"), BadInputError, 65, "can't be used"),
        (sqlite3.DatabaseError("file is not a database"), CorruptDataError, 74, "restore a backup of it"),
        (sqlite3.OperationalError("unable to open database file"), CorruptDataError, 74, "can't be opened"),
        (sqlite3.OperationalError("database is locked"), TransientError, 75, "does not answer"),
        (requests.exceptions.ConnectionError("refused"), TransientError, 75, "does not answer"),
    ],
)
def test_a_failing_store_is_reported_by_its_cause_even_if_wrapped(tmp_path, error, kind, code, message):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    wrapped = mlflow.exceptions.MlflowException("a page of SQL\n" * 50)
    wrapped.__cause__ = sqlalchemy.exc.OperationalError("INSERT", {}, error)
    wrapped.__cause__.__cause__ = error
    for one in (error, wrapped):
        error_shown = store_error(one, uri)
        assert (type(error_shown), error_shown.exit_code) == (kind, code)
        assert message in str(error_shown)
        assert "\n" not in str(error_shown)


KILLED = """
import os, signal, sys
from mlflow.store.db import utils
from univigu.mlflow_store import make_database

utils._upgrade_db = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # when some of the tables exist
make_database(sys.argv[1])
"""


@pytest.mark.slow
def test_a_database_is_created_completely_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "nowhere")  # a relative path is ignored: the migrations run
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert subprocess.run([sys.executable, "-c", KILLED, uri]).returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    with opened(uri):
        assert mlflow.MlflowClient().search_registered_models() == []
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def rows(path):
    """The schema of a database, and its rows without times."""
    with closing(sqlite3.connect(path)) as database:
        schema = sorted(database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall(), key=str)
        experiments = database.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        return schema, experiments, database.execute("SELECT * FROM alembic_version").fetchall()


def test_the_next_database_is_the_same_without_migrations(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []
    migrate = utils._upgrade_db
    monkeypatch.setattr(utils, "_upgrade_db", lambda engine: asked.append(engine) or migrate(engine))
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        make_database(f"sqlite:///{tmp_path / name / 'mlflow.db'}")
        found.append(rows(tmp_path / name / "mlflow.db"))
        assert found[-1][1] == [(0, "Default", str(tmp_path / name / "mlruns/0"))]
    assert len(asked) == 1
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]


def test_tables_that_can_not_be_kept_cost_no_database(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    make_database(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert rows(tmp_path / "mlflow.db")[1]
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_no_database_is_reported_and_kept(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(CorruptDataError, match="can't be read"), opened(f"sqlite:///{path}"):
        pass
    assert path.read_bytes() == b"not a database" * 100


def test_short_timeouts_keep_the_users_settings(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with short_timeouts():
        found = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
    assert found == ("77", "1")
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
