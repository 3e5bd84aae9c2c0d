"""Buckets: the few sizes of clips that there are, and which of them a clip is fitted to.

The profile's `video.buckets` lists them as [frames, height, width]; without any, there is the one size of `video`. How
a clip becomes its bucket's size is `univigu.video`'s business: its frames taken evenly, scaled and cut around the
centre. How far that may go is the profile's `video.fit`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Bucket(NamedTuple):
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class Misfit(NamedTuple):
    """Why a clip fits no bucket: a slug to count by, and what was seen."""

    reason: str
    detail: str


def list_buckets(video: Mapping[str, Any]) -> list[Bucket]:
    """The buckets of a profile's `video`."""
    given = video["buckets"] or [[video["frames"], video["height"], video["width"]]]
    return [Bucket(*one) for one in given]


def choose_bucket(frames: float, height: int, width: int, video: Mapping[str, Any]) -> Bucket | Misfit:
    """The bucket nearest to a clip in aspect and duration, of those that it fits; the largest of equally near ones.

    frames: how many the clip has at the profile's frame rate. Where it fits none, what keeps it out of the nearest.
    """

    def distance(bucket: Bucket) -> tuple[float, int]:
        aspect = math.log(width / height) - math.log(bucket.width / bucket.height)
        duration = math.log(frames / bucket.frames)
        return round(math.hypot(aspect, duration), 6), -bucket.height * bucket.width

    ranked = sorted(list_buckets(video), key=distance)
    misfits = [_misfit(frames, height, width, bucket, video["fit"]) for bucket in ranked]
    # pyrefly: ignore[bad-return]
    return next((bucket for bucket, misfit in zip(ranked, misfits, strict=True) if not misfit), misfits[0])


def _misfit(frames: float, height: int, width: int, bucket: Bucket, fit: Mapping[str, Any]) -> Misfit | None:
    slowest, fastest = fit["speed"]
    scale = max(bucket.height / height, bucket.width / width)
    cut = 1 - bucket.height * bucket.width / (scale**2 * height * width)
    if frames < slowest * bucket.frames:
        return Misfit(
            "too_short", f"its {frames:.0f} frames are too few for the {bucket.frames} of the bucket {bucket}"
        )
    if frames > fastest * bucket.frames:
        return Misfit(
            "too_long", f"its {frames:.0f} frames are too many for the {bucket.frames} of the bucket {bucket}"
        )
    if scale > fit["upscale"]:
        return Misfit("too_small", f"{height}x{width} would be enlarged {scale:.2f} times for the bucket {bucket}")
    if cut > fit["cut"]:
        return Misfit("aspect", f"{cut:.0%} of {height}x{width} would be cut off for the bucket {bucket}")
    return None
