"""MLflow's store: selecting it, creating its database, and turning its failures into errors without credentials."""

import fcntl
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from univigu.errors import BadInputError, CorruptDataError, TransientError, UniViGUError, storage_fault
from univigu.extras import import_extra
from univigu.files import sync
from univigu.user_cache import keep, read_kept

Uri = str | None

_QUIET = {  # no telemetry, no pickles, nothing taken from the current folder
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # would add a uv.lock from the current folder to the model
}
_TABLES = "mlflow-tables.db"  # in the user's cache
_SILENT = ("mlflow.store.db.utils", "sqlalchemy.pool")  # they log a traceback for every exception that they raise
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|(?:API|ACCESS)_?KEY", re.I)
_SECRETS = (  # patterns of secrets in an address, a header or a setting, and their replacements
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
    # tokens of GitHub, GitLab, Hugging Face, OpenAI and AWS
    (re.compile(r"\b(?:gh[opusr]_|github_pat_|glpat-|hf_|sk-)[\w-]{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "***"),
)
_SHORTEST_SECRET = 6  # characters: a shorter one would match parts of ordinary words
_REFUSED_LOGIN = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_REFUSED = ("ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")


@contextmanager
def opened(tracking_uri: Uri) -> Iterator[str]:
    """Within the block, MLflow uses `tracking_uri` (None: its current store); yields the address of the store.

    The store is checked first, and an SQLite database is created if it is missing. Raises an error of `store_error`
    where the store fails, here or within the block.
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
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow writes the store there, as if the user had set it
            if chosen is not None:
                os.environ["MLFLOW_TRACKING_URI"] = chosen


@contextmanager
def first_contact(uri: str) -> Iterator[None]:
    """The first calls to a store: with short timeouts, and any exception turned into one of `store_error`."""
    try:
        make_database(uri)
        with short_timeouts():
            yield
    except UniViGUError:
        raise
    except Exception as error:
        raise store_error(error, uri) from error


def quiet_mlflow():
    """Import `mlflow` without telemetry, pickles and the log lines that repeat its exceptions."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import_extra("mlflow")
    import mlflow  # again, for its types

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Let MLflow give up on a server after seconds instead of minutes, unless the user has set its timeouts."""
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
    """Create the SQLite database of `uri` atomically, if there is none.

    MLflow creates its tables in some 50 migrations, and can't use a database whose migrations were interrupted. So they
    run in a temporary file, which is renamed when it is complete. The empty tables are kept for the user's next ones.
    """
    path = database_file(uri)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_made(path):
        return
    partial = path.with_name(f".{path.name}.partial")
    with _locked(path.parent):
        if _is_made(path):  # another process has created it in the meantime
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
    """Whether the database exists; raises SQLite's error where it can't be read, which MLflow retries for minutes."""
    if not path.is_file() or not path.stat().st_size:  # SQLite creates an empty file first
        return False
    with closing(sqlite3.connect(path)) as database:
        return bool(database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _migrate(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service.utils import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.version import VERSION

    stamp = f"MLflow {VERSION}".encode()
    if tables := read_kept(_TABLES, stamp):
        path.write_bytes(tables)
    store = SqlAlchemyStore(f"sqlite:///{path}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    store.engine.dispose()
    if not tables:
        with suppress(OSError, sqlite3.Error):  # of the copy; the database is complete
            keep(_TABLES, stamp, _empty_tables(path))


def _empty_tables(path: Path) -> bytes:
    """A new database without MLflow's default experiment, whose folder depends on where it was created."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        with closing(sqlite3.connect(copy)) as database, database:
            database.execute("DELETE FROM experiments")
        return copy.read_bytes()


def _remove_database(path: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on this folder; on a file system without locks there is no protection."""
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
    """Turn exceptions of MLflow, its database, its HTTP client and the disk into errors of `store_error`."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, RequestException) as error:
        raise store_error(error, uri) from error
    except OSError as error:  # from files that MLflow copies
        if fault := _storage_fault(error, uri):
            raise fault from error
        raise


def store_error(error: Exception, uri: str) -> UniViGUError:
    """The error for a store that failed: because of its disk, its database or the login, or because it is down."""
    place, reason = without_password(uri), _reason(error)
    if fault := _storage_fault(error, uri):
        return fault
    code = getattr(error, "error_code", "")
    if code in _REFUSED_LOGIN:
        return BadInputError(
            f"MLflow's store at {place} refused the login ({reason}); check MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if code == "PERMISSION_DENIED":
        return BadInputError(
            f"MLflow's store at {place} doesn't allow this to the account of MLFLOW_TRACKING_USERNAME ({reason}); use "
            f"one that may, or ask the server's administrator."
        )
    if code in _REFUSED:
        return BadInputError(
            f"MLflow's store at {place} refused a request ({reason}); check that it is an MLflow server of this "
            f"version, and run the command again."
        )
    if _is_damaged(error) or "out-of-date database schema" in reason:
        return CorruptDataError(
            f"MLflow's database {place} can't be read ({reason}); restore a backup of it, or move it away and run "
            f"`univigu run register-model`, which creates a new one."
        )
    if database_file(uri) and "unable to open database file" in reason:  # SQLite's only message for a failing disk
        return CorruptDataError(
            f"MLflow's database {place} can't be opened ({reason}); check that its folder is writable and has free "
            f"space, and run the command again."
        )
    return TransientError(
        f"MLflow's store at {place} does not answer ({reason}); start it, or set MLFLOW_TRACKING_URI, and run the "
        "command again."
    )


def _storage_fault(error: Exception, uri: str) -> UniViGUError | None:
    """The error for a failing disk, under the database (which hides the reason) or under the files of MLflow."""
    path = database_file(uri)
    if path is None:
        return storage_fault(error, Path(without_password(uri)))
    if _is_of_database(error):
        try:
            _try_to_write(path)
        except OSError as cause:
            return storage_fault(OSError(cause.errno, cause.strerror), path)  # the error has the database's path
    return storage_fault(error, path)


def _try_to_write(path: Path) -> None:
    """Write a file beside the database, and open the database, so that a failing disk raises its own error."""
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
    """Whether SQLite can't read the file; subclasses of these two exceptions mean that it is busy or missing."""
    from sqlalchemy.exc import DatabaseError

    return any(type(one) in (DatabaseError, sqlite3.DatabaseError) for one in _chain(error))


def _reason(error: BaseException) -> str:
    """The first line of the root cause: the messages of MLflow and requests repeat the whole query."""
    *_, cause = _chain(error)
    lines = str(cause).splitlines()
    return without_secrets(lines[0] if lines else type(cause).__name__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# --- without a login -------------------------------------------------------------------------------------------------


def without_login(uri: str) -> str:
    """The address of an MLflow server without its login, which is moved to the variables that MLflow reads.

    MLflow's own messages and logs repeat complete addresses.
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
    """The address of a store for messages and logs: secrets are replaced by asterisks."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return without_secrets(make_url(uri).render_as_string(hide_password=True))
    except (ArgumentError, ValueError):  # not a URL: a folder, or a keyword of MLflow's
        return without_secrets(uri.rpartition("@")[2])


def without_secrets(text: str) -> str:
    """A third-party text in which logins, tokens and keys are replaced by asterisks."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
