"""Errors as callers get them, in OpenAI's format: one sentence, and words that programs can compare."""

import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from components.cli.messages import say
from univigu.errors import BadInputError, DiskFullError, TransientError, UniViGUError, first_line, storage_fault

CLIENT_GONE = 499  # nobody reads this status; nginx has it for the same case
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_TOO_LITTLE_MEMORY = ("OutOfMemoryError", "MemoryError")


class ApiError(UniViGUError):
    """A request that is refused or has failed. status: of HTTP. param: the field that was wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def response(self) -> JSONResponse:
        """The answer to the request."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after else {}
        if self.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body isn't read
        return JSONResponse({"error": self.body()}, self.status, headers)

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"message": str(self), "type": kind, "param": self.param, "code": self.code}


def tell(message: str) -> None:
    """`say`, also where standard error is a file on a full disk."""
    with suppress(OSError):
        say(message)


def as_api_error(error: BaseException, place: Path) -> ApiError:
    """The error to answer with; the traceback of one that isn't expected is printed on standard error.

    place: the folder that is in use, for errors of a disk that don't name one.
    """
    if isinstance(error, ApiError):
        return error
    fault = None if isinstance(error, UniViGUError) else storage_fault(error, place)
    if isinstance(fault or error, DiskFullError):
        return ApiError(507, str(fault or error), code="disk_full")
    if fault:
        return ApiError(500, str(fault), code="storage_fault")
    if isinstance(error, BadInputError):
        return ApiError(400, str(error))
    if isinstance(error, TransientError):
        return ApiError(503, str(error), retry_after=1)
    if isinstance(error, UniViGUError):
        return ApiError(500, str(error))
    if type(error).__name__ in _TOO_LITTLE_MEMORY:
        sentence = "The model ran out of memory; ask for a smaller video, or start the server with a smaller --batch."
        return ApiError(503, sentence, code="out_of_memory")
    with suppress(OSError):  # standard error may be a file on a full disk
        traceback.print_exception(error, file=sys.stderr)
    said = f"{type(error).__name__}: {first_line(error)}" if isinstance(error, Exception) else type(error).__name__
    return ApiError(500, f"This did not work ({said}); the server's standard error shows where.", code="internal_error")
