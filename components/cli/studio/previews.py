"""What the previews of a result cost: a program that prints JSON, for `univigu bench studio`."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from components.cli import chosen_model
from components.cli.studio.tracing import Tracer, fit_colours

MODEL = Path(__file__).resolve().parents[3] / "model/tiny-univigu"
PROMPT = "a red seven moves left"
STEPS, RUNS = 50, 3


def measure(steps: int = STEPS, runs: int = RUNS) -> dict[str, dict[str, float]]:
    """For each kind of result, milliseconds of a step and of its preview, and the latter's share of the former.

    With the bundled model, after a short run that isn't counted.
    """
    pipeline = chosen_model.load(MODEL)
    colours = fit_colours(pipeline.vae)

    def time_one(text_steps: int, call: Callable[..., Any]) -> dict[str, float]:
        took: list[tuple[float, float]] = []
        for number in (pipeline.config.caption_steps, *[steps] * runs):
            tracer = Tracer(pipeline, 0, lambda *_: False, colours, number, text_steps and number)
            began = time.perf_counter()
            call(tracer, number)
            took.append((time.perf_counter() - began, tracer.seconds))
        step, preview = (1000 * sum(parts) / (steps * runs) for parts in zip(*took[1:], strict=True))
        return {"step_ms": round(step, 2), "preview_ms": round(preview, 3), "share": round(preview / step, 4)}

    return {
        "video": time_one(0, partial(_generate, pipeline)),
        "video_and_text": time_one(1, partial(_joint, pipeline)),
    }


def _generate(pipeline: Any, tracer: Tracer, steps: int) -> None:
    pipeline.generate(PROMPT, num_inference_steps=steps, seed=[0], callback_on_step_end=tracer)


def _joint(pipeline: Any, tracer: Tracer, steps: int) -> None:
    watched = {"callback_on_step_end": tracer, "callback_on_step_end_tensor_inputs": list(tracer.inputs)}
    pipeline.joint(PROMPT, num_inference_steps=steps, in_step=True, seed=[0], **watched)


if __name__ == "__main__":
    print(json.dumps(measure()))
