"""`univigu fetch`, from a hub on this machine."""

import os
import subprocess
import sys

import pytest
import yaml

WANTED = {
    "model_index.json": b'{"_class_name": "WanPipeline"}',
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"weights",
    "tokenizer/spiece.model": b"pieces",
}
UNWANTED = {"pipeline.py": b"import os", "transformer/diffusion_pytorch_model.bin": b"pickled"}


@pytest.fixture
def fetch(hub, tmp_path):
    hub.files = WANTED | UNWANTED
    root = tmp_path / "root"
    root.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}

    def run(*arguments):
        command = [sys.executable, "-m", "components.cli.main", "fetch", *arguments, "--root", str(root)]
        return root, subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


@pytest.mark.slow
def test_weights_and_configurations_are_fetched_and_nothing_that_could_run(fetch):
    root, done = fetch("me/model", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{root}/model/model\n"
    assert files(root / "model/model") == WANTED


@pytest.mark.slow
def test_a_download_without_some_of_its_files_is_completed(fetch):
    root, _ = fetch("me/model", "--to", "model/mine")
    (root / "model/mine/transformer/diffusion_pytorch_model.safetensors").unlink()
    _, done = fetch("me/model", "--to", "model/mine")
    assert done.returncode == 0, done.stderr
    assert files(root / "model/mine") == WANTED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["me/model", "--revision", "nothing"], 66, "has no revision 'nothing'"),
        (["../../etc"], 65, "is no hub repository"),
        (["me/model", "--to", "../elsewhere"], 65, "leaves the work root"),
        (["--to", "model/mine"], 78, "need a repository"),
    ],
)
def test_what_can_not_be_fetched_is_one_sentence(fetch, arguments, code, message):
    root, done = fetch(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (root.parent / "elsewhere").exists()


@pytest.mark.slow
def test_without_a_name_the_profiles_weights_are_fetched_unless_they_are_there(fetch, tmp_path):
    fetch("me/model", "--to", "model/tiny-wan")
    _, done = fetch()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "Nothing is missing.\n")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"extends": "tiny", "base": "model/somebodys"}))
    _, done = fetch("--profile", str(tmp_path / "mine.yaml"))
    assert done.returncode == 78
    assert "`univigu fetch OWNER/NAME --to model/somebodys`" in done.stderr
    root, done = fetch("--profile", "wan-1.3b")  # this hub answers for every name
    assert done.stderr.startswith("Fetching Wan-AI/Wan2.1-T2V-1.3B-Diffusers into ")
    assert done.stdout == f"{root}/model/Wan2.1-T2V-1.3B-Diffusers\n"
