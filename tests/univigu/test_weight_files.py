"""Weights are checked by their headers, and each kind of error has its own message."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from univigu import wan
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.weight_files import check_weights, read_headers

NAME = "diffusion_pytorch_model"


@pytest.fixture
def part(tiny_wan_folder, tmp_path):
    return shutil.copytree(tiny_wan_folder / "transformer", tmp_path / "transformer")


@pytest.fixture
def module(part):
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(wan.read_json(part / "config.json"))


def test_a_checkpoint_in_one_file_and_in_several_has_the_same_headers(part, module, tiny_wan_folder):
    whole = read_headers(part, NAME)
    check_weights(whole, module, "transformer")
    WanTransformer3DModel.from_pretrained(tiny_wan_folder / "transformer").save_pretrained(part, max_shard_size="20KB")
    (part / f"{NAME}.safetensors").unlink(missing_ok=True)
    cut = read_headers(part, NAME)
    assert len({header.file for header in cut.values()}) > 1
    assert {key: header.shape for key, header in cut.items()} == {key: header.shape for key, header in whole.items()}
    check_weights(cut, module, "transformer")
    next(part.glob("*-00001-of-*")).unlink()
    with pytest.raises(MissingInputError, match=r"lacks .*00001-of-.*download the rest"):
        read_headers(part, NAME)


def test_an_incomplete_download_is_told_apart_from_a_missing_one(part):
    path = part / f"{NAME}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorruptDataError, match="damaged or cut off"):
        read_headers(part, NAME)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(MissingInputError, match="git lfs pull"):
        read_headers(part, NAME)
    path.unlink()
    with pytest.raises(MissingInputError, match="gated"):
        read_headers(part, NAME)
    (part / f"{NAME}.bin").write_bytes(b"pickle")
    with pytest.raises(BadInputError, match="nothing here is unpickled"):
        read_headers(part, NAME)


def test_weights_of_another_model_than_the_config_are_refused(part, module):
    tensors = load_file(part / f"{NAME}.safetensors")

    def check(changed):
        save_file(changed, part / f"{NAME}.safetensors")
        check_weights(read_headers(part, NAME), module, "transformer")

    with pytest.raises(BadInputError, match=r"1 missing, 0 unexpected, for example proj_out\.bias"):
        check({key: tensor for key, tensor in tensors.items() if key != "proj_out.bias"})
    with pytest.raises(BadInputError, match=r"0 missing, 1 unexpected, for example blocks\.9"):
        check(tensors | {"blocks.9.ffn.weight": torch.zeros(2)})
    with pytest.raises(BadInputError, match=r"proj_out\.bias .* is \(3,\) and its config wants \(16,\)"):
        check(tensors | {"proj_out.bias": torch.zeros(3)})
    with pytest.raises(BadInputError, match="F8_E4M3, which can't be trained from"):
        check(tensors | {"proj_out.bias": torch.zeros(16).to(torch.float8_e4m3fn)})


def test_an_index_can_not_name_files_elsewhere(part):
    index = {"weight_map": {"proj_out.bias": "../../secret.safetensors"}}
    (part / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptDataError, match="lists no files beside it"):
        read_headers(part, NAME)


class GatedHub(BaseHTTPRequestHandler):
    """Answers every request like the hub for a gated repository without a token."""

    def do_GET(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model nobody/gated is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_gated_weights_are_told_apart_from_missing_ones():
    server = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from univigu import wan\ntry: wan.local_folder('nobody/gated')\nexcept Exception as error: print(error)"
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert "are gated: accept their licence at https://huggingface.co/nobody/gated" in said.stdout
