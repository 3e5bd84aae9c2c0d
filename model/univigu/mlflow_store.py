"""MLflow's store: pointing at it, making its database, and what its failures mean, in one sentence without a login."""

import fcntl
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from univigu.errors import BadInputError, CorruptDataError, TransientError, UniViGUError, storage_fault
from univigu.files import sync

Uri = str | None

_QUIET = {  # MLflow calls nobody, unpickles nothing, and leaves the folder that a command runs in alone
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # would put a uv.lock of that folder into the model
}
_SILENT = ("mlflow.store.db.utils", "sqlalchemy.pool")  # log the whole traceback of what they raise
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|(?:API|ACCESS)_?KEY", re.I)
_SECRETS = (  # in an address, a header or a setting, and what stands in their place
    (re.compile(r"(?<=://)[^/\s\"]*@"), "***@"),
    (
        re.compile(r"([?&;][^=&\s]*(?:token|key|secret|password|sig|signature|credential)[^=&\s]*=)[^&\s'\"]+", re.I),
        r"\1***",
    ),
    (
        re.compile(
            r"((?:token|password|passwd|secret|(?:api|access|account|secret)[_-]?key)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&]{6,}",
            re.I,
        ),
        r"\1***",
    ),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.I), r"\1 ***"),
    # what GitHub, GitLab, Hugging Face, OpenAI and AWS issue
    (re.compile(r"\b(?:gh[opusr]_|github_pat_|glpat-|hf_|sk-)[\w-]{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "***"),
)
_SHORTEST_SECRET = 6  # characters: of a shorter one, too many words would have a part
_REFUSED_LOGIN = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
_REFUSED = ("ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")


@contextmanager
def opened(tracking_uri: Uri) -> Iterator[str]:
    """MLflow pointed at `tracking_uri` (None: where it points already), which answers; yields its address.

    A database that is not there is made. Raises what `store_error` says where the store fails, now or within the block.
    """
    mlflow = quiet_mlflow()
    before, chosen = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    if tracking_uri is not None:
        mlflow.set_tracking_uri(without_login(tracking_uri))
    try:
        uri = mlflow.get_tracking_uri()
        with first_contact(uri):
            mlflow.MlflowClient().search_registered_models(max_results=1)
        with explained(uri):
            yield uri
    finally:
        if tracking_uri is not None:
            mlflow.set_tracking_uri(before)
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow notes the store there, as if the user had chosen it
            if chosen is not None:
                os.environ["MLFLOW_TRACKING_URI"] = chosen


@contextmanager
def first_contact(uri: str) -> Iterator[None]:
    """The first calls of a store, with short timeouts; `explained`, whatever its database driver or client raises."""
    try:
        make_database(uri)
        with short_timeouts():
            yield
    except UniViGUError:
        raise
    except Exception as error:
        raise store_error(error, uri) from error


def quiet_mlflow():
    """The module `mlflow`: it calls nobody, unpickles nothing, and says nothing that an error says too."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Let MLflow give up on a server within seconds, not minutes, where the user has not said how patient to be."""
    changed = {name: value for name, value in _PATIENCE.items() if name not in os.environ}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)


# --- its database ----------------------------------------------------------------------------------------------------


def database_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for a server, or a database without a file."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return None
    if not url.drivername.startswith("sqlite") or not url.database or url.database.startswith((":", "file:")):
        return None
    return Path(url.database).absolute()


def make_database(uri: str) -> None:
    """Make the SQLite database that `uri` names where there is none: whole, or not at all.

    MLflow creates its tables by some 50 migrations, and can't go on with what a process that was killed among them
    leaves; so they are made in a file beside, which takes its place when it is finished.
    """
    path = database_file(uri)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_made(path):
        return
    partial = path.with_name(f".{path.name}.partial")
    with _locked(path.parent):
        if _is_made(path):  # by another process, meanwhile
            return
        _remove_database(partial)
        try:
            _migrate(partial)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            _remove_database(partial)


def _is_made(path: Path) -> bool:
    """Whether a database is there; raises SQLite's error where it can't be read, which MLflow tries for minutes."""
    if not path.is_file() or not path.stat().st_size:  # SQLite makes an empty file before anything else
        return False
    with closing(sqlite3.connect(path)) as database:
        return bool(database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _migrate(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service.utils import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH

    store = SqlAlchemyStore(f"sqlite:///{path}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    store.engine.dispose()


def _remove_database(path: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only process that makes a database in this folder; on a file system without locks, hope so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# --- what its failures mean ------------------------------------------------------------------------------------------


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database, its HTTP client or the disk raise into what `store_error` says of it."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, RequestException) as error:
        raise store_error(error, uri) from error
    except OSError as error:  # of files that MLflow copies
        if fault := _storage_fault(error, uri):
            raise fault from error
        raise


def store_error(error: Exception, uri: str) -> UniViGUError:
    """What to tell people of a store that failed: its disk, its database, the login, or that it is not there."""
    place, reason = without_password(uri), _reason(error)
    if fault := _storage_fault(error, uri):
        return fault
    code = getattr(error, "error_code", "")
    if code in _REFUSED_LOGIN:
        return BadInputError(
            f"MLflow's store at {place} refuses the login ({reason}); check MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if code in _REFUSED:
        return BadInputError(
            f"MLflow's store at {place} refuses what it was asked ({reason}); check that it is an MLflow server of "
            f"this version, and run again."
        )
    if _is_damaged(error) or "out-of-date database schema" in reason:
        return CorruptDataError(
            f"MLflow's database {place} can't be read ({reason}); put back a copy of it, or move it away and run "
            f"`univigu run register-model`, which begins a new one."
        )
    if database_file(uri) and "unable to open database file" in reason:  # SQLite says no more of a disk that fails
        return CorruptDataError(
            f"MLflow's database {place} can't be opened ({reason}); check that its folder can be written to and has "
            f"room, and run again."
        )
    return TransientError(
        f"MLflow's store at {place} does not answer ({reason}); start it, or set MLFLOW_TRACKING_URI, and run again."
    )


def _storage_fault(error: Exception, uri: str) -> UniViGUError | None:
    """A failing disk: of the database, which hides why it can't be opened, or of the files that MLflow writes."""
    path = database_file(uri)
    if path is None:
        return storage_fault(error, Path(without_password(uri)))
    if _is_of_database(error):
        try:
            _try_to_write(path)
        except OSError as cause:
            return storage_fault(OSError(cause.errno, cause.strerror), path)  # which names the database
    return storage_fault(error, path)


def _try_to_write(path: Path) -> None:
    """Write beside a database, and open it, to see what the disk says."""
    with tempfile.TemporaryFile(dir=path.parent) as stream:
        stream.write(bytes(2**16))
        stream.flush()
        os.fsync(stream.fileno())
    if path.exists():
        with path.open("r+b"):
            pass


def _is_of_database(error: BaseException) -> bool:
    from sqlalchemy.exc import SQLAlchemyError

    return any(isinstance(one, SQLAlchemyError | sqlite3.Error) for one in _chain(error))


def _is_damaged(error: BaseException) -> bool:
    """Whether SQLite can't make sense of the file; the classes below these two say that it is busy, or not there."""
    from sqlalchemy.exc import DatabaseError

    return any(type(one) in (DatabaseError, sqlite3.DatabaseError) for one in _chain(error))


def _reason(error: BaseException) -> str:
    """The first cause's first line: MLflow's and requests' own words repeat the whole query."""
    *_, cause = _chain(error)
    lines = str(cause).splitlines()
    return without_secrets(lines[0] if lines else type(cause).__name__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# --- without a login -------------------------------------------------------------------------------------------------


def without_login(uri: str) -> str:
    """The address of an MLflow server without the login in it, which goes to the variables that MLflow reads it from.

    MLflow's own messages and logs repeat whole addresses.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if os.environ.get("MLFLOW_TRACKING_URI") == uri:
        os.environ["MLFLOW_TRACKING_URI"] = bare
    return bare


def without_password(uri: str) -> str:
    """The address of a store as messages and logs may have it: with asterisks in the place of what is secret."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return without_secrets(make_url(uri).render_as_string(hide_password=True))
    except (ArgumentError, ValueError):  # no URL: a folder, or a word that MLflow knows
        return without_secrets(uri.rpartition("@")[2])


def without_secrets(text: str) -> str:
    """A text that others wrote, with asterisks in the place of logins, tokens and keys."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text
