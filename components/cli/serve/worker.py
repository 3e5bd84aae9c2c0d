"""The thread that runs the model: batches of waiting requests, one after the other."""

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components.cli import chosen_model
from components.cli.serve.errors import ApiError
from components.cli.serve.limits import Limits
from components.cli.serve.line import Caption, Entry, Line
from components.cli.serve.metrics import Metrics
from univigu.errors import BadInputError, UniViGUError

if TYPE_CHECKING:
    from components.cli.serve.models import Served


class AbandonedError(UniViGUError):
    """Nobody waits for any result of a batch."""


class Worker(threading.Thread):
    """Takes batches from the line until it is closed; the batch that runs then is finished."""

    def __init__(self, line: Line, limits: Limits, metrics: Metrics) -> None:
        super().__init__(name="worker", daemon=True)
        self._line, self._limits, self._metrics = line, limits, metrics
        self._placed: Served | None = None

    def run(self) -> None:
        while batch := self._line.take(self._limits.batch):
            began = time.monotonic()
            self._finish(batch)
            seconds, kind = time.monotonic() - began, batch[0].kind
            self._line.pace = 0.8 * self._line.pace + 0.2 * seconds / len(batch)
            self._metrics.batches.labels(kind).observe(len(batch))
            self._metrics.batch_seconds.labels(kind).observe(seconds)

    def _finish(self, batch: Sequence[Entry]) -> None:
        """Set the result, or the error, of each request."""
        try:
            self._place(batch[0].model)
            results = make(batch, self._limits.batch, Report(batch, self._limits.seconds))
        except BadInputError as error:
            if len(batch) == 1:
                self._settle(batch[0], error)
            for entry in batch if len(batch) > 1 else ():  # one of them is wrong, and the others aren't
                self._finish([entry])
        except BaseException as error:
            for entry in batch:
                self._settle(entry, error)
        else:
            for entry, result in zip(batch, results, strict=True):
                self._settle(entry, result)

    def _settle(self, entry: Entry, result: Any) -> None:
        failed = isinstance(result, BaseException)
        outcome = "abandoned" if entry.abandoned else "failed" if failed else "ok"
        self._metrics.results.labels(entry.kind, outcome).inc()
        self._metrics.seconds.labels(entry.kind).observe(time.monotonic() - entry.since)
        (entry.future.set_exception if failed else entry.future.set_result)(result)

    def _place(self, model: "Served") -> None:
        """Let this model have the GPU, if there is one."""
        if model is self._placed:
            return
        if self._placed is not None:
            chosen_model.remove_from_gpu(self._placed.pipeline)
        self._placed = None
        chosen_model.place(model.pipeline)
        self._placed = model


class Report:
    """The pipeline's callback: notes the progress, and ends a batch that takes too long or is no longer wanted."""

    def __init__(self, batch: Sequence[Entry], seconds: float) -> None:
        self._batch, self._seconds, self._began = batch, seconds, time.monotonic()
        config, asked = batch[0].model.config, batch[0].asked
        self._steps = asked.steps or (
            config.caption_steps if isinstance(asked, Caption) else config.num_inference_steps
        )

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if all(entry.abandoned for entry in self._batch):
            raise AbandonedError
        if time.monotonic() - self._began > self._seconds:
            raise too_slow(self._seconds)
        for entry in self._batch:
            entry.progress = min(99, 100 * (step + 1) // self._steps)
        return {}


def too_slow(seconds: float) -> ApiError:
    """The error of a request that reaches the time limit."""
    sentence = f"The request took longer than {seconds:g} seconds, the limit; ask for less, or try again later."
    return ApiError(504, sentence, code="timeout")


def make(batch: Sequence[Entry], size: int, report: Report) -> Sequence[Any]:
    """The results of requests of one kind, at most `size`: texts, or frames uint8 (B, F, H, W, 3).

    Sums are rounded in an order that depends on the shape of a batch, and a result would depend on how many requests
    happened to wait. So a smaller batch is filled up with copies of its last request, and each prompt is encoded alone.
    """
    pipeline, first = batch[0].model.pipeline, batch[0].asked
    asked: list[Any] = [entry.asked for entry in batch]
    asked += asked[-1:] * (size - len(asked))
    settings: dict[str, Any] = {"num_inference_steps": first.steps, "guidance_scale": first.guidance}
    settings |= {"seed": [one.seed for one in asked], "batch_size": size, "callback_on_step_end": report}
    if isinstance(first, Caption):
        videos = [one.frames for one in asked]
        return pipeline.caption(videos, temperature=first.temperature, **settings)[: len(batch)]
    import torch

    encoded = [pipeline.encode_prompt(one.prompt, do_classifier_free_guidance=False)[0] for one in asked]
    frames = pipeline.generate(
        [one.prompt for one in asked],
        prompt_embeds=torch.cat(encoded),
        negative_prompt=first.negative_prompt,
        num_frames=first.frames,
        height=first.height,
        width=first.width,
        **settings,
    )
    return list(frames[: len(batch)])
