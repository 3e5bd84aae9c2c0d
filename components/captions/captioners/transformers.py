"""A vision-language model in this process: any image-text-to-text model of transformers, from a local folder.

It uses the same templates as requests to an endpoint. Decoding is greedy, so that equal clips get equal captions.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.captions.captioners import (
    Captioner,
    CaptionRequest,
    CaptionResponse,
    Clip,
    FollowUp,
    caption_in_batches,
    read_options,
    read_text,
)
from components.captions.captioners.wording import fit, load_template, sample_frames, write_messages
from components.pipeline.digests import json_digest, tree_digest
from components.pipeline.manifests import inside
from univigu.errors import BadInputError, ConfigError, MissingInputError
from univigu.local_models import LOCAL, WEIGHTS, require_safetensors

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Options:
    """`caption_videos.options` in a profile."""

    folder: str  # under the work root: a model and its processor, as `save_pretrained` writes them
    template: str = "video-caption-1"
    frames: int = 8  # per clip
    max_side: int = 512  # of a frame, in pixels
    precision: str = "auto"  # auto: bf16 on a GPU, otherwise fp32
    generation: dict = field(default_factory=lambda: {"max_new_tokens": 512})  # arguments of `generate`


def create(config: Mapping[str, Any]) -> Captioner:
    """The captioner with the profile's options and `batch_size`. The model is loaded with the first batch.

    Raises `MissingInputError` if the folder has no model, `BadInputError` if its weights aren't safetensors, and
    `ConfigError` for an invalid option.
    """
    options = read_options(Options, config, "transformers")
    folder = inside(config["root"], options.folder)
    if not (folder / "config.json").is_file():
        raise MissingInputError(
            f"There is no model in {folder} (`caption_videos.options.folder`); save one there with `save_pretrained`, "
            "together with its processor."
        )
    require_safetensors(folder)
    if options.precision not in PRECISIONS or min(options.frames, options.max_side) < 1:
        raise ConfigError(
            f"The captioner 'transformers' needs a precision of {', '.join(PRECISIONS)}, and `frames` and `max_side` "
            "of at least 1; correct `caption_videos.options`."
        )
    if options.generation.get("do_sample"):
        raise ConfigError("The captioner 'transformers' decodes greedily; remove `do_sample` from `generation`.")
    return Transformers(options, folder, config["batch_size"])


class Transformers:
    """See `Captioner`."""

    name = "transformers"

    def __init__(self, options: Options, folder: Path, batch_size: int) -> None:
        self.options, self.folder, self.batch_size = options, folder, batch_size
        self.template = load_template(options.template)
        self.template_version, self.instructions = self.template.name, self.template.system
        asked = (options.frames, options.max_side, options.precision, options.generation)
        self.digest = json_digest([self.template.digest, tree_digest([folder], relative_to=folder), *asked])

    def check(self) -> None:
        """Nothing to check: `create` has found the model."""

    def caption(self, requests: Iterable[CaptionRequest], follow_up: FollowUp) -> None:
        caption_in_batches(self.answer, requests, follow_up, self.batch_size)

    def answer(self, requests: Sequence[CaptionRequest], clips: Sequence[Clip]) -> list[CaptionResponse]:
        """Caption all clips in one call of `generate`."""
        import torch

        conversations = [self.conversation(request, clip) for request, clip in zip(requests, clips, strict=True)]
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        except ValueError as error:
            raise ConfigError(
                f"The processor in {self.folder} doesn't support conversations with pictures ({_first_line(error)}); "
                "use a vision-language chat model."
            ) from error
        inputs = inputs.to(self.model.device, self.model.dtype)
        settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **self.options.generation}
        with torch.inference_mode():
            written = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [self._respond(ids, length) for ids, length in zip(written, lengths, strict=True)]

    def conversation(self, request: CaptionRequest, clip: Clip) -> list[dict[str, Any]]:
        """The template's messages in transformers' format; the frames precede the text of the first user message."""
        frames, times = sample_frames(*clip, self.options.frames)
        pictures = [{"type": "image", "image": fit(frame, self.options.max_side)} for frame in frames]
        messages = write_messages(self.template, request, times)
        first = next(message for message in messages if message["role"] == "user")
        return [
            {
                "role": message["role"],
                "content": [*(pictures if message is first else ()), {"type": "text", "text": message["text"]}],
            }
            for message in messages
        ]

    def _respond(self, ids: "torch.Tensor", prompt_tokens: int) -> CaptionResponse:
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        ended = [place for place, token in enumerate(ids.tolist()) if token in ends]
        count = ended[0] + 1 if ended else len(ids)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
        response = read_text(self.processor.decode(ids[:count], skip_special_tokens=True), usage)
        if not ended:
            return CaptionResponse(response.text, "truncated", "it was cut off before its end; say less", usage)
        return response

    @cached_property
    def processor(self) -> Any:
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(self.folder, **LOCAL)
        except (OSError, ValueError, TypeError) as error:
            raise self._unreadable(error) from error
        if not hasattr(processor, "image_processor"):
            raise ConfigError(f"The model in {self.folder} doesn't read pictures; name a vision-language model.")
        processor.tokenizer.padding_side = "left"  # generated tokens follow the last token of each prompt
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    @cached_property
    def model(self) -> Any:
        """The model, on the GPU if there is one."""
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText

        device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        dtype = kinds.get(self.options.precision) or (torch.bfloat16 if device == "cuda" else torch.float32)
        try:
            model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype, **WEIGHTS)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise self._unreadable(error) from error
        return model.eval().to(device)

    def _unreadable(self, error: Exception) -> BadInputError:
        return BadInputError(
            f"transformers can't load a vision-language model from {self.folder} ({_first_line(error)}); save it there "
            "again, together with its processor."
        )


def _first_line(error: Exception) -> str:
    return re.split(r"[\r\n]", str(error).strip())[0][:200]
