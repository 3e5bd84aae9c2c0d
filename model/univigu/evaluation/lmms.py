"""Uni-ViGU as a model of lmms-eval, for its video captioning tasks: `python -m lmms_eval --model univigu`.

lmms-eval finds it by the entry point ``lmms_eval.models`` of this package (its ``docs/guides/model_guide.md`` and
``lmms_eval/models/registry_v2.py``, version 0.7). It is a chat model: a request has the document's messages, of which
the video is captioned; the question in them is not read, because the model writes descriptions and answers nothing. So
tasks that score answers, or the likelihood of choices, are refused.

Only lmms-eval imports this module.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from univigu.errors import BadInputError, ConfigError, VideoError
from univigu.pipeline import UniViGUPipeline
from univigu.video import MAX_FRAMES, read_video

logger = logging.getLogger(__name__)
manifest = ModelManifest("univigu", chat_class_path="univigu.evaluation.lmms.UniViGU")


class UniViGU(lmms):
    """A trained model's captions. ``--model_args pretrained=FOLDER``, with ``seed`` and ``steps``.

    pretrained: a folder or a hub repository, as for `UniViGUPipeline.from_pretrained`. steps: Euler steps of a caption;
    0 for the model's default. What lmms-eval passes for other models (``batch_size``, ``device``) is accepted: each
    video is captioned alone, on ``device`` if it is given, otherwise on the GPU if there is one.
    """

    is_simple = False

    def __init__(self, pretrained: str, seed: int = 0, steps: int = 0, device: str | None = None, **_: Any) -> None:
        super().__init__()
        self.pipeline = UniViGUPipeline.from_pretrained(pretrained)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.seed, self.steps = int(seed), int(steps) or None

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A caption for each request's video, or for its pictures as the frames of one.

        Arguments of a request: (context, doc_to_messages, generation settings, document, task, split). Raises
        `BadInputError` for a request without a video. A video that can't be read has an empty caption, which is
        logged.
        """
        captions = []
        for request in requests:
            _, doc_to_messages, settings, document, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][document])
            try:
                (text,) = self.pipeline.caption([_frames(messages, task)], self.steps, seed=[self.seed])
            except VideoError as error:
                logger.warning("%s; document %s of %s has an empty caption", error, document, task)
                text = ""
            captions.append(text)
            self.cache_hook.add_partial("generate_until", (f"{task} {split} {document}", settings), text)
        return captions

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises `ConfigError`: the model answers no questions."""
        raise ConfigError("Uni-ViGU describes videos and chooses no answers; run a captioning task such as vdc.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises `ConfigError`: the model holds no conversation."""
        raise ConfigError("Uni-ViGU describes videos and holds no conversation; run a captioning task such as vdc.")


def _frames(messages: Sequence[dict[str, Any]], task: str) -> np.ndarray:
    """The frames, uint8 (F, H, W, 3), of the only video of messages, or of their pictures in order."""
    contents = [part for message in messages for part in message["content"] if isinstance(part, dict)]
    videos = [part["url"] for part in contents if part.get("type") == "video"]
    pictures = [np.asarray(part["url"].convert("RGB")) for part in contents if part.get("type") == "image"]
    if len(videos) == 1:
        return read_video(Path(videos[0]), MAX_FRAMES)[0]
    if len(pictures) > 1 and not videos and len({picture.shape for picture in pictures}) == 1:
        return np.stack(pictures)
    raise BadInputError(
        f"A document of the task '{task}' has {len(videos)} videos and {len(pictures)} pictures, and a caption needs "
        "one video, or pictures of one size; choose a task of video captioning."
    )
