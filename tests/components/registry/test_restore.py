"""What is in MLflow can be lost and restored: runs, versions, aliases, the ledger and artifacts, digest by digest."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from components.registry import ledger, promotion

SCRIPTS = Path(__file__).parents[3] / "infra/kustomize/backup/scripts"
BUCKET = "mlflow"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def tools():
    """The folder of PostgreSQL's programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(scope="module")
def postgresql():
    """The address of an empty database of a real PostgreSQL server."""
    if tools() is None:
        pytest.skip("restoring a database takes Debian's postgresql: apt-get install postgresql")
    home, port = Path(tempfile.mkdtemp()), free_port()  # pytest's own folders are closed to other users
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    if user:
        shutil.chown(home, user)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    (home / "password").write_text("a p@ss/word")
    (home / "password").chmod(0o644)
    data = home / "data"
    subprocess.run(
        [tools() / "initdb", "-D", data, "-U", "admin", "-A", "scram-sha-256", "--pwfile", home / "password", "-N"],
        check=True, capture_output=True, env=environment, cwd="/", user=user,
    )  # fmt: skip
    server = subprocess.Popen(
        [tools() / "postgres", "-D", data, "-p", str(port), "-k", "", "-h", "127.0.0.1", "-F"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd="/", user=user,
    )  # fmt: skip
    address = f"postgresql+psycopg2://%s:%s@127.0.0.1:{port}/%s"
    admin = address % ("admin", "a%20p%40ss%2Fword", "postgres")
    _until_ready(admin)
    # a user who owns the database and may do nothing else: PostgreSQL's image gives more, a managed database no more
    for command in ("CREATE ROLE mlflow LOGIN PASSWORD 'a p@ss/word'", "CREATE DATABASE mlflow OWNER mlflow"):
        execute(admin, command)
    yield address % ("mlflow", "a%20p%40ss%2Fword", "mlflow")
    server.send_signal(signal.SIGINT)  # doesn't wait for clients to leave
    server.wait()
    shutil.rmtree(home)


def execute(address, command):
    import sqlalchemy

    engine = sqlalchemy.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(sqlalchemy.text(command))
        rows = result.fetchall() if result.returns_rows else []
    engine.dispose()
    return rows


def empty(address):
    execute(address, "DROP SCHEMA public CASCADE")
    execute(address, "CREATE SCHEMA public AUTHORIZATION pg_database_owner")


def _until_ready(address):
    import sqlalchemy

    give_up = time.monotonic() + 120
    while True:
        try:
            return execute(address, "SELECT 1")
        except sqlalchemy.exc.OperationalError:
            assert time.monotonic() < give_up
            time.sleep(0.1)


@pytest.fixture
def bucket(monkeypatch):
    """boto3's client of an S3 server on this machine, with an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {**KEYS, "MLFLOW_S3_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=address)
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST"), timeout=10).close()
    client.create_bucket(Bucket=BUCKET)
    yield client
    server.stop()


class Backups:
    """The commands of the CronJob and of the restore's Job, as their containers run them."""

    def __init__(self, folder, address):
        self.folder, self.connection = folder / "backups", folder / "connection"
        self.folder.mkdir()
        self.connection.mkdir()
        self.env = {**os.environ, "DATABASE_URI": address, "PGSERVICEFILE": str(self.connection / "pg_service.conf")}
        self.env |= {"MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}", "PATH": f"{tools()}:{os.environ['PATH']}"}
        self.python("connection", self.connection)

    def run(self, *command):
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, cwd=self.folder)
        return done.returncode, done.stdout + done.stderr

    def python(self, *arguments, fails=False):
        code, said = self.run(sys.executable, SCRIPTS / "backup.py", *arguments)
        assert (code != 0) == fails, said
        return said

    def shell(self, *arguments, fails=False):
        code, said = self.run("sh", SCRIPTS / "database.sh", *arguments)
        assert (code != 0) == fails, said
        return said

    def make(self):
        self.shell("dump", self.folder)
        return self.python("finish", self.folder).partition(":")[0]

    def restore(self, name):
        self.python("verify", self.folder, name)
        said = self.python("artifacts", self.folder, name)
        self.shell("restore", self.folder, name)
        return said


def objects(client):
    """The SHA-256 of each object in the bucket."""
    listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    bodies = ((one["Key"], client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read()) for one in listed)
    return {key: hashlib.sha256(body).hexdigest() for key, body in bodies}


def recorded(address):
    """A digest of each table of the database, whatever the order of its rows."""
    tables = [name for (name,) in execute(address, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    rows = {name: sorted(repr(row) for row in execute(address, f'SELECT * FROM "{name}"')) for name in tables}
    return {name: (len(found), hashlib.sha256("\n".join(found).encode()).hexdigest()) for name, found in rows.items()}


@pytest.mark.slow
def test_runs_versions_aliases_ledger_and_artifacts_are_restored_digest_by_digest(
    versions, postgresql, bucket, tmp_path, monkeypatch
):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgresql)
    mlflow.set_tracking_uri(postgresql)
    mlflow.MlflowClient().create_experiment("uni-vigu", artifact_location=f"s3://{BUCKET}/1")
    here = type(versions)(tmp_path)
    here.add("kept", 10)
    promotion.promote("kept", 1, "the first", who="ann", root=tmp_path)
    here.add("kept", 30)
    promotion.promote("kept", 2, "better", who="bob", root=tmp_path)
    backups = Backups(tmp_path, postgresql)

    def state():
        return recorded(postgresql), objects(bucket), here.aliases("kept"), ledger.read_ledger("kept", tmp_path)

    before = state()
    assert (before[2], [line.who for line in before[3]]) == ((2, 1), ["bob", "ann"])
    assert len(before[1]) >= 4
    name = backups.make()
    # what a user, a bug and a thief may do
    promotion.rollback("kept", "by mistake", who="eve", root=tmp_path)
    execute(postgresql, "DELETE FROM params")
    execute(postgresql, "CREATE TABLE of_a_later_version (a int)")
    keys = sorted(before[1])
    bucket.delete_object(Bucket=BUCKET, Key=keys[0])
    bucket.put_object(Bucket=BUCKET, Key=keys[1], Body=b"something else")
    assert state() != before
    said = backups.restore(name)
    assert f"2 of {len(keys)} artifacts were missing or changed" in said
    assert state() == before

    # the restored registry is one that goes on: it can be written to, and backed up and restored again
    promotion.rollback("kept", "on purpose", who="ann", root=tmp_path)
    after = state()
    second = backups.make()
    backups.restore(name)
    assert state() == before
    backups.restore(second)
    assert state() == after


AIRFLOW = """
import sys
from airflow.models import Connection, Log, Variable, import_all_models
from airflow.models.base import Base
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

import_all_models()
engine = create_engine(sys.argv[1])
Base.metadata.create_all(engine)
with Session(engine) as session:
    session.add(Variable("univigu_approval", "required"))
    session.add(Connection("kubeflow", conn_type="http", host="ml-pipeline", extra='{"token": "kept secret"}'))
    session.add(Log("approve", owner="ada", extra="version 3"))
    session.commit()
"""


@pytest.mark.slow
def test_the_database_of_airflow_is_restored_digest_by_digest(postgresql, tmp_path):
    empty(postgresql)
    settings = {"AIRFLOW_HOME": str(tmp_path / "airflow"), "AIRFLOW__CORE__UNIT_TEST_MODE": "False"}
    made = subprocess.run(
        [sys.executable, "-c", AIRFLOW, postgresql],
        env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    backups = Backups(tmp_path, postgresql)
    del backups.env["MLFLOW_ARTIFACTS_DESTINATION"]
    before = recorded(postgresql)
    assert len(before) > 40
    assert [before[table][0] for table in ("variable", "connection", "log")] == [1, 1, 1]
    name = backups.make()
    execute(postgresql, "DELETE FROM log; DROP TABLE variable; UPDATE connection SET host = 'elsewhere'")
    backups.python("verify", backups.folder, name)
    backups.shell("restore", backups.folder, name)
    assert recorded(postgresql) == before


@pytest.fixture
def small(postgresql, bucket, tmp_path):
    """Backups of a database with one table, and of a bucket with three objects."""
    empty(postgresql)
    execute(postgresql, "CREATE TABLE numbers (n int); INSERT INTO numbers VALUES (1), (2)")
    for key, body in (("a", b"same"), ("b/c", b"same"), ("d", b"other")):
        bucket.put_object(Bucket=BUCKET, Key=key, Body=body)
    return Backups(tmp_path, postgresql)


def stored(backups):
    return sorted(path.name for path in (backups.folder / "objects").glob("*/*"))


@pytest.mark.slow
def test_an_artifact_is_kept_once_and_only_as_long_as_a_backup_has_it(small, bucket):
    small.env["BACKUPS_KEPT"] = "2"
    first = small.make()
    assert stored(small) == sorted({hashlib.sha256(body).hexdigest() for body in (b"same", b"other")})
    bucket.put_object(Bucket=BUCKET, Key="d", Body=b"newer")
    second = small.make()
    assert len(stored(small)) == 3
    third = small.make()
    assert sorted(path.name for path in small.folder.iterdir()) == [second, third, "objects"]
    assert hashlib.sha256(b"other").hexdigest() not in stored(small)
    assert f"no finished backup '{first}'" in small.python("verify", small.folder, first, fails=True)


def test_a_damaged_backup_is_refused_before_anything_is_changed(small, bucket, postgresql):
    name = small.make()
    manifest = json.loads((small.folder / name / "manifest.json").read_text())
    kept = small.folder / "objects" / manifest["artifacts"]["d"]["sha256"][:2] / manifest["artifacts"]["d"]["sha256"]
    for path in (small.folder / name / "database.dump", kept):
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1]):
            path.write_bytes(damaged)
            assert "is missing or damaged, so nothing was restored" in small.python(
                "verify", small.folder, name, fails=True
            )
        path.write_bytes(whole)
    small.python("verify", small.folder, name)


def test_a_restore_that_fails_in_the_middle_leaves_the_database_as_it_was(small, postgresql, tmp_path):
    name = small.make()
    execute(postgresql, "INSERT INTO numbers VALUES (3)")
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "pg_restore").write_text(f'#!/bin/sh\n{tools()}/pg_restore "$@" && echo "SELECT 1/0;"\n')
    (broken / "pg_restore").chmod(0o755)
    path = small.env["PATH"]
    small.env["PATH"] = f"{broken}:{path}"
    assert "division by zero" in small.shell("restore", small.folder, name, fails=True)
    assert execute(postgresql, "SELECT n FROM numbers ORDER BY n") == [(1,), (2,), (3,)]
    small.env["PATH"] = path
    small.shell("restore", small.folder, name)
    assert execute(postgresql, "SELECT n FROM numbers ORDER BY n") == [(1,), (2,)]


def test_an_unfinished_backup_counts_for_nothing_and_is_begun_anew(small):
    small.shell("dump", small.folder)
    assert "no finished backup 'next'" in small.python("verify", small.folder, "next", fails=True)
    small.env["MLFLOW_ARTIFACTS_DESTINATION"] = "gs://bucket"
    assert "set ARTIFACTS_ELSEWHERE=1" in small.python("finish", small.folder, fails=True)
    small.env["ARTIFACTS_ELSEWHERE"] = "1"
    name = small.make()
    assert json.loads((small.folder / name / "manifest.json").read_text())["artifacts"] == {}


def test_the_password_is_on_no_command_line_and_its_file_is_for_the_owner_alone(small):
    path = small.connection / "pg_service.conf"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "password=a p@ss/word\n" in path.read_text()
    for address in ("mysql://a:secret@b/c", "", "postgresql+psycopg2:///d"):
        small.env["DATABASE_URI"] = address
        said = small.python("connection", small.connection, fails=True)
        assert "is not the address of a PostgreSQL database" in said
        assert "secret" not in said
