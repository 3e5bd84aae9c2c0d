"""A registered version as a folder: complete, smaller if asked, and as good as the version."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from components.registry.export import export_version
from registered_root import register
from univigu import UniViGUPipeline
from univigu.errors import BadInputError, MissingInputError


@pytest.fixture(scope="module")
def root(tmp_path_factory, speaking_model):
    """A work root with one registered version of `shared`."""
    root = tmp_path_factory.mktemp("registry")
    register(root, speaking_model, "shared")
    return root


@pytest.mark.slow
def test_an_exported_version_has_the_registered_bytes_and_the_card(root, speaking_model, tmp_path):
    folder = tmp_path / "new" / "model"
    size = export_version("shared", "1", folder, "fp32", root)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    registered = {path.relative_to(speaking_model) for path in speaking_model.rglob("*") if path.is_file()}
    assert files == registered | {Path("README.md")}
    assert all(
        (folder / name).read_bytes() == (speaking_model / name).read_bytes()
        for name in registered - {Path("README.md")}
    )
    assert (folder / "README.md").read_text() == "# A card\n"
    assert size == sum((folder / name).stat().st_size for name in files)


def test_half_precision_shrinks_the_weights_loads_as_fp32_and_changes_videos_by_rounding_alone(
    root, speaking_model, tmp_path
):
    folder = tmp_path / "half"
    export_version("shared", "1", folder, "fp16", root)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (folder / weights).stat().st_size < 0.7 * (speaking_model / weights).stat().st_size
    assert "rounded to fp16 after the scores were measured" in (folder / "README.md").read_text()
    half, full = UniViGUPipeline.from_pretrained(folder), UniViGUPipeline.from_pretrained(speaking_model)
    assert {part.dtype for part in (half.transformer, half.vae, half.text_encoder)} == {torch.float32}
    one, other = (pipeline.generate("a red seven", seed=1).astype(int) for pipeline in (half, full))
    assert np.abs(one - other).mean() < 1


def test_an_existing_folder_is_kept_and_an_unknown_version_is_named(root, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInputError, match="exists already"):
        export_version("shared", "1", tmp_path / "mine", "fp32", root)
    with pytest.raises(MissingInputError, match="no version or alias '7'"):
        export_version("shared", "7", tmp_path / "other", "fp32", root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.slow
def test_the_command_prints_what_it_wrote(root, tmp_path):
    command = [sys.executable, "-m", "components.cli.main", "model", "export", "1", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--name", "shared", "--root", str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: version 1 of 'shared' in fp32, ")
    assert json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"]
