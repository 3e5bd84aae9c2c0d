"""The real server of the studio, over HTTP and in a browser."""

import io
import json
import re
import resource
import socket
import urllib.error
import urllib.request

import av
import pytest

from components.cli.studio import gallery
from components.registry import promotion
from univigu.video import encode_mp4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tab(studio_server):
    """Opens the studio as another tab would: with a session of its own."""
    from gradio_client import Client

    return lambda: Client(studio_server.url, verbose=False, analytics_enabled=False)


def fetch(url, path, method="GET"):
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", method=method), timeout=60) as answer:
        return answer.headers, answer.read()


def plays_everywhere(content):
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert content.index(b"moov") < content.index(b"mdat")
        return dict(container.metadata)


def test_nothing_of_a_page_comes_from_elsewhere(studio_server):
    for page in ("", "runs", "data", "create"):
        headers, body = fetch(studio_server.url, f"/{page}")
        links = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"([^\"]+)\"", body.decode())
        assert links
        assert [link for link in links if "//" in link] == []
        assert "connect-src" not in headers["content-security-policy"]
        assert "default-src 'self';" in headers["content-security-policy"]


def test_a_champion_is_made_and_taken_back_with_a_reason_and_not_from_a_stale_page(tab, full_root):
    mine, other = tab(), tab()
    names, versions, table, *_ = mine.predict("seen", None, api_name="/models")
    assert names["value"] == "seen"
    assert versions["choices"] == [["2", 2], ["1", 1]]
    assert "captions.mean" in table
    other.predict("seen", None, api_name="/models")

    def decide(client, endpoint, version, why):
        return client.predict("seen", version, why, "Ann", False, api_name=endpoint)[0]

    assert "needs a reason" in decide(mine, "/promote", 1, "  ")
    assert "Version 1 is now champion: the first one" in decide(mine, "/promote", 1, "<b>to begin</b>")
    assert "it was unset, and is version 1. The page shows it now" in decide(other, "/promote", 2, "sees more")
    assert "Version 2 is now champion, instead of version 1" in decide(other, "/promote", 2, "sees more")
    mine.predict("seen", None, api_name="/models")
    assert "Version 1 was not promoted: captions.mean 0.188 against" in decide(mine, "/promote", 1, "hope")
    assert "Version 1 is now champion, instead of version 2" in decide(mine, "/rollback", 1, "too terse")
    lines = promotion.history("seen", root=full_root)
    outcomes = ["rolled back", "refused", "promoted", "promoted"]
    assert [line.outcome for line in lines] == outcomes
    assert {line.who.partition(",")[0] for line in lines} == {"Ann"}
    history = mine.predict("seen", None, api_name="/models")[4]
    assert "&lt;b&gt;to begin&lt;/b&gt;" in history


def test_a_run_has_its_steps_curves_and_samples(tab, studio_server):
    client = tab()
    now = client.predict(api_name="/runs_now")
    assert '<progress max="6" value="6">' in now
    assert "has not run" in now
    assert "train-stage-1, after step 6" in client.predict(api_name="/runs_results")
    assert "No process of this machine runs" in client.predict("train-stage-1", api_name="/stop_training")
    assert "Choose a training step" in client.predict(None, api_name="/resume_training")
    said, chosen, metric, heldout = client.predict(None, None, None, api_name="/runs")
    assert (said, metric["value"], heldout["value"]) == ("", "loss", "heldout_text_ce")
    curve, held = client.predict(chosen["value"], "loss", "heldout_text_ce", api_name="/curves")
    points = [tuple(row[1:]) for row in curve["value"]["data"]]
    assert points == [(step, pytest.approx(2 / step)) for step in range(1, 7)]
    assert held["value"]["data"][5][1:] == [6, 0.5]
    steps, samples = client.predict(chosen["value"], None, api_name="/samples")
    assert steps["value"] == 6
    assert "&lt;img src=x" in samples
    plays_everywhere(fetch(studio_server.url, re.search(r'src="(/video/sample/[^"]+)"', samples)[1])[1])


def test_a_quarantined_clip_plays_beside_its_reason(tab, studio_server):
    verdicts, scores, _, page = tab().predict("too_long", 0, "", "", "", "", 1, api_name="/clips")
    assert scores["choices"] == [["any", ""], ["motion", "motion"]]
    assert ["too_long (3)", "too_long"] in verdicts["choices"]
    assert "it has 50 tokens" in page
    plays_everywhere(fetch(studio_server.url, "/video/clip/c00001")[1])
    for path in ("/video/clip/frozen", "/video/clip/..%2f..%2fsecret", "/video/sample/a/b/c", "/video/made/x.mp4"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(studio_server.url, path)
        assert refused.value.code == 404


def test_what_is_made_stays_with_its_recipe_and_is_exported(tab, studio_server, full_root, tmp_path, moving_square):
    from gradio_client import handle_file

    client = tab()
    made, *_ = client.predict("a red seven moves left", "", "1", "", "", "", 3, api_name="/generate")
    (result,), _, _ = gallery.list_results(full_root, 1)
    assert result.recipe["model"] == "the bundled model"
    assert (result.recipe["prompt"], result.recipe["steps"], result.recipe["seed"]) == ("a red seven moves left", 1, 3)
    assert f"/video/made/{result.id}.mp4" in made
    headers, content = fetch(studio_server.url, f"/video/made/{result.id}.mp4?save")
    assert "a-red-seven-moves-left.mp4" in headers["content-disposition"]
    assert json.loads(plays_everywhere(content)["comment"])["seed"] == 3
    assert fetch(studio_server.url, f"/video/made/{result.id}.gif")[1].startswith(b"GIF8")
    assert fetch(studio_server.url, f"/video/made/{result.id}.webm")[1].startswith(b"\x1a\x45\xdf\xa3")

    clip, text = tmp_path / "clip.mp4", tmp_path / "notes.mp4"
    clip.write_bytes(encode_mp4(moving_square(200), 8))
    text.write_text("no video at all")
    _, _, tokens, *_ = client.predict(handle_file(clip), "3", "", "", 0, api_name="/caption")
    assert "The text at &tau; = 1.00" in tokens
    caption = gallery.list_results(full_root, 1)[0][0]
    assert caption.recipe["file"] == "clip.mp4"
    assert fetch(studio_server.url, f"/video/made/{caption.id}.txt")[1].decode().strip() == caption.caption
    words = caption.caption.split()
    looked = client.predict(f"{caption.id}/{len(words) - 1}", api_name="/look")
    assert f"<strong><bdi>{words[-1]}</bdi></strong> gave" in looked
    assert "has no such word" in client.predict(f"{caption.id}/{len(words)}", api_name="/look")
    assert "make this one again" in client.predict(f"{result.id}/0", api_name="/look")
    assert (
        "read &#39;notes.mp4&#39; as a video"
        in client.predict(handle_file(text), "", "", "", 0, api_name="/caption")[0]
    )
    assert "The prompt is empty" in client.predict(" ", "", "", "", "", "", 0, api_name="/generate")[0]
    assert "There is no LoRA" in client.predict("a seven", "", "", "", "../x", "", 0, api_name="/generate")[0]
    for steps, said in (("10000", "give 1 to 1000"), ("many", "&#39;many&#39;; give a whole number")):
        assert said in client.predict("a seven", "", steps, "", "", "", 0, api_name="/generate")[0]


def test_too_large_an_upload_is_refused_before_it_is_sent(studio_server):
    """The body is not read: it is a claim of 4 GB, and nothing follows."""
    host, port = studio_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {4 << 30}\r\n\r\n".encode()
        )
        answer = connection.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 413 ")
    assert "at most 256 MB" in answer


def test_a_full_disk_costs_the_result_and_nothing_else(tab, studio_server, full_root):
    """A limit of the size of files fails as a full disk does; a video is larger."""
    client, (before, *_) = tab(), gallery.list_results(full_root, 1)
    _, hard = resource.prlimit(studio_server.process.pid, resource.RLIMIT_FSIZE)
    try:
        resource.prlimit(studio_server.process.pid, resource.RLIMIT_FSIZE, (500, hard))
        said = client.predict("a red seven", "", "1", "", "", "", 3, api_name="/generate")[0]
    finally:
        resource.prlimit(studio_server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert "The disk is full at" in said
    assert gallery.list_results(full_root, 1)[0] == before
    assert list(gallery.home(full_root).glob(".*")) == []
    client.predict("a red seven", "", "1", "", "", "", 3, api_name="/generate")
    assert len(gallery.list_results(full_root, 1)[0]) == len(before) + 1
