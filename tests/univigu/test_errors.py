"""A failing disk is reported in one sentence, whichever library reports it."""

import errno
import sqlite3

import pytest

from univigu.errors import BadInputError, CorruptDataError, DiskFullError, storage_fault


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), DiskFullError, 73),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError, 73),
        (RuntimeError("I/O error: No space left on device (os error 28)"), DiskFullError, 73),
        (sqlite3.OperationalError("database or disk is full"), DiskFullError, 73),
        (OSError(errno.EIO, "Input/output error", "/data/x"), CorruptDataError, 74),
        (sqlite3.OperationalError("disk I/O error"), CorruptDataError, 74),
        (RuntimeError("I/O error: Input/output error (os error 5)"), CorruptDataError, 74),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), BadInputError, 65),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), BadInputError, 65),
        (RuntimeError("I/O error: Permission denied (os error 13)"), BadInputError, 65),
    ],
)
def test_a_failing_disk_has_its_own_message_and_exit_code(tmp_path, error, kind, code):
    fault = storage_fault(error, tmp_path)
    assert type(fault) is kind
    assert fault.exit_code == code
    assert ("/data/x" if getattr(error, "filename", None) else str(tmp_path)) in str(fault)


@pytest.mark.parametrize(("made", "kind"), [(True, CorruptDataError), (False, BadInputError)])
def test_a_read_only_database_in_a_writable_folder_is_a_failing_disk(tmp_path, made, kind):
    place = tmp_path / "mlflow.db"
    if made:
        place.write_bytes(b"")
    assert type(storage_fault(sqlite3.OperationalError("attempt to write a readonly database"), place)) is kind


def test_the_remedy_for_a_disk_that_can_not_be_written_is_another_one_and_no_change_of_permissions(tmp_path):
    for error, remedy in (
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "work in a copy"),
        (RuntimeError("Read-only file system (os error 30)"), "work in a copy"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "correct its permissions"),
        (RuntimeError("Permission denied (os error 13)"), "correct its permissions"),
    ):
        assert remedy in str(storage_fault(error, tmp_path))


def test_a_failing_disk_is_recognised_behind_a_librarys_exception(tmp_path):
    wrapped = RuntimeError("the store said no")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(storage_fault(wrapped, tmp_path), DiskFullError)


@pytest.mark.parametrize("error", [ValueError("shape mismatch"), KeyError("x"), FileNotFoundError(2, "gone", "/x")])
def test_other_errors_are_not_storage_faults(tmp_path, error):
    assert storage_fault(error, tmp_path) is None
