"""LoRA adapters that are added for one call."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from components.cli import chosen_model
from components.cli.adapters import FOLDER, adapted, find_adapter, list_adapters
from univigu.errors import BadInputError

MODEL = Path(__file__).parents[3] / "model/tiny-univigu"


@pytest.fixture(scope="module")
def pipeline():
    return chosen_model.read(MODEL, adapters=True)


@pytest.fixture(scope="module")
def root(pipeline, tmp_path_factory):
    """A work root with an adapter of the bundled model's queries, `strong.safetensors`."""
    root = tmp_path_factory.mktemp("root")
    (root / FOLDER).mkdir()
    layers = {f"transformer.blocks.{n}.attn1.to_q": b.attn1.to_q for n, b in enumerate(pipeline.transformer.blocks)}
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for name, layer in layers.items()
        for side, shape in (("A", (4, layer.in_features)), ("B", (layer.out_features, 4)))
    }
    save_file(state, root / FOLDER / "strong.safetensors")
    return root


def test_an_adapter_has_its_effect_within_the_block_and_none_after_it(pipeline, root):
    generate = lambda: pipeline.generate("a red seven", seed=[3], num_inference_steps=2)  # noqa: E731
    path, before = find_adapter(root, "strong.safetensors"), generate()
    with adapted(pipeline, path):
        assert not np.array_equal(generate(), before)
    with adapted(pipeline, path, 0.0):
        assert np.array_equal(generate(), before)
    with adapted(pipeline, None):
        assert np.array_equal(generate(), before)


def test_what_is_no_adapter_of_the_work_root_is_refused_and_leaves_the_model_as_it_was(pipeline, root):
    assert (list_adapters(root), list_adapters(root / "none")) == (["strong.safetensors"], [])
    with pytest.raises(BadInputError, match=r"There is no LoRA '\.\./strong\.safetensors' in"):
        find_adapter(root, "../strong.safetensors")
    damaged = root / FOLDER / "damaged.safetensors"
    damaged.write_bytes(b"no adapter")
    with pytest.raises(BadInputError, match="can't be loaded"), adapted(pipeline, damaged):
        pass
    assert not getattr(pipeline.transformer, "peft_config", None)
    damaged.unlink()
