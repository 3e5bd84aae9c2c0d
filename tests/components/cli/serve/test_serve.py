"""The real server, over HTTP. The tests share one process and run in this order."""

import io
import json
import resource
import shutil
import signal
import socket
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from select import select

import av
import numpy as np
import pytest

from registered_root import register
from univigu import registry
from univigu.clip_formats import encode_clip
from univigu.video import decode_mp4, encode_mp4

pytestmark = pytest.mark.slow
BUNDLED = Path(__file__).parents[4] / "model/tiny-univigu"
CHAT, VIDEOS = "/v1/chat/completions", "/v1/videos"


def test_a_video_is_made_in_openais_format_and_plays_while_it_is_fetched(server):
    video_id = server.post(seed=3)
    job = server.wait_for(video_id)
    assert {key: job[key] for key in ("object", "status", "progress", "model", "seconds", "size", "error")} == {
        "object": "video",
        "status": "completed",
        "progress": 100,
        "model": "tiny-univigu",
        "seconds": "1.125",
        "size": "32x32",
        "error": None,
    }
    content = server.call("GET", f"{VIDEOS}/{video_id}/content")[1]
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(io.BytesIO(content)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 32, 32)
    form = b"".join(
        b'--x\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % field
        for field in [(b"prompt", b"a red seven moves to the right"), (b"seed", b"3"), (b"num_inference_steps", b"2")]
    )
    status, same = server.call(
        "POST", VIDEOS, form + b"--x--\r\n", **{"content-type": "multipart/form-data; boundary=x"}
    )
    assert status == 200
    server.wait_for(same["id"])
    assert server.call("GET", f"{VIDEOS}/{same['id']}/content")[1] == content
    page = server.call("GET", f"{VIDEOS}?limit=1")[1]
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([same["id"]], True)
    page = server.call("GET", f"{VIDEOS}?after={same['id']}")[1]
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([video_id], False)
    assert server.call("DELETE", f"{VIDEOS}/{same['id']}")[1]["deleted"] is True
    assert server.call("GET", f"{VIDEOS}/{same['id']}")[0] == 404
    assert not list(server.root.rglob(f"*{same['id']}*"))


def test_a_caption_is_a_chat_completion_also_as_a_stream(server, clip):
    status, whole = server.caption(clip)
    (choice,) = whole["choices"]
    assert (status, whole["object"], whole["model"]) == (200, "chat.completion", "tiny-univigu")
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert whole["usage"]["prompt_tokens"] == 48
    short = server.caption(clip, max_tokens=5)[1]
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 5)
    _, events = server.caption(clip, stream=True, stream_options={"include_usage": True})
    *chunks, done = [line.removeprefix("data: ") for line in events.decode().split("\n\n") if line]
    assert done == "[DONE]"
    assert json.loads(chunks[0])["choices"][0]["delta"]["content"] == choice["message"]["content"]
    assert json.loads(chunks[-1])["usage"] == whole["usage"]


def test_health_models_and_metrics_name_the_model_and_count(server, clip):
    names = ('results_total{kind="caption",outcome="ok"}', 'responses_total{endpoint="chat",status="200"}')
    before = [server.metric(name) for name in names]
    assert server.caption(clip)[0] == 200
    assert [server.metric(name) for name in names] == [count + 1 for count in before]
    assert server.call("GET", "/health") == (200, {"status": "ok", "model": "tiny-univigu", "waiting": 0})
    (model,) = server.call("GET", "/v1/models")[1]["data"]
    assert (model["id"], model["version"]) == ("uni-vigu", "tiny-univigu")
    assert server.call("GET", "/v1/models/uni-vigu")[0] == 200
    assert server.metric('model_info{model="tiny-univigu"}') == 1
    assert server.metric("held_bytes") == 0


def asked_with(**fields):
    return {"prompt": "a red seven", **fields}


MALFORMED = {
    "no JSON": (VIDEOS, b"{", 400, "not valid JSON"),
    "a deep body": (VIDEOS, b"[" * 100_000, 400, "not valid JSON"),
    "no object": (VIDEOS, b"[1]", 400, "no JSON object"),
    "not UTF-8": (VIDEOS, b'{"prompt": "\xff"}', 400, "not valid JSON"),
    "no prompt": (VIDEOS, {}, 400, "'prompt'"),
    "an empty prompt": (VIDEOS, {"prompt": " "}, 400, "empty"),
    "a prompt of another type": (VIDEOS, {"prompt": ["a"]}, 400, "'prompt'"),
    "a long prompt": (VIDEOS, {"prompt": "a red seven " * 100}, 400, "tokens"),
    "half a pair of UTF-16": (VIDEOS, {"prompt": "a \ud800 seven"}, 400, "'prompt'"),
    "a negative seed": (VIDEOS, asked_with(seed=-1), 400, "'seed'"),
    "no number of steps": (VIDEOS, asked_with(num_inference_steps=10**9), 400, "'num_inference_steps'"),
    "guidance that is no number": (VIDEOS, b'{"prompt": "a", "guidance_scale": NaN}', 400, "'guidance_scale'"),
    "a size of another form": (VIDEOS, asked_with(size="large"), 400, "'size'"),
    "a size that the model can't make": (VIDEOS, asked_with(size="30x30"), 400, "multiple"),
    "a size that is too large": (VIDEOS, asked_with(size="4096x4096"), 400, "smaller size"),
    "a length that is too large": (VIDEOS, asked_with(seconds="60"), 400, "at most 1.125 seconds"),
    "a first frame": (VIDEOS, asked_with(input_reference={"file_id": "x"}), 400, "input_reference"),
    "another model": (VIDEOS, asked_with(model="sora-2"), 404, "use 'uni-vigu'"),
    "no messages": (CHAT, {"messages": []}, 400, "'messages'"),
    "a text without a video": (CHAT, {"messages": [{"role": "user", "content": "hi"}]}, 400, "0 videos"),
    "a content of another type": (CHAT, {"messages": [{"role": "user", "content": {"a": 1}}]}, 400, "neither a text"),
    "a part of another type": (CHAT, {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, "no text and"),
    "tools": (CHAT, {"messages": [{"role": "user", "content": "hi"}], "tools": [{}]}, 400, "'tools'"),
    "several choices": (CHAT, {"messages": [{"role": "user", "content": "hi"}], "n": 3}, 400, "'n'"),
    "an unknown path": ("/v1/nothing", {}, 404, "nothing at"),
    "another method": ("/v1/models", {}, 405, "not a method"),
}


@pytest.mark.parametrize(("path", "body", "status", "sentence"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_gets_a_sentence(server, path, body, status, sentence):
    answer = server.call("POST", path, body, **{"content-type": "application/json"})
    assert_refused(answer, status, sentence)


@pytest.mark.parametrize(
    ("kind", "body", "status", "sentence"),
    [
        ("text/plain", b'{"prompt": "a red seven"}', 415, "content type"),
        ("multipart/form-data", b"--x--", 400, "can't be read"),
        ("multipart/form-data; boundary=x", b"nothing like a form", 400, "'prompt'|can't be read"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\nx\r\n--x--\r\n',
            400,
            "input_reference",
        ),
    ],
)
def test_a_form_that_can_not_be_used_gets_a_sentence(server, kind, body, status, sentence):
    assert_refused(server.call("POST", VIDEOS, body, **{"content-type": kind}), status, sentence)


def assert_refused(answer, status, sentence):
    error = answer[1]["error"]
    assert answer[0] == status
    assert any(one in error["message"] for one in sentence.split("|")), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]


def test_what_is_no_video_is_refused_and_no_address_is_followed(server, clip, question):
    def refuse(url, sentence):
        asked = question(b"")
        asked["messages"][0]["content"][1]["video_url"]["url"] = url
        assert_refused(server.call("POST", CHAT, asked), 400, sentence)

    for url in ("file:///etc/passwd", "/etc/passwd", f"{server.url}/health", "data:video/mp4,abc"):
        refuse(url, "Only videos within the request are read")
    refuse("data:video/mp4;base64,@@@", "not valid base64")
    assert_refused(server.caption(b"this is no video" * 100), 400, "read the video as a video")
    assert_refused(server.caption(clip[: len(clip) // 2]), 400, "cut off")
    still = encode_mp4(np.zeros((1, 32, 32, 3), np.uint8), 8)
    assert_refused(server.caption(still), 400, "single frame")
    twice = question(clip)
    twice["messages"] *= 2
    assert_refused(server.call("POST", CHAT, twice), 400, "2 videos")


def test_a_body_beyond_the_limit_is_not_read(server):
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\ncontent-type: application/json\r\n"

    def send(rest, chunks):
        """Status and text of the answer, and how many of the chunks of 64 KiB were sent before it came."""
        with socket.create_connection(("127.0.0.1", int(server.port)), timeout=30) as connection:
            connection.sendall(f"{head}{rest}\r\n\r\n".encode())
            count = 0
            while count < chunks and not select([connection], [], [], 0)[0]:
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                count += 1
            answer = HTTPResponse(connection)
            answer.begin()
            return answer.status, answer.read().decode(), count

    status, said, _ = send(f"content-length: {4 << 30}", 0)
    assert (status, "more than 1 MiB" in said) == (413, True)
    status, said, sent = send("transfer-encoding: chunked", 10_000)
    assert (status, "more than 1 MiB" in said) == (413, True)
    assert sent < 1000
    server.until(lambda: server.metric('responses_total{endpoint="chat",status="413"}') == 1)
    server.until(lambda: server.metric("held_bytes") == 0)


def test_a_result_does_not_depend_on_what_else_is_waiting(server, clip):
    alone, said = server.make(prompt="a green two", seed=7), server.caption(clip)[1]["choices"]
    with ThreadPoolExecutor(12) as pool:
        words = enumerate(("red", "blue") * 3)
        others = [pool.submit(server.make, prompt=f"a {word} digit", seed=seed) for seed, word in words]
        captions = [pool.submit(server.caption, clip, seed=0) for _ in range(5)]
        among = pool.submit(server.make, prompt="a green two", seed=7)
        assert among.result() == alone
        assert [one.result()[1]["choices"] for one in captions] == [said] * 5
        assert len({one.result() for one in others}) == 6
    assert server.metric('batch_size_sum{kind="video"}') > server.metric('batch_size_count{kind="video"}')


def waiting(server):
    return server.call("GET", "/health")[1]["waiting"]


def start_videos(server, count, steps):
    """The ids of videos of so many steps: the first is sampled, and the others wait."""
    ids = [server.post(num_inference_steps=steps)]
    server.until(lambda: server.call("GET", f"{VIDEOS}/{ids[0]}")[1]["status"] == "in_progress")
    return ids + [server.post(num_inference_steps=steps, seed=seed) for seed in range(1, count)]


def test_who_goes_away_costs_no_work_and_a_deleted_job_ends(server, clip, question):
    slow = start_videos(server, 4, 1000)
    body = json.dumps(question(clip)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\ncontent-type: application/json\r\n"
    before = server.metric('results_total{kind="caption",outcome="abandoned"}')
    with socket.create_connection(("127.0.0.1", int(server.port))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:100])
        connection.sendall(body[100:])
        server.until(lambda: waiting(server) == 4)
    server.until(lambda: waiting(server) == 3)
    assert server.metric('results_total{kind="caption",outcome="abandoned"}') == before + 1
    with socket.create_connection(("127.0.0.1", int(server.port))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:100])
    began = time.monotonic()
    for video_id in slow:
        assert server.call("DELETE", f"{VIDEOS}/{video_id}")[0] == 200
    assert server.caption(clip)[0] == 200
    assert time.monotonic() - began < 20
    assert server.metric("held_bytes") == 0


def test_a_full_disk_fails_the_video_with_a_sentence_and_the_next_one_is_made(server, clip):
    """A limit of the size of files fails as a full disk does; the video is larger, and the job's record isn't."""
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    try:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, hard))
        job = server.wait_for(server.post())
        assert (job["status"], job["error"]["code"]) == ("failed", "disk_full")
        assert "The disk is full" in job["error"]["message"]
        assert_refused(server.call("GET", f"{VIDEOS}/{job['id']}/content"), 404, "The disk is full")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (10, hard))
        assert_refused(server.call("POST", VIDEOS, asked_with()), 507, "The disk is full")
        assert server.caption(clip)[0] == 200
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert server.wait_for(server.post())["status"] == "completed"
    assert not list(server.root.rglob("*.partial"))


def patiently(action, *arguments, **fields):
    """Send a request again after a lost connection or a 503, as OpenAI's own clients do."""
    for _ in range(600):
        try:
            found = action(*arguments, **fields)
        except (urllib.error.URLError, HTTPException, ConnectionError):
            found = None
        except AssertionError as error:  # of a job that isn't accepted
            if "shutting down" not in str(error) and "being loaded" not in str(error):
                raise
            found = None
        if found is not None and not (isinstance(found, tuple) and found[0] == 503):
            return found
        time.sleep(0.5)
    raise AssertionError("the server doesn't come back")


def test_of_100_requests_none_is_lost_when_the_server_is_killed_in_the_middle(server, clip):
    prompts = [
        f"a {colour} {digit} on black" for colour in ("red", "blue", "green") for digit in ("one", "two", "three")
    ]
    wanted = [(prompts[number % 9], number) for number in range(40)]
    with ThreadPoolExecutor(100) as pool:
        posts = [
            pool.submit(patiently, server.post, prompt=prompt, seed=seed, key=f"k{seed}") for prompt, seed in wanted
        ]
        captions = [pool.submit(patiently, server.caption, clip, seed=seed) for seed in range(60)]
        server.until(lambda: len(list(server.root.rglob("video_*.mp4"))) >= 8)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        left = sum('"queued"' in path.read_text() for path in server.root.rglob("video_*.json"))
        assert left
        server.start()
        ids = [post.result() for post in posts]
        said = [caption.result()[1]["choices"][0]["message"]["content"] for caption in captions]
    assert len(set(ids)) == 40
    server.until(lambda: all(server.call("GET", f"{VIDEOS}/{one}")[1]["status"] == "completed" for one in ids))
    listed = server.call("GET", f"{VIDEOS}?limit=100")[1]
    ours = [row for row in listed["data"] if row["prompt"] in prompts]
    assert sorted(row["id"] for row in ours) == sorted(ids)  # none twice
    made = {seed: server.call("GET", f"{VIDEOS}/{ids[seed]}/content")[1] for seed in (0, 17, 39)}
    assert_as_undisturbed(clip, {seed: (wanted[seed][0], content) for seed, content in made.items()}, said)


def assert_as_undisturbed(clip, made, said):
    """What the server made is what a call without a server makes, and what `univigu generate` makes up to rounding."""
    from components.cli import chosen_model
    from components.cli.serve.line import Caption, Entry, Video
    from components.cli.serve.models import Served
    from components.cli.serve.worker import make

    pipeline = chosen_model.read(BUNDLED)
    served = Served("", pipeline, 0)

    def direct(asked):
        (result,) = make([Entry(asked, served)], 4, lambda *_: {})
        return result

    for seed, (prompt, content) in made.items():
        frames = direct(Video(prompt, None, 9, 32, 32, seed, 2, None))
        assert np.array_equal(decode_mp4(content)[0], decode_mp4(encode_clip(frames, 8, ".mp4"))[0])
        (alone,) = pipeline.generate(prompt, seed=[seed], num_inference_steps=2)
        assert np.abs(frames.astype(int) - alone).max() <= 1
    for seed in (0, 59):
        assert " ".join(direct(Caption(decode_mp4(clip)[0], seed, None, None, None)).split()) == said[seed]


def test_a_new_champion_takes_over_and_what_is_under_way_is_finished_with_the_old_one(server, tmp_path):
    other = shutil.copytree(BUNDLED, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "guidance_scale": 3.0}))
    store = f"sqlite:///{server.root / 'mlflow.db'}"
    for number, folder in ((1, BUNDLED), (2, other)):
        assert int(register(server.root, folder, "uni-vigu").version) == number

    def promote(version):
        registry.set_alias("uni-vigu", "champion", version, store)

    promote(1)
    server.until(lambda: server.call("GET", "/health")[1]["model"] == "uni-vigu/1")
    first = server.wait_for(server.post(seed=5))
    under_way = start_videos(server, 5, 40)
    promote(2)
    server.until(lambda: server.call("GET", "/health")[1]["model"] == "uni-vigu/2")
    later = server.post(seed=5)
    assert server.call("GET", f"{VIDEOS}/{under_way[-1]}")[1]["status"] != "completed"
    assert {server.wait_for(one)["model"] for one in under_way} == {"uni-vigu/1"}
    assert (first["model"], server.wait_for(later)["model"]) == ("uni-vigu/1", "uni-vigu/2")
    contents = [server.call("GET", f"{VIDEOS}/{one}/content")[1] for one in (first["id"], later)]
    assert contents[0] != contents[1]
    assert server.metric("model_changes_total") == 2
    shutil.rmtree(registry.pipeline_folder("models:/uni-vigu/1", store))
    promote(1)
    server.until(lambda: server.metric("model_failures_total") > 0)
    assert server.call("GET", "/health")[1]["model"] == "uni-vigu/2"


def test_sigterm_finishes_the_batch_that_runs_and_leaves_the_rest_on_the_disk(server, clip):
    videos = start_videos(server, 6, 40)
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(server.caption, clip)
        server.until(lambda: waiting(server) == 6)
        assert server.end() == 0
        assert_refused(refused.result(), 503, "shutting down")
    kept = [json.loads(next(server.root.rglob(f"{one}.json")).read_text())["status"] for one in videos]
    assert kept == ["completed"] + ["queued"] * 5
