"""A CLIP-like model that judges clips and texts; from a folder, nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.errors import MissingInputError
from univigu.local_models import LOCAL, WEIGHTS, require_safetensors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FRAMES = 8  # evenly spaced, per clip
PROMPTS = 64  # embedded at once


class ClipScorer:
    """Any transformers model with CLIP's interface, such as CLIP or SigLIP."""

    def __init__(self, model: Any, tokenizer: Any, images: Any) -> None:
        self.model, self.tokenizer, self.images = model, tokenizer, images

    def videos(self, frames: "np.ndarray") -> list["Tensor"]:
        """The mean embedding of each clip's frames, on the CPU; frames uint8 (B, F, H, W, 3)."""
        import numpy as np
        import torch

        found = []
        for clip in frames:
            chosen = clip[np.linspace(0, len(clip) - 1, min(FRAMES, len(clip))).round().astype(int)]
            pixels = self.images(list(chosen), return_tensors="pt")["pixel_values"].to(self.model.device)
            with torch.no_grad():
                embedded = _features(self.model.get_image_features(pixel_values=pixels))
            found.append(torch.nn.functional.normalize(embedded.float(), dim=-1).mean(0).cpu())
        return found

    def nearest(self, videos: Sequence["Tensor"], prompts: Sequence[str]) -> list[str]:
        """The prompt with the embedding most similar to each video's; of equal ones, the first."""
        import torch

        different = list(dict.fromkeys(prompts))
        table = self.texts(different)
        return [different[int(index)] for index in (torch.stack(list(videos)) @ table.T).argmax(-1)]

    def texts(self, texts: Sequence[str]) -> "Tensor":
        """The normalised embedding of each text (N, D) in fp32, on the CPU; only as much of it as the model takes."""
        import torch

        found = []
        for start in range(0, len(texts), PROMPTS):
            tokens = self.tokenizer(
                list(texts[start : start + PROMPTS]), padding="max_length", truncation=True, return_tensors="pt"
            )
            known = {key: tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask") if key in tokens}
            with torch.no_grad():
                found.append(_features(self.model.get_text_features(**known)).float().cpu())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def load(folder: Path) -> ClipScorer:
    """The model in `folder`, in transformers' layout and safetensors, on the GPU if there is one."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise MissingInputError(
            f"There is no CLIP model at {folder}; put one in transformers' layout there, or take the folder out of the "
            "profile."
        )
    require_safetensors(folder)
    try:
        model = AutoModel.from_pretrained(folder, **WEIGHTS)
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        images = AutoImageProcessor.from_pretrained(folder, use_fast=False, **LOCAL)
    except (OSError, ValueError, SafetensorError) as error:
        raise MissingInputError(
            f"The CLIP model at {folder} can't be loaded ({str(error).splitlines()[0]}); download it again."
        ) from error
    return ClipScorer(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, images)


def _features(output: Any) -> "Tensor":
    """The embeddings; newer versions of transformers return them in an object with the hidden states."""
    return getattr(output, "pooler_output", output)
