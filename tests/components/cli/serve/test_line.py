"""Who waits, who shares a batch, and who is refused."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from components.cli.serve.errors import ApiError, as_api_error
from components.cli.serve.guard import ApiGuard, Bodies
from components.cli.serve.limits import Memory
from components.cli.serve.line import Entry, Line, Video
from components.cli.serve.worker import AbandonedError, Report
from univigu.errors import BadInputError, TransientError

TOKEN = "a-token-of-some-length"
MODEL = SimpleNamespace(config=SimpleNamespace(num_inference_steps=4))


def entry(steps=2, model=MODEL, seed=0):
    return Entry(Video("a digit", None, 9, 32, 32, seed, steps, None), model)


def test_a_batch_has_requests_of_one_kind_and_one_model_and_the_oldest_is_first():
    line, other = Line(9), SimpleNamespace()
    first, second, third, fourth = entry(seed=1), entry(steps=3), entry(model=other), entry(seed=2)
    for one in (first, second, third, fourth):
        line.put(one)
    assert [line.take(4), line.take(4), line.take(4)] == [[first, fourth], [second], [third]]
    assert len(line) == 0


def test_a_full_line_refuses_and_says_when_to_come_back():
    line = Line(1)
    line.put(entry())
    with pytest.raises(ApiError, match="1 requests are waiting") as refused:
        line.put(entry())
    assert refused.value.response().status_code == 429
    assert int(refused.value.response().headers["retry-after"]) >= 1
    line.restore([entry()])  # accepted earlier
    assert len(line.close()) == 2
    assert line.take(4) == []
    with pytest.raises(ApiError, match="shutting down"):
        line.put(entry())


def test_a_request_that_is_given_up_leaves_the_line_and_ends_a_batch_that_nobody_wants():
    line, running, other, gone = Line(9), entry(), entry(), entry()
    for one in (running, other, gone):
        line.put(one)
    batch = line.take(2)
    assert line.remove(gone)
    assert len(line) == 0
    report = Report(batch, 60)
    assert not line.remove(running)
    report(None, 0, None, {})
    assert [one.progress for one in batch] == [50, 50]
    line.remove(other)
    with pytest.raises(AbandonedError):
        report(None, 1, None, {})


def test_sampling_ends_at_the_time_limit():
    with pytest.raises(ApiError, match=r"longer than 0 seconds") as ended:
        Report([entry()], 0.0)(None, 0, None, {})
    assert (ended.value.status, ended.value.code) == (504, "timeout")


@pytest.mark.parametrize(
    ("error", "status"),
    [(BadInputError("No."), 400), (TransientError("Later."), 503), (MemoryError(), 503), (ZeroDivisionError(), 500)],
)
def test_any_failure_is_answered_in_a_sentence(error, status, tmp_path, capsys):
    answer = as_api_error(error, tmp_path)
    assert answer.status == status
    assert str(answer).endswith(".")
    assert ("ZeroDivisionError" in capsys.readouterr().err) == (status == 500)


def send(app, chunks=(), **headers):
    """The status and the body of an ASGI application's answer."""
    answers, left = [], list(chunks)

    async def receive():
        return {"type": "http.request", "body": left.pop(0) if left else b"", "more_body": bool(left)}

    async def take(message):
        answers.append(message)

    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"", "headers": fields}
    asyncio.run(app(scope, receive, take))
    return answers[0]["status"], json.loads(answers[1]["body"])


async def reading(scope, receive, send):
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def test_a_program_needs_the_token_in_its_header():
    guarded = ApiGuard(reading, TOKEN, 8000, False)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": f"univigu_studio_8000={TOKEN}"}):
        status, body = send(guarded, **headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert send(guarded, authorization=f"Bearer {TOKEN}") == (200, {})
    status, body = send(ApiGuard(reading, "", 8000, True), host="127.0.0.1:8000", origin="http://evil.example")
    assert (status, body["error"]["type"]) == (403, "permission_error")


def test_bytes_of_unfinished_requests_are_bounded_together_and_given_back():
    memory = Memory(100)
    with pytest.raises(ApiError, match="more than 0 MiB") as refused:
        send(Bodies(reading, 50, memory), [bytes(40), bytes(40)])
    assert refused.value.status == 413
    memory.take(80)
    with pytest.raises(ApiError, match="as many bytes") as refused:
        send(Bodies(reading, 50, memory), [bytes(40)])
    assert refused.value.status == 429
    assert memory.held == 80
