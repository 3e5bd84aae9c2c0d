"""Videos that were asked for: a JSON file for each in ``.univigu/serve`` of the work root, and its mp4 beside it.

A job that isn't finished says nothing but what was asked, so after a restart it begins again, and the same seed gives
the same video.
"""

import re
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.cli.serve.errors import ApiError, as_api_error, tell
from components.cli.serve.line import Entry, Video
from components.cli.studio.videos import write_streamable
from components.pipeline.state import STATE
from univigu.files import read_json_object, write_json

QUEUED, COMPLETED, FAILED = "queued", "completed", "failed"
_ID = re.compile(r"video_[0-9a-f]{24}")


@dataclass(eq=False)
class Job:
    """A video that was asked for. Times are Unix timestamps; 0 is not yet."""

    id: str
    asked: Video
    fps: float
    created: float
    status: str = QUEUED
    model: str = ""  # the label of the model that made it
    finished: float = 0.0
    error: dict[str, Any] | None = None
    entry: Entry | None = None  # while it waits or runs

    def record(self) -> dict[str, Any]:
        """What its file has."""
        kept = {name: value for name, value in vars(self).items() if name not in ("entry", "asked")}
        return {**kept, "asked": self.asked._asdict()}


class Jobs:
    """All jobs of a work root. keep: seconds that a finished one is kept. Any thread may use it."""

    def __init__(self, root: Path, keep: float) -> None:
        self.home, self._keep = root / STATE / "serve", keep
        self._jobs: dict[str, Job] = {}
        self._lock = threading.RLock()

    def load(self) -> list[Job]:
        """Read the jobs of an earlier server; returns the unfinished, the oldest first. Partial files are removed."""
        self.home.mkdir(parents=True, exist_ok=True)
        for partial in self.home.glob(".*.partial"):
            partial.unlink(missing_ok=True)
        for path in self.home.glob("*.json"):
            try:
                job = _read(path)
            except (OSError, ValueError, TypeError, KeyError) as error:
                tell(f"The job {path} can't be read ({error}) and is left alone; delete it.")
                continue
            self._jobs[job.id] = job
        return [job for job in self.list() if job.status == QUEUED]

    def list(self) -> list[Job]:
        """The oldest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: (job.created, job.id))

    def get(self, job_id: str) -> Job:
        """A job; raises `ApiError` (404) if there is none."""
        found = self._jobs.get(job_id)
        if found is None:
            raise ApiError(404, "There is no video with this id; it was deleted, or never asked for.", "video_id")
        return found

    def add(self, job: Job) -> Job:
        """Keep a new job; it is on the disk when this returns.

        A job of the same id and request that is there already is returned instead, which makes it safe to send a
        request twice. Raises `ApiError` for another request under the same id.
        """
        with self._lock:
            found = self._jobs.setdefault(job.id, job)
        if found is not job:
            if found.asked != job.asked:
                raise ApiError(400, "Another video was asked for with this Idempotency-Key; send a new key.")
            return found
        try:
            write_json(self._path(job, "json"), job.record())
        except BaseException:
            self._jobs.pop(job.id, None)
            raise
        return job

    def remove(self, job: Job) -> None:
        """Forget a job and its video."""
        with self._lock:
            self._jobs.pop(job.id, None)
            for suffix in ("json", "mp4"):
                self._path(job, suffix).unlink(missing_ok=True)

    def finish(self, job: Job, future: "Future[Any]") -> None:
        """Keep what became of a job: its frames, uint8 (F, H, W, 3), as an mp4, or its error.

        A cancelled one was deleted, or waits for the next server.
        """
        if future.cancelled():
            return
        label = job.entry.model.label if job.entry else ""
        try:
            self._write_video(job, future.result())
            status, error = COMPLETED, None
        except BaseException as fault:
            status, error = FAILED, as_api_error(fault, self.home).body()
        with self._lock:
            job.status, job.error, job.model, job.finished, job.entry = status, error, label, time.time(), None
            if job.id not in self._jobs:  # deleted meanwhile
                self._path(job, "mp4").unlink(missing_ok=True)
                return
            try:
                write_json(self._path(job, "json"), job.record())
            except OSError as fault:
                tell(f"The end of {job.id} isn't kept, so a restart makes it again: {as_api_error(fault, self.home)}")

    def _write_video(self, job: Job, frames: Any) -> None:
        from univigu.clip_formats import encode_clip

        write_streamable(self._path(job, "mp4"), encode_clip(frames, job.fps, ".mp4"))

    def video(self, job: Job) -> Path:
        """The mp4 of a job; raises `ApiError` (404) where there is none."""
        path = self._path(job, "mp4")
        if job.status != COMPLETED or not path.is_file():
            said = job.error["message"] if job.error else "wait until its status is 'completed'."
            raise ApiError(404, f"This video is not there: {said}", "video_id")
        return path

    def expires(self, job: Job) -> float | None:
        """When a job is deleted; None for one that isn't finished."""
        return job.finished + self._keep if job.finished else None

    def remove_expired(self) -> None:
        now = time.time()
        for job in self.list():
            if (end := self.expires(job)) and end < now:
                self.remove(job)

    def _path(self, job: Job, suffix: str) -> Path:
        return self.home / f"{job.id}.{suffix}"


def _read(path: Path) -> Job:
    values: dict[str, Any] = read_json_object(path)
    values["asked"] = Video(**values["asked"])
    job = Job(**values)
    if not _ID.fullmatch(job.id) or path.stem != job.id:
        raise ValueError("its name isn't its id")
    return job
