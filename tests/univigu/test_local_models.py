"""Nothing from a third-party model's folder is run: its weights are safetensors, its code is not read."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.captions.captioners import load_captioner
from components.checks import aesthetic
from components.evaluation.scorers import clip
from components.prompts.embeddings import Neighbours
from univigu.errors import BadInputError
from univigu.local_models import require_safetensors


def load_captions(folder):
    options = {"folder": folder.name}
    captioner = load_captioner("transformers", {"root": folder.parent, "batch_size": 1, "options": options})
    return captioner.processor, captioner.model


LOADERS = {
    "captioner": load_captions,
    "aesthetic": aesthetic.load_scorer,
    "clip": clip.load,
    "prompts": lambda folder: Neighbours(folder, 0.9),
}


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def folder(tmp_path):
    """A model's folder with code and pickled weights, both of which write a file if they are run."""
    home = tmp_path / "model"
    home.mkdir()
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (home / "theirs.py").write_text(code)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    config = {"model_type": "theirs", "auto_map": dict.fromkeys(kinds, "theirs.Theirs")}
    config["auto_map"]["AutoTokenizer"] = ["theirs.Theirs", None]
    for name in ("config", "preprocessor_config", "processor_config", "tokenizer_config"):
        (home / f"{name}.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, home / "head.safetensors")
    (home / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    return home


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_pickled_weights_are_refused_in_one_sentence(folder, load):
    with pytest.raises(BadInputError, match=r"holds pytorch_model\.bin and no model\.safetensors, .*save it there"):
        load(folder)
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_code_in_a_folder_is_never_run(folder, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(BadInputError) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "/etc/model.safetensors"])
def test_an_index_names_safetensors_beside_it(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadInputError, match="is no safetensors file beside it"):
        require_safetensors(folder)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(BadInputError, match="is damaged"):
            require_safetensors(folder)


def test_an_adapter_that_names_another_model_is_refused(folder):
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    require_safetensors(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(BadInputError, match="is an adapter of another"):
        require_safetensors(folder)
