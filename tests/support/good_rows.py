"""Rows of prompts, clips and captions that pass every gate."""

import numpy as np

from components.digits import world
from components.prompts.filters import text_id
from components.prompts.tokens import count_tokens

COUNT = 40


def make_rows(tokenizer):
    """The rows of the tables `prompts`, `clips` and `captions`: the odd clips are for stage 2."""
    rng = np.random.default_rng(0)
    prompts, clips, captions = [], [], []
    while len(prompts) < COUNT:
        attributes = world.sample_attributes(rng)
        prompt, caption = world.write_prompt(attributes, rng), world.write_caption(attributes, rng)
        number, prompt_id = len(prompts), text_id(prompt)
        if prompt_id in {row["id"] for row in prompts}:
            continue
        prompt_tokens, caption_tokens = count_tokens(tokenizer, [prompt, caption])
        prompts.append(
            {"id": prompt_id, "text": prompt, "source": "test", "licence": "CC0-1.0", "language": "en"}
            | {"n_tokens": prompt_tokens, "scores": "{}", "verdict": "keep"}
        )
        stage = 1 + number % 2
        clips.append(
            {"id": f"c{number:03d}", "prompt_id": prompt_id, "prompt": prompt, "stage": stage, "seed": number}
            | {"generator": "test", "generator_digest": "0", "frames": 9, "height": 32, "width": 32, "fps": 8.0}
            | {"sha256": f"{number:064x}", "scores": "{}", "shard": "shards/00000/clips.tar", "member": f"{number}.mp4"}
        )
        captions.append(
            {"clip_id": f"c{number:03d}", "captioner": "test", "captioner_digest": "0", "template_version": "1"}
            | {"text": caption if stage == 2 else None, "n_tokens": caption_tokens if stage == 2 else 0}
            | {"status": "success" if stage == 2 else "skipped", "attempts": stage - 1}
        )
    return {"prompts": prompts, "clips": clips, "captions": captions}
