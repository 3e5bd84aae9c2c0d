"""Back up and restore what MLflow and Airflow keep: a dump of the database, and the files of an S3 bucket.

    python backup.py connection FOLDER          write FOLDER/pg_service.conf from the address in DATABASE_URI
    python backup.py finish BACKUPS             copy the artifacts, and turn BACKUPS/next into a finished backup
    python backup.py verify BACKUPS NAME        check a backup's files, without changing anything
    python backup.py artifacts BACKUPS NAME     put the artifacts of a backup into the bucket again

`database.sh` makes and restores the dump, with the tools of PostgreSQL's own image; this needs Python and boto3, which
the image of MLflow has. The dump is made first: each file that it refers to is then in the bucket, and newer files do
no harm.

BACKUPS/TIME/ holds ``database.dump`` and ``manifest.json``: the size and SHA-256 of the dump and of each artifact.
Artifacts are in BACKUPS/objects under their SHA-256, once for all backups. A backup without a manifest is not finished.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

DUMP, MANIFEST, OBJECTS, NEXT = "database.dump", "manifest.json", "objects", "next"
BLOCK = 2**20


def main(arguments):
    """Run a command; a failure prints one sentence, and the exit code is 1."""
    commands = {"connection": connection, "finish": finish, "verify": verify, "artifacts": restore_artifacts}
    if not arguments or arguments[0] not in commands:
        sys.exit(__doc__)
    try:
        commands[arguments[0]](*(Path(one) if number == 0 else one for number, one in enumerate(arguments[1:])))
    except BackupError as error:
        sys.exit(f"backup: {error}")


class BackupError(Exception):
    """Something that the user must change; the message says what."""


def connection(folder):
    """Write a service file for libpq, so that no password is on a command line (PostgreSQL 17, libpq-pgservice)."""
    parts = urlsplit(os.environ.get("DATABASE_URI", ""))
    if parts.scheme.partition("+")[0] not in ("postgresql", "postgres") or not parts.hostname:
        raise BackupError(
            "DATABASE_URI is not the address of a PostgreSQL database; use postgresql://USER:PASSWORD@HOST/DATABASE."
        )
    facts = {
        "host": parts.hostname,
        "port": str(parts.port or 5432),
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
        "dbname": unquote(parts.path.lstrip("/")),
        **dict(parse_qsl(parts.query)),
    }
    if any("\n" in value for value in facts.values()):
        raise BackupError("DATABASE_URI has a line break in one of its parts.")
    lines = [f"{name}={value}\n" for name, value in facts.items() if value]
    path = folder / "pg_service.conf"
    path.touch(mode=0o600)
    path.write_text("[univigu]\n" + "".join(lines), encoding="utf-8")


def finish(backups):
    """Copy the artifacts that have changed, write the manifest of BACKUPS/next, and rename it to the present time."""
    folder = backups / NEXT
    if not (folder / DUMP).is_file():
        raise BackupError(f"There is no {folder / DUMP}; run `database.sh dump` first.")
    past = finished(backups)
    known = read_manifest(backups, past[-1])["artifacts"] if past else {}
    manifest = {
        "database": describe(folder / DUMP),
        "artifacts": dict(copy_artifacts(backups, known)) if has_artifacts() else {},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    for path in (folder / DUMP, folder / MANIFEST, folder, backups):
        sync(path)
    folder.rename(backups / name)
    sync(backups)
    prune(backups, int(os.environ.get("BACKUPS_KEPT", "14")))
    size = sum(one["size"] for one in manifest["artifacts"].values()) + manifest["database"]["size"]
    print(f"{name}: a database and {len(manifest['artifacts'])} artifacts, {size} bytes")


def verify(backups, name):
    """Raise `BackupError` unless the dump and each artifact of a backup have the digests that its manifest says."""
    manifest = read_manifest(backups, name)
    files = {backups / name / DUMP: manifest["database"]}
    files |= {object_path(backups, kept["sha256"]): kept for kept in manifest["artifacts"].values()}
    for path, kept in files.items():
        if not path.is_file() or describe(path) != {key: kept[key] for key in ("size", "sha256")}:
            raise BackupError(
                f"{path} is missing or damaged, so nothing was restored; choose another of {finished(backups)}."
            )
    print(f"{name}: {len(files)} files are intact")


def restore_artifacts(backups, name):
    """Upload the artifacts that the bucket lacks, or has with another content; what is newer than the backup stays."""
    manifest = read_manifest(backups, name)
    client, bucket, prefix = open_bucket()
    there = dict(list_bucket(client, bucket, prefix))
    restored = 0
    for key, kept in manifest["artifacts"].items():
        if there.get(key) == (kept["size"], kept["etag"]):
            continue
        client.upload_file(str(object_path(backups, kept["sha256"])), bucket, key)
        restored += 1
    print(f"{name}: {restored} of {len(manifest['artifacts'])} artifacts were missing or changed, and are restored")


# --- artifacts -------------------------------------------------------------------------------------------------------


def has_artifacts():
    """Whether this backup has a bucket: Airflow's has none."""
    return bool(os.environ.get("MLFLOW_ARTIFACTS_DESTINATION")) and os.environ.get("ARTIFACTS_ELSEWHERE") != "1"


def open_bucket():
    """boto3's client, the bucket and the prefix of MLFLOW_ARTIFACTS_DESTINATION."""
    import boto3

    parts = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"])
    if parts.scheme != "s3":
        raise BackupError(
            f"MLFLOW_ARTIFACTS_DESTINATION is {parts.scheme}://, and only s3:// is copied; set ARTIFACTS_ELSEWHERE=1 "
            "if that bucket has backups of its own."
        )
    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None)
    return client, parts.netloc, parts.path.lstrip("/")


def list_bucket(client, bucket, prefix):
    """(key, (size, ETag)) of each object; S3 changes the ETag whenever it changes the content."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", []):
            yield found["Key"], (found["Size"], found["ETag"].strip('"'))


def copy_artifacts(backups, known):
    """Copy each object whose size or ETag is not that in the manifest `known`; yields (key, facts) of all objects."""
    client, bucket, prefix = open_bucket()
    (backups / OBJECTS).mkdir(exist_ok=True)
    for key, (size, etag) in list_bucket(client, bucket, prefix):
        kept = known.get(key)
        if not (kept and (kept["size"], kept["etag"]) == (size, etag) and has_object(backups, kept)):
            with tempfile.NamedTemporaryFile(dir=backups / OBJECTS, prefix=".", delete=False) as stream:
                try:
                    client.download_fileobj(bucket, key, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                    kept = describe(Path(stream.name))
                    target = object_path(backups, kept["sha256"])
                    target.parent.mkdir(exist_ok=True)
                    os.replace(stream.name, target)
                except BaseException:
                    Path(stream.name).unlink(missing_ok=True)
                    raise
            sync(target.parent)
        yield key, {"size": kept["size"], "sha256": kept["sha256"], "etag": etag}


def object_path(backups, sha256):
    return backups / OBJECTS / sha256[:2] / sha256


def has_object(backups, kept):
    path = object_path(backups, kept["sha256"])
    return path.is_file() and path.stat().st_size == kept["size"]


# --- backups ---------------------------------------------------------------------------------------------------------


def finished(backups):
    """The names of the finished backups, oldest first."""
    return sorted(path.parent.name for path in backups.glob(f"2*/{MANIFEST}"))


def read_manifest(backups, name):
    if name not in finished(backups):
        raise BackupError(
            f"There is no finished backup '{name}' in {backups}; there are {finished(backups) or 'none'}."
        )
    return json.loads((backups / name / MANIFEST).read_text(encoding="utf-8"))


def prune(backups, kept):
    """Delete all but the newest `kept` backups, and the artifacts that none of these has."""
    for name in finished(backups)[: -max(kept, 1)]:
        (backups / name / MANIFEST).unlink()
        shutil.rmtree(backups / name)
    used = {one["sha256"] for name in finished(backups) for one in read_manifest(backups, name)["artifacts"].values()}
    for path in (backups / OBJECTS).rglob("*"):
        if path.is_file() and path.name not in used:
            path.unlink()


def describe(path):
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def sync(path):
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1:])
