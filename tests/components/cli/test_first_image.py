"""`--image` of `univigu generate` and `joint`: the first frame of bases that take one, and one sentence otherwise."""

import numpy as np
import pytest
import torch
from PIL import Image

from base_folders import images, text_parts, ti2v_folder
from components.cli import first_image
from components.cli.main import main
from univigu import UniViGUPipeline
from univigu.video import read_video

__all__ = ["images", "text_parts", "ti2v_folder"]


@pytest.fixture
def univigu(monkeypatch, capsys):
    """Run the command with these arguments: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["univigu", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def model(ti2v_folder, tmp_path_factory):
    """A Uni-ViGU on the tiny Wan2.2 TI2V."""
    settings = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 2, "caption_steps": 2}
    pipeline = UniViGUPipeline.from_wan(ti2v_folder, **settings, max_sequence_length=24, text_length=12)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.nn.init.normal_(pipeline.transformer.text_head.proj_out.weight, std=3.0)
    folder = tmp_path_factory.mktemp("uni-vigu") / "ti2v"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path, images):
    images[0].save(tmp_path / "first.png")
    return tmp_path / "first.png"


@pytest.mark.parametrize("command", [("generate", "a red five"), ("joint",)], ids=lambda words: words[0])
def test_a_video_starts_with_the_picture_that_is_given(univigu, model, picture, tmp_path, command):
    made = {}
    for name, more in {"with": ("--image", picture), "without": ()}.items():
        clip = tmp_path / f"{name}.mp4"
        code, _, err = univigu(*command, "-o", clip, "--model", model, "--scale", 1, "--seed", 3, *more)
        assert (code, "stretched to the video's 64x64" in err) == (0, name == "with")
        made[name] = read_video(clip)[0]
    assert np.abs(made["with"][0].astype(float) - made["without"][0]).mean() > 1


def test_a_picture_for_a_base_that_takes_none_is_refused_before_the_model_is_loaded(
    univigu, speaking_model, picture, tmp_path
):
    code, out, err = univigu(
        "generate", "a red five", "-o", tmp_path / "a.mp4", "--model", speaking_model, "--image", picture
    )
    assert (code, out, err.count("\n")) == (65, "", 1)
    assert "base is Wan text-to-video, which takes no image; leave --image out" in err
    assert not (tmp_path / "a.mp4").exists()


def damage(path, kind):
    if kind == "a text":
        path.write_text("This is a letter, and no picture.\n" * 20)
    elif kind == "half a picture":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "nothing":
        path.unlink()
    else:  # too many pixels, in a few bytes
        Image.new("1", (9000, 9000)).save(path)


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("a text", 65, "can't be read as a picture"),
        ("half a picture", 65, "can't be read as a picture"),
        ("a folder", 65, "is not a file; give a picture"),
        ("nothing", 66, "There is no picture"),
        ("a bomb", 65, "has 9000x9000 pixels, and a picture may have 64,000,000"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(univigu, model, picture, kind, code, message):
    damage(picture, kind)
    found, out, err = univigu("joint", "-o", picture.parent / "a.mp4", "--model", model, "--image", picture)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert message in err


def test_a_picture_is_taken_upright_and_large_files_are_not_opened(model, tmp_path, monkeypatch):
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg", exif=tags)
    assert first_image.read_first_image(tmp_path / "photo.jpg", model).size == (20, 30)
    monkeypatch.setattr(first_image, "MAX_BYTES", 100)
    with pytest.raises(first_image.BadInputError, match="MiB, and a picture may have"):
        first_image.read_first_image(tmp_path / "photo.jpg", model)
