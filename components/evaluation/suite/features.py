"""Features of clips from a video network in transformers' layout, such as VideoMAE, for the Fréchet video distance."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.errors import MissingInputError, first_line
from univigu.local_models import LOCAL, WEIGHTS, require_safetensors
from univigu.video import fit_frames

if TYPE_CHECKING:
    import numpy as np


class VideoFeatures:
    """A network that reads clips of one size; `read` makes any clip that size."""

    def __init__(self, model: Any, images: Any) -> None:
        self.model, self.images = model, images

    def read(self, frames: "np.ndarray") -> "np.ndarray":
        """The mean (d,) of the last hidden states of a clip, uint8 (F, H, W, 3) of any size."""
        import torch

        config = self.model.config
        fitted = fit_frames(frames, config.num_frames, config.image_size, config.image_size)
        pixels = self.images(list(fitted), return_tensors="pt")["pixel_values"].to(self.model.device)
        with torch.no_grad():
            return self.model(pixel_values=pixels).last_hidden_state[0].mean(0).float().cpu().numpy()


def load_features(folder: Path) -> VideoFeatures:
    """The network in `folder`, in transformers' layout and safetensors, on the GPU if there is one.

    Raises `MissingInputError` for a folder without one, or whose network doesn't say how many frames it reads.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, VideoMAEImageProcessor

    if not (folder / "config.json").is_file():
        raise MissingInputError(f"There is no video network in '{folder}' (no config.json); check --features.")
    require_safetensors(folder)
    try:
        model = AutoModel.from_pretrained(folder, **WEIGHTS)
        images = VideoMAEImageProcessor.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, SafetensorError) as error:
        raise MissingInputError(
            f"The video network in '{folder}' can't be loaded ({first_line(error)}); download it again."
        ) from error
    if not hasattr(model.config, "num_frames") or not hasattr(model.config, "image_size"):
        raise MissingInputError(
            f"The model in '{folder}' reads no clips of a known size (num_frames, image_size); give a video network "
            "such as VideoMAE."
        )
    return VideoFeatures(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), images)
