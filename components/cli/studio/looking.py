"""Which frames the words of a caption looked at: the call that wrote it is repeated and watched in its last step.

Only the newest results of this process can be repeated, because of a file that was captioned the gallery keeps a
compressed copy alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.cli.adapters import adapted
from components.cli.studio.tracing import picture
from univigu.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np

    from univigu.frame_attention import FrameAttention
    from univigu.pipeline import UniViGUPipeline

KEPT = 8  # results whose call can be repeated
WIDEST = 96  # pixels of a frame on the page
_STRIDE = 4  # frames of a latent frame, but the first, which has one


class Call(NamedTuple):
    """A call of the pipeline that wrote a text: the model's label, the method, its arguments, and what it returned."""

    label: str
    method: str
    arguments: dict[str, Any]
    text_steps: int
    lora: tuple[Path | None, float]
    text: str
    frames: "np.ndarray"  # uint8 (F, H, W, 3), of the model's size


class Frame(NamedTuple):
    """A latent frame: its picture, its share of a word's attention to the video, and that of all words on average."""

    picture: str
    share: float
    mean: float


class Word(NamedTuple):
    """A word of a caption, how much of its attention goes to the video, and to which of its frames."""

    text: str
    on_video: float
    frames: list[Frame]


class Calls:
    """The newest calls by the id of their result, and what was seen of them."""

    def __init__(self) -> None:
        self._calls: OrderedDict[str, Call] = OrderedDict()
        self._seen: dict[str, list[Word]] = {}

    def keep(self, result_id: str, call: Call) -> None:
        self._calls[result_id] = call
        while len(self._calls) > KEPT:
            oldest, _ = self._calls.popitem(last=False)
            self._seen.pop(oldest, None)

    def look(self, result_id: str, load: Callable[[], "tuple[UniViGUPipeline, str, Path]"]) -> list[Word]:
        """The words of a result's caption; raises `BadInputError` if its call can't be repeated."""
        call = self._calls.get(result_id)
        if call is None:
            raise BadInputError("Only the newest results can be asked where their words looked; make this one again.")
        if result_id not in self._seen:
            pipeline, label, _ = load()
            if label != call.label:
                raise BadInputError(
                    f"The result was made with {call.label}, and the model in use is {label}; make it again."
                )
            self._seen[result_id] = _watch(pipeline, call)
        return self._seen[result_id]


class _Enough(Exception):  # noqa: N818 (it ends a call early and is no error)
    """The text is written."""


def _watch(pipeline: "UniViGUPipeline", call: Call) -> list[Word]:
    from univigu.frame_attention import FrameWatch

    moments = 1 + (len(call.frames) - 1) // _STRIDE
    with adapted(pipeline, *call.lora), FrameWatch(pipeline.transformer, moments, call.text_steps) as watch:

        def end_step(*given: Any) -> dict[str, Any]:
            watch(*given)
            if watch.done:
                raise _Enough
            return {}

        try:
            getattr(pipeline, call.method)(**call.arguments, callback_on_step_end=end_step)
        except _Enough:
            pipeline.maybe_free_model_hooks()
    seen = watch.attention()
    if seen is None:
        raise BadInputError("This model's text was not written in steps that can be watched.")
    return _by_word(pipeline.tokenizer, call, seen)


def _by_word(tokenizer: Any, call: Call, seen: "FrameAttention") -> list[Word]:
    """Tokens' attention as that of the words that they are parts of: each word has the mean of its tokens."""
    ids = tokenizer(call.text, add_special_tokens=False)["input_ids"][: len(seen.weights)]
    tokens = [max(0, len(tokenizer.decode(ids[: n + 1]).split()) - 1) for n in range(len(ids))]
    pictures, mean = _pictures(call.frames), seen.weights[: len(ids)].mean(0).tolist()
    words = []
    for number, text in enumerate(call.text.split()):
        own = [place for place, word in enumerate(tokens) if word == number]
        if own:
            shares, on_video = seen.weights[own].mean(0).tolist(), float(seen.on_video[own].mean())
            words.append(Word(text, on_video, [Frame(*one) for one in zip(pictures, shares, mean, strict=True)]))
    return words


def _pictures(frames: "np.ndarray") -> list[str]:
    """The middle one of the frames of each latent frame, small."""
    step = -(-frames.shape[2] // WIDEST)
    middles: Sequence[int] = [0, *range(1 + _STRIDE // 2, len(frames), _STRIDE)]
    return [picture(frames[place : place + 1, ::step, ::step]) for place in middles]
