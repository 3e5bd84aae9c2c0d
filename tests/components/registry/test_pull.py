"""A registered model in an environment with only its own requirements: pulled, and served over HTTP."""

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from components.tracking import tracking_uri
from registered_root import register
from univigu import registry
from univigu.video import decode_mp4, encode_mp4

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
PULL = """
import json, sys
from importlib.util import find_spec
assert find_spec("univigu") is None and find_spec("dvc") is None
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/clean@champion")
frame = pandas.DataFrame({"video": [sys.argv[1]]})
said = model.predict(frame, params={"seed": 3, "temperature": 0.0})["caption"][0]
pipeline = model.unwrap_python_model().pipeline
from univigu.video import read_video
from pathlib import Path
native = pipeline.caption(read_video(Path(sys.argv[1]))[0], seed=3, temperature=0.0)[0]
print(json.dumps([type(pipeline).__name__, said, native]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, speaking_model):
    """A work root with a registered champion called `clean`."""
    root = tmp_path_factory.mktemp("registry")
    version = register(root, speaking_model, "clean")
    registry.set_alias("clean", registry.CHAMPION, version.version, tracking_uri(root))
    return root


@pytest.fixture(scope="module")
def clean(root, tmp_path_factory):
    """A virtual environment with the model's own requirements, and the variables to run things in it."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri(root))
    wanted = mlflow.pyfunc.get_model_dependencies("models:/clean@champion")
    venv = tmp_path_factory.mktemp("clean") / "venv"
    links = os.environ.get("PIP_FIND_LINKS", "")
    torch = ["--find-links", links] if any(Path(links or "/none").glob("torch-*")) else ["--torch-backend", "cpu"]
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(venv)],
        ["pip", "install", "--quiet", "--python", str(venv / "bin/python"), *torch, "--requirement", wanted],
    ):
        done = subprocess.run([str(BIN / "uv"), *command], capture_output=True, text=True, check=False)
        if "dns error" in done.stderr or "error sending request" in done.stderr:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, done.stderr
    kept = ("HOME", "OMP_NUM_THREADS", "TMPDIR")
    return venv, {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
        "MLFLOW_TRACKING_URI": tracking_uri(root),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    path.write_bytes(encode_mp4(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), 8))
    return path


@pytest.fixture(scope="module")
def expected(root, clip):
    """The champion's caption of the clip in this environment."""
    pipeline = registry.load_pipeline("models:/clean@champion", tracking_uri(root))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.caption(decode_mp4(clip.read_bytes())[0], seed=3, temperature=0.0)[0]


def test_a_pull_with_only_the_models_own_requirements_gives_pyfunc_and_the_pipeline(clean, clip, expected, tmp_path):
    venv, env = clean
    command = [str(venv / "bin/python"), "-I", "-c", PULL, str(clip)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["UniViGUPipeline", expected, expected]


def test_a_served_model_answers_over_http(clean, clip, expected, tmp_path):
    venv, env = clean
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(venv / "bin/mlflow"), "models", "serve", "--model-uri", "models:/clean@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=stream, stderr=stream, start_new_session=True)
    try:
        give_up = time.monotonic() + 400
        while ask(f"http://127.0.0.1:{port}/ping") != (200, ""):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.5)
        url, video = f"http://127.0.0.1:{port}/invocations", base64.b64encode(clip.read_bytes()).decode()
        request = {"dataframe_records": [{"video": video}], "params": {"seed": 3, "temperature": 0}}
        status, answer = ask(url, request)
        assert (status, json.loads(answer)) == (200, {"predictions": [{"caption": expected}]}), log.read_text()
        request = {"dataframe_records": [{"prompt": "a red seven"}], "params": {"task": "generate", "steps": 2}}
        status, answer = ask(url, request)
        (row,) = json.loads(answer)["predictions"]
        assert (status, decode_mp4(base64.b64decode(row["video"]))[0].shape) == (200, (9, 32, 32, 3))
        assert ask(url, {"dataframe_records": [{"film": video}]})[0] == 400
        status, answer = ask(url, {"dataframe_records": [{"video": "none.mp4"}]})
        refused = json.loads(answer)
        assert (status, refused["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
        assert "There is no video file 'none.mp4'" in refused["message"]
        assert "Traceback" not in answer
        assert ask(url, {"dataframe_records": [{"video": str(clip)}]})[0] == 400  # callers choose no files
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def ask(url, request=None):
    """The status and text of a response; status 0 if the connection is refused."""
    data = None if request is None else json.dumps(request).encode()
    try:
        asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=200) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


HIDDEN = """
import sys
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [folder for folder in sys.path if not Path(folder, "univigu").is_dir()]
from importlib.util import find_spec
assert find_spec("univigu") is None and find_spec("components") is None
import json, mlflow, pandas
model = mlflow.pyfunc.load_model("models:/clean@champion")
clip, data = json.load(sys.stdin)
said = [model.predict(pandas.DataFrame({"video": [value]}), params={"seed": 3})["caption"][0] for value in (clip, data)]
made = model.predict(pandas.DataFrame({"prompt": ["a red seven"]}), params={"task": "generate", "steps": 2})
both = model.predict(pandas.DataFrame({"prompt": [""]}), params={"task": "joint", "steps": 2, "guidance": 1.0})
import univigu
print(json.dumps([univigu.__file__, said, made.to_dict("list"), both.to_dict("list")]))
"""


def test_a_pull_needs_no_checkout(root, tmp_path, monkeypatch, capsys):
    from components.cli.main import main

    clip = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    clip.write_bytes(encode_mp4(frames, 8))
    done = subprocess.run(
        [sys.executable, "-I", "-c", HIDDEN],
        input=json.dumps([str(clip), base64.b64encode(clip.read_bytes()).decode()]),
        env={
            **{name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ},
            "MLFLOW_TRACKING_URI": tracking_uri(root),
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    library, said, made, both = json.loads(done.stdout.splitlines()[-1])
    assert Path(library).is_relative_to(root / "mlruns")
    assert list(made) == ["video"]
    assert sorted(both) == ["caption", "video"]
    for video in (made["video"][0], both["video"][0]):
        assert decode_mp4(base64.b64decode(video))[0].shape == (9, 32, 32, 3)

    native = registry.load_pipeline("models:/clean@champion", tracking_uri(root))
    native.set_progress_bar_config(disable=True)
    expected = native.caption(decode_mp4(clip.read_bytes())[0], seed=3)[0]
    assert said == [expected, expected]
    arguments = ["univigu", "caption", str(clip), "--seed", "3", "--name", "clean", "--root", str(root)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        main()
    logging.disable(logging.NOTSET)
    assert capsys.readouterr().out.split() == expected.split()
