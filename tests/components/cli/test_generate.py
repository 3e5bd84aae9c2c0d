"""`univigu caption`, `generate` and `joint` as people meet them: what they print, write and refuse."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from components.cli import chosen_model
from components.cli.main import main
from univigu.errors import CorruptDataError, DiskFullError, TransientError
from univigu.video import decode_mp4, encode_mp4, read_video


@pytest.fixture
def univigu(monkeypatch, capsys):
    """Run the command with these arguments: (exit code, standard output, standard error).

    A process of its own hushes tqdm before anything imports it; here, the libraries' own switches do the same.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    state = logging.root.manager.disable

    def run(*arguments):
        monkeypatch.delenv("UNIVIGU_QUIET", raising=False)  # what --quiet leaves for child processes
        monkeypatch.setattr(sys, "argv", ["univigu", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    yield run
    os.environ.pop("UNIVIGU_QUIET", None)
    logging.disable(state)
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for name, shape in {"clip": (9, 32, 32, 3), "portrait": (40, 96, 54, 3), "single": (1, 32, 32, 3)}.items():
        frames = rng.integers(0, 256, shape, dtype=np.uint8)
        (folder / f"{name}.mp4").write_bytes(encode_mp4(frames, 8))
    (folder / "dark.mp4").write_bytes(encode_mp4(np.zeros((9, 32, 32, 3), dtype=np.uint8), 8))
    (folder / "text.mp4").write_text("This is a letter, and no video.\n" * 20)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:10,\nclip.mp4\n#EXT-X-ENDLIST\n")
    return folder


def test_a_caption_is_one_line_on_standard_output_and_nothing_else(univigu, clips, speaking_model):
    code, out, err = univigu("caption", clips / "clip.mp4", "--model", speaking_model)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"\S[^\n]*\n", out)
    assert univigu("caption", clips / "clip.mp4", "--model", speaking_model)[1] == out


def test_several_files_of_any_shape_are_captioned_in_order(univigu, clips, speaking_model):
    files = [clips / "portrait.mp4", clips / "clip.mp4"]
    code, out, _ = univigu("caption", *files, "--json", "--model", speaking_model, "--seed", 5)
    said = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["file"] for row in said] == [str(file) for file in files]
    _, alone, _ = univigu("caption", files[1], "--model", speaking_model, "--seed", 5)
    assert alone == said[1]["caption"] + "\n"


def test_a_caption_depends_neither_on_the_other_files_nor_on_their_order(univigu, clips, speaking_model):
    files = [clips / "clip.mp4", clips / "dark.mp4", clips / "clip.mp4"]
    options = ("--model", speaking_model, "--steps", 2, "--seed", 5)
    code, out, _ = univigu("--quiet", "caption", *files, *options)
    said = out.splitlines()
    assert (code, len(said)) == (0, 3)
    assert said[0] == said[2]
    assert univigu("--quiet", "caption", *files[1:], *options)[1].splitlines() == said[1:]
    assert univigu("caption", files[1], *options)[1].splitlines() == said[1:2]


def test_a_file_that_can_not_be_read_is_named_and_the_others_get_their_captions(univigu, clips, speaking_model):
    options = ("--model", speaking_model, "--steps", 2, "--seed", 5)
    good = clips / "clip.mp4"
    _, whole, _ = univigu("caption", good, good, good, *options)
    code, out, err = univigu("--quiet", "caption", good, clips / "text.mp4", good, clips / "none.mp4", *options)
    assert out.splitlines() == whole.splitlines()[:2]
    assert [name in line for name, line in zip(("text.mp4", "none.mp4"), err.splitlines(), strict=True)] == [True, True]
    assert code == 65
    assert univigu("caption", clips / "none.mp4", good, clips / "text.mp4", *options)[0] == 66


def test_a_generated_clip_plays_anywhere_and_follows_its_seed(univigu, tmp_path, speaking_model):
    import av

    made = {}
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        path = tmp_path / f"{name}.mp4"
        options = ("-o", path, "--model", speaking_model, "--seed", seed, "--scale", 1)
        code, out, err = univigu("generate", "a red seven", *options)
        assert (code, out) == (0, "")
        assert "9 frames of 32x32" in err
        made[name] = path.read_bytes()
    assert made["a"] == made["b"] != made["c"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert (container.streams.video[0].codec_context.pix_fmt, container.streams.video[0].frames) == ("yuv420p", 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


def test_a_clip_unlike_held_out_ones_is_reported_with_its_measures(univigu, clips, tmp_path, speaking_model):
    model = tmp_path / "model"
    shutil.copytree(speaking_model, model)
    (tmp_path / "videos").mkdir()
    shutil.copy(clips / "dark.mp4", tmp_path / "videos")
    shutil.copy(clips / "dark.mp4", tmp_path / "videos/again.mp4")
    row = json.loads(univigu("caption", "--json", clips / "clip.mp4", "--model", model)[1])
    assert (row["unusual"], row["fidelity"], 0 <= row["confidence"] < 1) == (None, None, True)
    assert univigu("--quiet", "model", "calibrate", model, "--clips", tmp_path / "videos")[0] == 0
    code, out, err = univigu("caption", "--json", clips / "dark.mp4", "--model", model)
    assert (code, json.loads(out)["unusual"], err) == (0, False, "")
    reference = json.loads((model / "confidence.json").read_text())
    assert reference["clips"] == 2
    reference["least"]["fidelity"] = 98.0
    (model / "confidence.json").write_text(json.dumps(reference))
    code, out, err = univigu("caption", "--json", clips / "dark.mp4", "--model", model)
    row = json.loads(out)
    assert (code, row["unusual"]) == (0, True)
    assert f"is unlike the clips that this model knows: its latents reproduce it with {row['fidelity']:.1f} dB" in err


def test_a_folder_stands_for_its_videos_and_a_picture_is_called_one(univigu, clips, tmp_path, speaking_model):
    (tmp_path / "videos/of-one-clip").mkdir(parents=True)
    shutil.copy(clips / "clip.mp4", tmp_path / "videos/of-one-clip/a.mp4")
    code, out, _ = univigu("caption", "--json", tmp_path / "videos", "--model", speaking_model)
    assert (code, json.loads(out)["file"]) == (0, f"{tmp_path}/videos/of-one-clip/a.mp4")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    result = univigu("caption", tmp_path / "photo.jpg", "--model", speaking_model)
    assert_refused(result, 65, "photo.jpg' is a picture, and a caption needs a clip")
    (tmp_path / "empty").mkdir()
    assert_refused(univigu("caption", tmp_path / "empty", "--model", speaking_model), 66, "There is no video in")


@pytest.mark.parametrize(("name", "container"), [("a.webm", "matroska,webm"), ("b.gif", "gif"), ("c.MP4", "mov,mp4")])
def test_a_clip_has_the_format_that_its_name_asks_for_and_is_large_enough_to_see(
    univigu, tmp_path, speaking_model, name, container
):
    import av

    code, _, err = univigu("generate", "a red seven", "-o", tmp_path / name, "--model", speaking_model, "--steps", 1)
    assert (code, "enlarged from 32x32 (`--scale 1` turns this off)" in err) == (0, True)
    with av.open(str(tmp_path / name)) as video:
        assert video.format.name.startswith(container)
    assert read_video(tmp_path / name)[0].shape == (9, 256, 256, 3)


def test_a_clip_without_a_name_is_named_after_its_prompt_and_replaces_nothing(
    univigu, tmp_path, speaking_model, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert univigu("generate", "A red seven, moving up!", "--model", speaking_model, "--steps", 1)[0] == 0
    assert univigu("joint", "--model", speaking_model, "--steps", 1)[0] == 0
    names = ["a-red-seven-moving-up-2.mp4", "a-red-seven-moving-up-3.mp4", "a-red-seven-moving-up.mp4", "clip.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len({path.read_bytes() for path in tmp_path.glob("a-red*")}) == 1


def test_unknown_words_are_named_with_what_the_model_knows_and_the_clip_is_made(univigu, tmp_path, speaking_model):
    options = ("--model", speaking_model, "--steps", 1, "-o", tmp_path / "clip.mp4")
    code, _, err = univigu("generate", "a red zebra, moving up", *options)
    assert (code, (tmp_path / "clip.mp4").is_file()) == (0, True)
    assert err.startswith("This model doesn't know 'zebra'; the clip may ignore it. It knows ")
    assert {"red", "seven", "up"} - {*re.findall(r"[\w-]+", err)} == {"up"}  # short words are not listed
    assert "doesn't know" not in univigu("joint", "a red seven, moving up", *options)[2]
    assert univigu("--quiet", "generate", "a red zebra", *options)[2] == ""


def test_joint_prints_the_caption_and_writes_the_clip_even_without_a_prompt(univigu, tmp_path, speaking_model):
    path = tmp_path / "both.mp4"
    path.write_text("an older file")
    code, out, _ = univigu("joint", "-o", path, "--model", speaking_model, "--steps", 2, "--scale", 4)
    assert code == 0
    assert re.fullmatch(r"\S[^\n]*\n", out)
    assert decode_mp4(path.read_bytes())[0].shape == (9, 128, 128, 3)


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("none.mp4", 66, "no video file"),
        ("text.mp4", 65, "not possible to read"),
        ("empty.mp4", 65, "not possible to read"),
        ("list.mp4", 65, "not possible to read"),
        ("single.mp4", 65, "single frame"),
    ],
)
def test_what_is_no_video_is_refused_in_one_sentence(univigu, clips, speaking_model, file, code, message):
    assert_refused(univigu("caption", clips / file, "--model", speaking_model), code, message)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "prompt is empty"), (" \n", "prompt is empty"), ("seven " * 10_000, r"prompt has \d+ tokens.* at most")],
)
def test_a_prompt_that_cannot_be_read_writes_nothing(univigu, tmp_path, speaking_model, prompt, message):
    result = univigu("generate", prompt, "-o", tmp_path / "clip.mp4", "--model", speaking_model)
    assert_refused(result, 65, message)
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_clip_can_be_written_is_refused_before_the_model_is_loaded(univigu, tmp_path):
    for output, code, message in (
        (tmp_path / "none" / "clip.mp4", 66, "no folder"),
        (tmp_path, 65, "is a folder"),
        (tmp_path / "clip.avi", 65, "written as mp4, webm or gif"),
    ):
        result = univigu("generate", "a red seven", "-o", output, "--model", tmp_path / "no-model")
        assert_refused(result, code, message)


@pytest.mark.parametrize("command", ["generate", "joint"])
def test_a_lora_that_is_not_there_is_refused_before_the_model_is_loaded(univigu, tmp_path, command):
    result = univigu(command, "a red seven", "--lora", tmp_path / "style.bin", "--model", tmp_path / "no-model")
    assert_refused(result, 65, "There is no LoRA file")


def test_a_full_disk_is_said_and_leaves_nothing(univigu, speaking_model):
    result = univigu("generate", "a red seven", "-o", "/dev/full", "--model", speaking_model)
    assert_refused(result, DiskFullError.exit_code, "disk is full")


@pytest.fixture
def no_bundled_model(monkeypatch, tmp_path):
    """A clone without the bundled model, as that of somebody who has removed it."""
    monkeypatch.setattr(chosen_model, "CLONE", tmp_path / "clone")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.usefixtures("no_bundled_model")
def test_without_a_registered_model_the_bundled_one_is_used_and_named(univigu, clips, tmp_path, speaking_model):
    shutil.copytree(speaking_model, tmp_path / "model/tiny-univigu")
    code, out, err = univigu("caption", clips / "clip.mp4", "--root", tmp_path)
    line = f"Using the bundled model {tmp_path}/model/tiny-univigu; `make demo` trains your own.\n"
    assert (code, err) == (0, line)
    assert out == univigu("caption", clips / "clip.mp4", "--model", speaking_model)[1]
    assert univigu("--quiet", "caption", clips / "clip.mp4", "--root", tmp_path) == (0, out, "")
    result = univigu("caption", clips / "clip.mp4", "--root", tmp_path, "--name", "another")
    assert_refused(result, 66, "No model is registered")


@pytest.mark.usefixtures("no_bundled_model")
def test_without_any_model_people_are_told_how_to_get_one(univigu, clips, tmp_path):
    result = univigu("caption", clips / "clip.mp4", "--root", tmp_path)
    assert_refused(result, 66, "No model is registered .* `make demo`.* `univigu run register-model`.* --root")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_bundled_model")
def test_a_registry_that_cannot_be_read_or_reached_is_told_from_one_without_a_model(univigu, tmp_path, monkeypatch):
    arguments = ("generate", "a red seven", "-o", tmp_path / "clip.mp4", "--root", tmp_path)
    (tmp_path / "mlflow.db").write_text("This is a letter, and no database.\n" * 100)
    message = "mlflow.db can't be read .*not a database.* `univigu run register-model`"
    assert_refused(univigu(*arguments), CorruptDataError.exit_code, message)
    (tmp_path / "mlflow.db").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert_refused(univigu(*arguments), TransientError.exit_code, "http://127.0.0.1:9 does not answer")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty.db'}")
    assert_refused(univigu(*arguments), 66, "no model at models:/uni-vigu@champion")


@pytest.mark.slow
def test_a_model_may_be_a_link_or_a_hub_repository_that_is_fetched_only_when_asked_for(
    univigu, clips, tmp_path, speaking_model, hub
):
    (tmp_path / "link").symlink_to(speaking_model)
    code, out, _ = univigu("caption", clips / "clip.mp4", "--model", tmp_path / "link")
    assert code == 0
    hub.files = {str(path.relative_to(speaking_model)): path.read_bytes() for path in speaking_model.rglob("*.*")}
    command = [sys.executable, "-m", "components.cli.main", "caption", clips / "clip.mp4", "--model", "me/model"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    results = [
        subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)
        for more in ({}, {"HF_HUB_OFFLINE": "0"}, {})
    ]
    assert_refused((results[0].returncode, results[0].stdout, results[0].stderr), 66, "set HF_HUB_OFFLINE=0 to fetch")
    assert [one.stdout for one in results[1:]] == [out, out]
    assert without_activities(results[1].stderr) == "Fetching what is missing of me/model from the hub.\n"


def test_a_folder_that_holds_no_model_or_a_damaged_one_is_refused(univigu, clips, tmp_path, speaking_model):
    clip = clips / "clip.mp4"
    assert_refused(univigu("caption", clip, "--model", tmp_path / "none"), 66, "no model folder")
    assert_refused(univigu("caption", clip, "--model", tmp_path), 66, "model_index.json")
    damaged = tmp_path / "damaged"
    shutil.copytree(speaking_model, damaged)
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(univigu("caption", clip, "--model", damaged), CorruptDataError.exit_code, "can't be loaded")


def without_activities(stderr):
    """What was said, less the lines that name work of seconds: only a slow machine prints them."""
    return re.sub(r"^[^:\n]+ \.\.\.\n", "", stderr, flags=re.M)


def assert_refused(result, code, message):
    """One sentence on standard error, its own exit code, and nothing on standard output."""
    assert (result[0], result[1]) == (code, "")
    said = without_activities(result[2])
    assert re.fullmatch(r"univigu: [^\n]+[.]\n", said)
    assert re.search(message, said)


def test_a_file_that_cannot_be_written_is_told_in_one_sentence():
    forbidden = "/sys/pipeline.yaml"  # also for root
    command = [sys.executable, "-m", "components.cli.main", "pipeline", "compile", "--output", forbidden]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    err = done.stderr
    assert (done.returncode, err.count("\n")) == (65, 1)
    assert err.startswith("univigu: /sys/pipeline.yaml can't be used (Permission denied); ")


def test_choosing_a_profile_elsewhere_than_in_the_project_writes_nothing(univigu, tmp_path):
    code, _, err = univigu("use", "smoke", "--root", tmp_path)
    assert code == 78
    assert f"There is no dvc.yaml in {tmp_path}" in err
    assert list(tmp_path.iterdir()) == []
