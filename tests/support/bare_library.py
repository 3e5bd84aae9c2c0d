"""What the library does with nothing installed but itself: run it in an environment that holds `pip install .` alone.

It writes a clip, captions it with an untrained Uni-ViGU, and generates another clip. It prints the versions it ran on.
"""

import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import univigu
from univigu.video import decode_mp4, encode_mp4

BASE = Path(__file__).resolve().parents[2] / "model/tiny-wan"
ABSENT = ("components", "dags", "mlflow", "deepspeed", "pandas")


def main() -> None:
    found = [name for name in ABSENT if find_spec(name)]
    assert not found, f"more than the library is installed: {found}"
    with tempfile.TemporaryDirectory() as place:
        model, clip = Path(place, "model"), Path(place, "clip.mp4")
        univigu.UniViGUPipeline.from_wan(
            BASE, text_length=32, text_latent_dim=16, num_frames=9, height=32, width=32
        ).save_pretrained(model)
        pipeline = univigu.UniViGUPipeline.from_pretrained(model)
        clip.write_bytes(encode_mp4(np.full((9, 32, 32, 3), 128, np.uint8), 8))
        (caption,) = pipeline.caption(decode_mp4(clip)[0], num_inference_steps=2)
        (frames,) = pipeline.generate("a red five", num_inference_steps=2)
    assert isinstance(caption, str)
    assert frames.shape[-1] == 3
    print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in ("torch", "diffusers", "av")))


if __name__ == "__main__":
    main()
