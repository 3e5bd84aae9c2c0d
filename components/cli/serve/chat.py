"""Captions as OpenAI's chat completions: a message has a video part, and the answer is its caption."""

import asyncio
import base64
import binascii
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from components.cli.serve.errors import CLIENT_GONE, ApiError
from components.cli.serve.fields import ChatFields, Message, read_fields
from components.cli.serve.line import Caption, Entry
from components.cli.serve.worker import too_slow

if TYPE_CHECKING:
    import numpy as np

    from components.cli.serve.app import Service
    from components.cli.serve.models import Served


async def chat(request: Request) -> Response:
    """``POST /v1/chat/completions``."""
    service: Service = request.app.state.service
    began = time.monotonic()
    asked = await read_fields(request, ChatFields, service.limits.seconds)
    model = service.find_model(asked.model)
    url = find_video(asked.messages)
    held = _bytes_of_frames(model)
    service.memory.take(held)
    try:
        async with service.decoding:
            frames = await run_in_threadpool(_read, url, model, service.limits.pixels)
        caption = Caption(frames, asked.seed, asked.num_inference_steps, asked.guidance_scale, asked.temperature)
        entry = Entry(caption, model, since=began)
        service.line.put(entry)
        text = await _wait(entry, request, service)
    finally:
        service.memory.give_back(held)
    return Response(status_code=CLIENT_GONE) if text is None else _answer(asked, model, text)


async def _wait(entry: Entry, request: Request, service: "Service") -> str | None:
    """The caption; None if the client went away. Raises `ApiError` (504) after the time limit."""
    result = asyncio.wrap_future(entry.future)
    gone = asyncio.ensure_future(_until_gone(request))
    left = service.limits.seconds - (time.monotonic() - entry.since)
    try:
        await asyncio.wait({result, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return " ".join(result.result().split())
        service.give_up(entry)
        if gone.done():
            return None
        raise too_slow(service.limits.seconds)
    finally:
        gone.cancel()
        result.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def find_video(messages: Sequence[Message]) -> str:
    """The address in the one video part of a conversation; raises `ApiError` (400) where there isn't exactly one."""
    found = []
    for number, message in enumerate(messages):
        place = f"messages.{number}.content"
        if message.content is None or isinstance(message.content, str):
            continue
        if not isinstance(message.content, list) or not all(isinstance(part, dict) for part in message.content):
            raise ApiError(400, "The content of a message is neither a text nor a list of parts; correct it.", place)
        for part in message.content:
            kind, value = part.get("type"), part.get("video_url")
            if kind == "video_url" and isinstance(value, dict) and isinstance(value.get("url"), str):
                found.append(value["url"])
            elif kind != "text":
                raise ApiError(400, "A part of a message is no text and no video_url with a url; correct it.", place)
    if len(found) != 1:
        sentence = f"The messages have {len(found)} videos; send exactly one, as a part of the type video_url."
        raise ApiError(400, sentence, "messages")
    return found[0]


def _bytes_of_frames(model: "Served") -> int:
    """The memory of a video in the model's format."""
    return model.config.num_frames * model.config.height * model.config.width * 3


def _read(url: str, model: "Served", pixels: int) -> "np.ndarray":
    """The frames of a data: URL in the model's format. Nothing else is read: no file, and no other server."""
    from univigu.video import fit_frames, read_video

    head, _, content = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        sentence = "Only videos within the request are read, as data:video/mp4;base64,...; send the video like this."
        raise ApiError(400, sentence, "messages")
    try:
        video = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "The video is not valid base64; encode it again.", "messages") from error
    config = model.config
    frames, _ = read_video(video, config.num_frames, pixels)
    if len(frames) == 1 < config.num_frames:
        raise ApiError(400, "The video is a single frame, which shows no motion; send two frames or more.", "messages")
    return fit_frames(frames, config.num_frames, config.height, config.width)


def _answer(asked: ChatFields, model: "Served", text: str) -> Response:
    text, count, is_cut = model.count_tokens(text, asked.max_completion_tokens or asked.max_tokens)
    seen = model.count_video_tokens()
    usage = {"prompt_tokens": seen, "completion_tokens": count, "total_tokens": seen + count}
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.label}
    reason = "length" if is_cut else "stop"
    if asked.stream:
        shown = usage if asked.stream_options and asked.stream_options.include_usage else None
        return StreamingResponse(_events(head, text, reason, shown), media_type="text/event-stream")
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


def _events(head: dict[str, Any], text: str, reason: str, usage: dict[str, int] | None) -> Iterator[str]:
    """Server-sent events: all tokens of a text are sampled together, so it comes in one piece."""
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": reason},
    ]
    chunks: list[dict[str, Any]] = [{"choices": [choice]} for choice in choices]
    for chunk in [*chunks, *([{"choices": [], "usage": usage}] if usage else [])]:
        yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', **chunk})}\n\n"
    yield "data: [DONE]\n\n"
