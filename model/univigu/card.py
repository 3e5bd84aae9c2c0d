"""The model card that is saved with a pipeline: made of its configuration alone, so equal models have equal cards."""

from typing import Any

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
tags:
- uni-vigu
- text-to-video
- video-captioning
- video-text-to-text
---

# Uni-ViGU

One diffusion transformer that makes videos from text, captions videos, and makes both jointly. Its video side is
Wan's, under Wan's names; a second feed-forward network in each block and a text space of its own make it read and write
text. This card was written by `save_pretrained`.

## Use

```python
from diffusers import DiffusionPipeline
from univigu import UniViGUPipeline, export_to_video  # pip install uni-vigu; the import makes diffusers know the class

pipe = DiffusionPipeline.from_pretrained("FOLDER")
output = pipe("what the video shows")                 # text to video
export_to_video(output.frames[0], "video.mp4", fps={fps:g})

captions = pipe.caption(output.frames[0])             # video to text: RGB frames (F, H, W, 3), of any size and length
output = pipe.joint("what the video shows")           # both: output.frames and output.captions
```

## What it makes

| | |
|---|---|
| video | {num_frames} frames of {height}x{width} pixels at {fps:g} frames a second |
| prompt | up to {prompt_length} tokens |
| caption | up to {text_length} tokens |
| sampling | {num_inference_steps} steps, guidance {guidance_scale:g}, {schedule} |
| captioning | {caption_steps} steps, guidance {caption_guidance_scale:g}, temperature {caption_temperature:g} |
| transformer | {parameters:,} parameters, of which {text_parameters:,} are the text side's |

A video of another size or length can be asked for (`height`, `width`, `num_frames`); the model was trained on the one
above.
"""


def write_card(pipeline: Any) -> str:
    """The text of the README.md of a pipeline."""
    from . import wan

    config, transformer = pipeline.config, pipeline.transformer
    text_length = transformer.config.text_length
    counts = {name: parameter.numel() for name, parameter in transformer.named_parameters()}
    return _CARD.format(
        **{name: config[name] for name in _SETTINGS},
        prompt_length=min(config.max_sequence_length, text_length),
        text_length=text_length,
        schedule=type(pipeline.scheduler).__name__ if pipeline.scheduler else f"Euler with shift {config.shift:g}",
        parameters=sum(counts.values()),
        text_parameters=sum(count for name, count in counts.items() if wan.is_text_side(name)),
    )


_SETTINGS = (
    "num_frames",
    "height",
    "width",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "caption_steps",
    "caption_guidance_scale",
    "caption_temperature",
)
