"""The content of a request to a vision-language model: a template's messages, and pictures from a clip.

Prompts are untrusted. They are values in a template, never part of one; the system message is the same for every clip;
and the marker lines around a prompt contain its digest, so that no prompt can contain its own marker.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from components.pipeline.digests import json_digest
from univigu.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from components.captions.captioners import CaptionRequest

WORDS_PER_TOKEN = (0.85, 0.68)  # English words per token, on the safe side of the range's lower and upper end
QUALITIES = (85, 70, 55, 40)  # of JPEG, in the order they are tried


@dataclass(frozen=True)
class Template:
    """A request template, ``components/captions/captioners/templates/<name>.yaml``."""

    name: str
    digest: str
    system: str
    user: Any  # jinja2 templates
    again: Any


def load_template(name: str) -> Template:
    """The bundled template called `name`; raises `ConfigError` for an unknown name."""
    import jinja2
    import yaml

    folder = resources.files("components.captions") / "captioners" / "templates"
    names = sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f"There is no request template '{name}'; choose one of {', '.join(names)}.")
    texts = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return Template(
        name,
        json_digest(texts),
        texts["system"].strip(),
        environment.from_string(texts["user"]),
        environment.from_string(texts["again"]),
    )


def write_messages(template: Template, request: "CaptionRequest", times: Sequence[float]) -> list[dict[str, str]]:
    """The messages of one request, each with role and text: system, user, and after a complaint the previous answer.

    times: of the pictures in the first user message, in seconds; empty for a text-only model.
    """
    low, high = (round(bound * factor) for bound, factor in zip(request.token_range, WORDS_PER_TOKEN, strict=True))
    values = {"words": (low, max(low, high)), "times": [f"{time:.1f}" for time in times]}
    asked = template.user.render(prompt=request.prompt, marker=marker(request.prompt), **values).strip()
    messages = [{"role": "system", "text": template.system}, {"role": "user", "text": asked}]
    if not request.complaint:
        return messages
    again = template.again.render(complaint=request.complaint, marker=marker(request.complaint), **values).strip()
    if not request.last_text:  # some services reject an empty assistant message
        messages[1]["text"] = f"{asked}\n\n{again}"
        return messages
    return [*messages, {"role": "assistant", "text": request.last_text}, {"role": "user", "text": again}]


def marker(text: str) -> str:
    """The line before and after an untrusted text."""
    return f"=== {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]} ==="


def sample_frames(frames: "np.ndarray", fps: float, count: int) -> tuple["np.ndarray", list[float]]:
    """`count` evenly spaced frames (all, if there are fewer), uint8 (N, H, W, 3), and their times in seconds."""
    import numpy as np

    indices = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return frames[indices], [float(index / fps) for index in indices]


def fit(frame: "np.ndarray", max_side: int) -> "Image.Image":
    """A frame, uint8 (H, W, 3), as a picture, scaled down to sides of at most `max_side` pixels."""
    from PIL import Image

    picture = Image.fromarray(frame)
    picture.thumbnail((max_side, max_side))
    return picture


def jpeg(frame: "np.ndarray", max_side: int, max_bytes: int) -> bytes:
    """A frame, uint8 (H, W, 3), as JPEG with sides of at most `max_side` pixels, or smaller to fit into `max_bytes`."""
    picture = fit(frame, max_side)
    while True:
        for quality in QUALITIES:
            target = io.BytesIO()
            picture.save(target, "JPEG", quality=quality)
            if target.tell() <= max_bytes or max(picture.size) <= 32:
                return target.getvalue()
        picture = picture.resize([max(1, side // 2) for side in picture.size])


def data_url(content: bytes) -> str:
    """JPEG bytes as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
