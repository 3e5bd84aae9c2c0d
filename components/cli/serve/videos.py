"""Videos in OpenAI's format: a job is made, asked about, and its content fetched."""

import hashlib
import secrets
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from components.cli.serve.errors import ApiError
from components.cli.serve.fields import VideoFields, read_fields
from components.cli.serve.jobs import QUEUED, Job
from components.cli.serve.line import Entry, Video

if TYPE_CHECKING:
    from components.cli.serve.app import Service
    from components.cli.serve.models import Served

MOST_LISTED = 100


async def create_video(request: Request) -> Response:
    """``POST /v1/videos``."""
    service: Service = request.app.state.service
    fields = await read_fields(request, VideoFields, service.limits.seconds)
    model = service.find_model(fields.model)
    asked = _read(fields, model)
    model.check_prompts(asked.prompt, asked.negative_prompt)
    model.check_size(asked, service.limits)
    job = Job(_new_id(request), asked, model.config.fps, time.time())
    return _show(await run_in_threadpool(accept, service, job, model), service)


def accept(service: "Service", job: Job, model: "Served") -> Job:
    """Keep a new job, and put it in the line; returns the job of the same id that was there already, if any."""
    kept = service.jobs.add(job)
    if kept is job:
        try:
            service.line.put(enter(service, job, model))
        except ApiError:
            service.jobs.remove(job)
            raise
    return kept


def enter(service: "Service", job: Job, model: "Served") -> Entry:
    """The entry in the line that finishes a job."""
    job.entry = Entry(job.asked, model)
    job.entry.future.add_done_callback(partial(service.jobs.finish, job))
    return job.entry


def _read(fields: VideoFields, model: "Served") -> Video:
    config = model.config
    width, height = map(int, fields.size.split("x")) if fields.size else (config.width, config.height)
    settings = (fields.seed, fields.num_inference_steps, fields.guidance_scale)
    frames = model.count_frames(fields.seconds)
    return Video(fields.prompt, fields.negative_prompt or None, frames, height, width, *settings)


def _new_id(request: Request) -> str:
    """A new id; the same one for the same Idempotency-Key."""
    key = request.headers.get("idempotency-key")
    return f"video_{hashlib.sha256(key.encode()).hexdigest()[:24] if key else secrets.token_hex(12)}"


async def list_videos(request: Request) -> Response:
    """``GET /v1/videos``, with OpenAI's `limit`, `after` and `order`."""
    service: Service = request.app.state.service
    query = request.query_params
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= MOST_LISTED:
        raise ApiError(400, f"The limit is not a whole number from 1 to {MOST_LISTED}; correct it.", "limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, "The order is neither asc nor desc; use one of them.", "order")
    found = service.jobs.list()[:: 1 if order == "asc" else -1]
    if after is not None:
        found = found[found.index(service.jobs.get(after)) + 1 :]
    shown = [_describe(job, service) for job in found[: int(limit)]]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": shown, **ends, "has_more": len(found) > len(shown)})


async def retrieve_video(request: Request) -> Response:
    """``GET /v1/videos/{video_id}``."""
    service: Service = request.app.state.service
    return _show(service.jobs.get(request.path_params["video_id"]), service)


async def download_video(request: Request) -> Response:
    """``GET /v1/videos/{video_id}/content``: H.264 in 4:2:0, with its index in front."""
    service: Service = request.app.state.service
    if request.query_params.get("variant", "video") != "video":
        raise ApiError(400, "There is no other variant than video; leave the variant out.", "variant")
    job = service.jobs.get(request.path_params["video_id"])
    return FileResponse(service.jobs.video(job), media_type="video/mp4", filename=f"{job.id}.mp4")


async def delete_video(request: Request) -> Response:
    """``DELETE /v1/videos/{video_id}``: a job that waits or runs is given up."""
    service: Service = request.app.state.service
    job = service.jobs.get(request.path_params["video_id"])
    await run_in_threadpool(service.jobs.remove, job)
    if job.entry:
        service.give_up(job.entry)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


def _show(job: Job, service: "Service") -> JSONResponse:
    return JSONResponse(_describe(job, service))


def _describe(job: Job, service: "Service") -> dict[str, Any]:
    entry, asked, expires = job.entry, job.asked, service.jobs.expires(job)
    runs = job.status == QUEUED and entry is not None and entry.future.running()
    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created),
        "completed_at": int(job.finished) if job.finished else None,
        "expires_at": int(expires) if expires else None,
        "status": "in_progress" if runs else job.status,
        "progress": 100 if job.status == "completed" else entry.progress if entry else 0,
        "model": job.model or service.models.name,
        "prompt": asked.prompt,
        "seconds": f"{asked.frames / job.fps:g}",
        "size": f"{asked.width}x{asked.height}",
        "seed": asked.seed,
        "error": job.error and {"code": job.error["code"] or job.error["type"], "message": job.error["message"]},
        "remixed_from_video_id": None,
    }
