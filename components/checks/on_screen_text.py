"""Clips with text on the picture: subtitles, titles and watermarks in letters, read by RapidOCR.

The package carries PP-OCR's models (Apache-2.0), so nothing is downloaded. Text that was filmed, such as a sign's,
counts like a subtitle. A logo without letters isn't found, nor are very small letters.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding
from components.checks.frames import spread
from univigu.extras import import_extra

REQUIRES = ("rapidocr", "onnxruntime")
DEFAULTS = {
    "max_text": 0.001,  # share of the picture that text covers, averaged over the frames
    "min_confidence": 0.7,  # of the recogniser; less certain words are taken for texture
    "frames": 3,  # spread evenly over a clip
}
_SIDE = 480  # pixels: shorter sides are enlarged to this, because small letters are not found otherwise
_QUOTED = 60  # characters


class _Readers(threading.local):
    """A reader per thread: it keeps the size of the last picture."""

    reader: Any = None


_readers = _Readers()


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its share of `text`, `on_screen_text` if too large."""
    return [_examine(clip, settings["frames"], settings["min_confidence"], settings["max_text"]) for clip in frames]


def _examine(clip: np.ndarray, count: int, confidence: float, most: float) -> Finding:
    found = [read_text(frame, confidence) for frame in spread(clip, count)]
    share = float(np.mean([covered for covered, _ in found]))
    scores = {"text": round(share, 5)}
    if share > most:
        words = " ".join(dict.fromkeys(word for _, texts in found for word in texts))
        return Finding(scores, "on_screen_text", f"text covers {share:.1%} of the picture: '{words[:_QUOTED]}'")
    return Finding(scores)


def read_text(frame: np.ndarray, confidence: float) -> tuple[float, list[str]]:
    """The share of a frame uint8 (H, W, 3) that text covers, and the texts, from top to bottom."""
    if _readers.reader is None:
        _readers.reader = _load_reader()
    found = _readers.reader(np.ascontiguousarray(frame[..., ::-1]))  # OpenCV's order of channels
    if found.boxes is None:
        return 0.0, []
    sure = [
        (box, text)
        for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
        if score >= confidence
    ]
    height, width = frame.shape[:2]
    return sum(_area(box) for box, _ in sure) / (height * width), [text for _, text in sure]


def _area(box: np.ndarray) -> float:
    """The area of a polygon (N, 2), by the shoelace formula."""
    x, y = np.asarray(box, np.float64).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _load_reader() -> Any:
    import_extra("onnxruntime")
    engine = "EngineConfig.onnxruntime"
    return import_extra("rapidocr").RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,  # text that is upside down
            "Det.limit_side_len": _SIDE,
            "Det.limit_type": "min",
            f"{engine}.intra_op_num_threads": 1,  # clips are examined in several threads
            f"{engine}.inter_op_num_threads": 1,
        }
    )
