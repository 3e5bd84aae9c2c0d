"""A registered version as a folder: complete, smaller if asked, and as good as the version."""

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from components.registry import ledger, promotion
from components.registry.export import export_version, pull_version
from components.tracking import tracking_uri
from registered_root import register
from univigu import UniViGUPipeline, registry, version_files
from univigu.errors import BadInputError, CorruptDataError, MissingInputError


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


# --- pulling a version -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def promoted_once(tmp_path_factory, speaking_model):
    root = tmp_path_factory.mktemp("promoted")
    register(root, speaking_model, "served")
    promotion.promote("served", 1, "the first", root=root)
    shutil.copytree(stored(root), root / "as-promoted")
    return root


@pytest.fixture
def promoted(promoted_once):
    """A work root with one promoted version of `served`, whose files a test may change."""
    yield promoted_once
    shutil.rmtree(stored(promoted_once))
    shutil.copytree(promoted_once / "as-promoted", stored(promoted_once))


def stored(root):
    """The folder of the version's files in the registry's store."""
    (model,) = (root / "mlruns/models").iterdir()
    return model / "artifacts"


@pytest.mark.slow
def test_a_pulled_version_is_what_was_promoted_and_loads(promoted, tmp_path):
    import mlflow

    (stored(promoted) / "code/univigu/__pycache__").mkdir()
    (stored(promoted) / "code/univigu/__pycache__/cached.pyc").write_bytes(b"left by a load from the store")
    line = pull_version("served", "champion", tmp_path / "new/served", promoted)
    assert line.outcome == ledger.PROMOTED
    assert line.files == version_files.folder_digest(tmp_path / "new/served")
    assert not list(tmp_path.rglob("__pycache__"))
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "new/served"))
    assert type(loaded.unwrap_python_model().pipeline).__name__ == "UniViGUPipeline"


def replace(name, old, new):
    def change(folder):
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new))

    return change


def flip(folder):
    weights = folder / "artifacts/pipeline/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


CHANGES = {
    "a weight": flip,
    "the library": replace("code/univigu/__init__.py", b"import", b"import os, "),
    "the model's code": replace("mlflow_model.py", b"import base64", b"import base64, os"),
    "a requirement": replace("requirements.txt", b"mlflow==", b"m1flow=="),
    "the loader": replace("MLmodel", b"mlflow.pyfunc.loaders.code_model", b"os"),
    "a description of nothing": lambda folder: (folder / "MLmodel").write_text("[]"),
    "one more file": lambda folder: (folder / "code/torch.py").write_text("print('loaded first')"),
    "one file less": lambda folder: (folder / "artifacts/README.md").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_version_whose_files_were_changed_after_its_promotion_is_not_pulled(promoted, change, tmp_path):
    change(stored(promoted))
    if change is flip:  # and its tag, which the registry lets anyone change
        version = registry.find_version("served", 1, tracking_uri(promoted))
        registry.set_tags(
            version, {version_files.TAG: version_files.folder_digest(stored(promoted))}, tracking_uri(promoted)
        )
    with pytest.raises(CorruptDataError, match="files of version 1 of 'served' are not those that"):
        pull_version("served", "champion", tmp_path / "served", promoted)
    assert list(tmp_path.iterdir()) == []


def test_a_version_whose_files_are_gone_is_not_said_to_be_changed_by_someone(promoted, tmp_path):
    for path in stored(promoted).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingInputError, match="is registered, but its files can't be reached"):
        pull_version("served", "champion", tmp_path / "served", promoted)
    assert list(tmp_path.iterdir()) == []


def test_times_ids_and_folders_of_an_upload_change_no_digest(promoted):
    before = version_files.folder_digest(stored(promoted))
    for old in (b"/model/univigu/mlflow_model.py", b"utc_time_created: '20", b"run_id: ", b"model_size_bytes: "):
        replace("MLmodel", old, old.replace(b"univigu/mlflow", b"elsewhere/mlflow").replace(b": ", b": 1"))(
            stored(promoted)
        )
    assert version_files.folder_digest(stored(promoted)) == before


@pytest.mark.slow
def test_a_version_without_a_digest_in_the_ledger_is_pulled_on_request_only(tmp_path, speaking_model):
    register(tmp_path, speaking_model, "served")
    with pytest.raises(BadInputError, match=r"never promoted, or by an earlier release; promote it .*--unverified"):
        pull_version("served", "1", tmp_path / "served", tmp_path)
    assert pull_version("served", "1", tmp_path / "served", tmp_path, unverified=True) is None
    assert (tmp_path / "served/MLmodel").is_file()


def test_nothing_is_pulled_by_a_changed_ledger(promoted, tmp_path):
    changed = sqlite3.connect(promoted / "mlflow.db")
    assert changed.execute("UPDATE params SET value = ? WHERE key = 'files'", ("0" * 64,)).rowcount == 1
    changed.commit()
    changed.close()
    with pytest.raises(CorruptDataError, match=r"history of 'served' was changed in 1 places.*--name served --verify"):
        pull_version("served", "champion", tmp_path / "served", promoted)
