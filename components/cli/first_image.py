"""The picture that `--image` names, which becomes a video's first frame: read within limits."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.cli.messages import say
from components.pipeline.lean_imports import import_models
from univigu.errors import BadInputError, MissingInputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 64 * 10**6
STRETCHED = 1.02  # ratio of shapes from which the command says that the picture is stretched

FirstImage = Annotated[
    Path | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="A picture to start the video with, for a model whose base takes one (Wan2.1 I2V, Wan2.2 TI2V); it is "
        "stretched to the video's shape.",
        show_default=False,
    ),
]


def read_first_image(path: Path | None, folder: Path) -> "Image | None":
    """The picture at ``path``, upright and RGB, for the model in ``folder``; None for no path.

    Raises `MissingInputError` if there is no such file, and `BadInputError` if it is no picture, is too large, or the
    model's base takes none.
    """
    if path is None:
        return None
    picture = _read(path)
    _check_base(folder)
    return picture


def warn_of_stretching(picture: "Image | None", height: int, width: int) -> None:
    """Say that the picture has another shape than the video."""
    if picture is None:
        return
    ratio = picture.width * height / (picture.height * width)
    if max(ratio, 1 / ratio) > STRETCHED:
        say(f"The picture, {picture.width}x{picture.height}, is stretched to the video's {width}x{height}.")


def _read(path: Path) -> "Image":
    from PIL import Image, ImageOps

    if not path.exists():
        raise MissingInputError(f"There is no picture '{path}'; check the path.")
    if not path.is_file():
        raise BadInputError(f"'{path}' is not a file; give a picture, such as a PNG or a JPEG.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise BadInputError(
            f"'{path}' has {size / 2**20:.0f} MiB, and a picture may have {MAX_BYTES >> 20}; make it smaller."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit of pixels comes first
            picture = Image.open(path, formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise BadInputError(
                    f"'{path}' has {picture.width}x{picture.height} pixels, and a picture may have {MAX_PIXELS:,}; make"
                    " it smaller."
                )
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadInputError(
            f"'{path}' can't be read as a picture ({first_line(error)}); give a PNG, JPEG, WebP, BMP, GIF or TIFF file."
        ) from error


def _check_base(folder: Path) -> None:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        transformer = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # loading the model says what is wrong with it
    import_models()
    from univigu.bases import find_base

    base = find_base(transformer, index)
    if base.show is None:
        raise BadInputError(
            f"This model's base is {base.name}, which takes no image; leave --image out, or use a model whose base is"
            " Wan2.1 I2V or Wan2.2 TI2V."
        )
