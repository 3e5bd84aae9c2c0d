"""The model in use, and the look-out for a new champion."""

import copy
import math
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.cli import chosen_model
from components.cli.serve.errors import ApiError, tell
from components.cli.serve.limits import Limits
from components.cli.serve.line import Video
from components.cli.serve.metrics import Metrics
from univigu.errors import UniViGUError, first_line

if TYPE_CHECKING:
    from univigu.pipeline import UniViGUPipeline


class Served:
    """A model with a label that names its version, such as ``uni-vigu/3``.

    Requests are checked against it while the worker runs it, so it has a tokenizer for each of the two: the worker's
    changes its state when it is called.
    """

    def __init__(self, label: str, pipeline: "UniViGUPipeline", loaded: float) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self.label, self.pipeline, self.loaded = label, pipeline, loaded
        self.config: Any = pipeline.config
        self.text_stream = pipeline._is_text_side_trained()
        self._tokenizer = copy.deepcopy(pipeline.tokenizer)

    def check_prompts(self, prompt: str, negative_prompt: str | None) -> None:
        """Raise `BadInputError` for a prompt that is empty, or longer than the model reads."""
        from univigu.inputs import list_prompts

        length, text_length = self.config.max_sequence_length, self.pipeline.transformer.config.text_length
        list_prompts(prompt, self._tokenizer, min(length, text_length) if self.text_stream else length, False)
        list_prompts(negative_prompt or "", self._tokenizer, length, True)

    def check_size(self, asked: Video, limits: Limits) -> None:
        """Raise `BadInputError` for a size that the model can't make, and `ApiError` for one that isn't allowed."""
        own, most = self.config, limits.frames or self.config.num_frames
        if asked.frames > most:
            sentence = f"The video would have {asked.frames} frames, more than {most}; ask for at most "
            raise ApiError(400, f"{sentence}{most / own.fps:g} seconds.", "seconds")
        pixels, allowed = asked.frames * asked.height * asked.width, most * own.height * own.width
        if pixels > allowed:
            sentence = f"The video would have {pixels:,} pixels in its {asked.frames} frames, more than {allowed:,}; "
            raise ApiError(400, f"{sentence}ask for a smaller size, such as {own.width}x{own.height}.", "size")
        self.pipeline._latent_shape(asked.frames, asked.height, asked.width, None, self.text_stream)

    def count_frames(self, seconds: float | None) -> int:
        """The number of frames, 4k + 1 for Wan, that is nearest to so many seconds; None: the model's own."""
        if seconds is None:
            return self.config.num_frames
        time_scale = self.pipeline.vae.config.scale_factor_temporal
        return max(1, round((seconds * self.config.fps - 1) / time_scale)) * time_scale + 1

    def count_tokens(self, text: str, most: int | None) -> tuple[str, int, bool]:
        """A text, its number of tokens, and whether it was cut off after `most` of them."""
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if most is None or len(ids) <= most:
            return text, len(ids), False
        return self._tokenizer.decode(ids[:most], skip_special_tokens=True), most, True

    def count_video_tokens(self) -> int:
        """The tokens of a video that is captioned: patches of its latents."""
        from univigu.wan import latent_shape

        shape = latent_shape(self.pipeline.vae, self.config.num_frames, self.config.height, self.config.width)
        return math.prod(self.pipeline.transformer.grid(shape[1:]))


class Models:
    """The model that new requests get. `watch` runs in a thread of its own, the only one that uses MLflow.

    model, name: as in `chosen_model.find_model`. every: polling interval in seconds.
    """

    def __init__(self, model: str, name: str, root: Path, every: float, metrics: Metrics) -> None:
        self._model, self._root, self._every, self._metrics = model, root, every, metrics
        given = Path(model).resolve().name if model and Path(model).is_dir() else model.removeprefix("models:/")
        self.name = given or name  # what requests call it
        self.current: Served | None = None
        self._version, self._said, self._stop = 0, "", threading.Event()

    def require(self) -> Served:
        """The model for a new request; raises `ApiError` (503) while the first is loaded."""
        if self.current is None:
            raise ApiError(503, "The model is still being loaded; send the request again.", retry_after=2)
        return self.current

    def find(self) -> Path:
        """The folder of the first model; raises as `find_model` does."""
        if not self._model:
            self._version = chosen_model.find_champion(self.name, self._root)
        address = f"models:/{self.name}/{self._version}" if self._version else self._model
        return chosen_model.find_model(address, self.name, self._root)

    def load(self, folder: Path) -> None:
        """Let the model in a folder answer from now on."""
        label = f"{self.name}/{self._version}" if self._version else self.name if self._model else folder.name
        self.current = Served(label, chosen_model.read(folder), time.time())
        self._metrics.use(self.current)

    def watch(self) -> None:
        """Load each new champion beside the model in use, and let it take over, until `stop`."""
        while not self._model and not self._stop.wait(self._every):
            before = self._version
            try:
                version = chosen_model.find_champion(self.name, self._root)
                if version not in (0, before):
                    folder = chosen_model.find_model(f"models:/{self.name}/{version}", self.name, self._root)
                    self._version = version
                    self.load(folder)
                    self._metrics.changes.inc()
                    tell(f"Version {version} of '{self.name}' is the new champion; it answers new requests.")
            except Exception as error:  # each kind of store has its own; the model in use stays
                self._version = before
                self._metrics.failures.inc()
                self._report(error)

    def _report(self, error: Exception) -> None:
        """Say why there is no new champion, once."""
        sentence = str(error) if isinstance(error, UniViGUError) else f"{type(error).__name__}: {first_line(error)}"
        if sentence != self._said:
            tell(f"The model in use stays, because the champion can't be read or loaded. {sentence}")
            self._said = sentence

    def stop(self) -> None:
        self._stop.set()
