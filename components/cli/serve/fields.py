"""Bodies of requests, as checked fields."""

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request

from components.cli.serve.errors import ApiError
from components.cli.serve.limits import LARGEST_SCALE, LARGEST_SEED, LONGEST_PROMPT, MOST_STEPS

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_LARGEST_FIELD = 64 << 10  # bytes of a form's field

Text = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Scale = Annotated[float, Field(ge=0, le=LARGEST_SCALE, allow_inf_nan=False)]


class Fields(BaseModel):
    """What both tasks take beside their own; None is the model's own value."""

    model: Text | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    guidance_scale: Scale | None = None


class VideoFields(Fields):
    """The body of ``POST /v1/videos``."""

    prompt: Text
    negative_prompt: Text | None = None
    seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] | None = None
    size: Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")] | None = None


class Message(BaseModel):
    """A message of a chat; its content is a text, or a list of parts."""

    role: Text
    content: Any = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatFields(Fields):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=100)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None


# What would change the answer and can't be done here. Other unknown fields, such as `user`, are ignored.
_REFUSED = ("tools", "functions", "response_format", "logprobs", "audio", "input_reference", "remix_video_id")
_Kind = TypeVar("_Kind", bound=Fields)


async def read_fields(request: Request, kind: type[_Kind], seconds: float) -> _Kind:
    """A request's body, in JSON or as a form, within `seconds`; raises `ApiError` (4xx) if it can't be used."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in (*_FORMS, "application/json"):
        raise ApiError(415, "The body's content type is unknown; send application/json or multipart/form-data.")
    try:
        async with asyncio.timeout(seconds):
            values = await (_read_form(request) if media in _FORMS else _read_json(request))
    except TimeoutError as error:
        raise ApiError(408, f"The body was not complete after {seconds:g} seconds; send it again.") from error
    for name in _REFUSED:
        if values.get(name) and values[name] != {"type": "text"}:
            raise ApiError(400, f"The field '{name}' can't be used here; leave it out.", name)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"The field '{name}' is wrong ({first['msg']}); correct it.", name) from error


async def _read_json(request: Request) -> Mapping[str, Any]:
    body = await request.body()
    try:
        values = await run_in_threadpool(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is not valid JSON in UTF-8; correct it.") from error
    if not isinstance(values, dict):
        raise ApiError(400, 'The body is no JSON object; send one, such as {"prompt": "a red seven"}.')
    return values


async def _read_form(request: Request) -> Mapping[str, Any]:
    async with request.form(max_files=1, max_fields=50, max_part_size=_LARGEST_FIELD) as form:
        files = [name for name, value in form.multi_items() if isinstance(value, UploadFile)]
        if files:
            raise ApiError(400, f"The file '{files[0][:40]}' can't be used here; leave it out.", files[0][:40])
        return {name: value for name, value in form.multi_items() if value != ""}
