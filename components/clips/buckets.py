"""Buckets: the sizes that clips are fitted to, and the choice of one for a clip.

The profile's `video.buckets` lists them as [frames, height, width]; if it is empty, the size in `video` is the only
one. `univigu.video` fits a clip to its bucket: frames are sampled evenly, scaled, and cropped around the centre. The
profile's `video.fit` limits how much a clip may change. A clip at its video's own speed is cut out of the video, so
only its aspect ratio and its shortest duration matter.
"""

import math
from typing import NamedTuple

from components.settings.sections import Fit, Video

STRETCH = 0.05  # a clip's own speed is kept to this share: a video of 80 frames still fills a bucket of 81


class Bucket(NamedTuple):
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class Misfit(NamedTuple):
    """Why a clip fits no bucket: a slug to count by, and the details."""

    reason: str
    detail: str


def list_buckets(video: Video) -> list[Bucket]:
    """The buckets of a profile."""
    return [Bucket(*size) for size in video.buckets or [(video.frames, video.height, video.width)]]


def choose_bucket(frames: float, height: int, width: int, video: Video) -> Bucket | Misfit:
    """The bucket nearest in aspect ratio and duration that the clip fits; the largest of equally near ones.

    frames: the clip's number of frames at the profile's frame rate. If the clip fits no bucket, returns why it doesn't
    fit the nearest.
    """

    def distance(bucket: Bucket) -> tuple[float, int]:
        aspect = math.log(width / height) - math.log(bucket.width / bucket.height)
        duration = math.log(frames / bucket.frames)
        return round(math.hypot(aspect, duration), 6), -bucket.height * bucket.width

    ranked = sorted(list_buckets(video), key=distance)
    misfits = [_misfit(frames, height, width, bucket, video.fit) for bucket in ranked]
    # pyrefly: ignore[bad-return]
    return next((bucket for bucket, misfit in zip(ranked, misfits, strict=True) if not misfit), misfits[0])


def choose_native_bucket(frames: float, height: int, width: int, video: Video) -> Bucket | Misfit:
    """The bucket nearest in aspect ratio that clips at their own speed fit; the longest, then the largest of those.

    frames: the number of frames at the profile's frame rate. A bucket may have up to `STRETCH` more frames: then the
    clip is that much slower. If no bucket fits, returns why the nearest doesn't.
    """

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        aspect = math.log(width / height) - math.log(bucket.width / bucket.height)
        return round(abs(aspect), 6), -bucket.frames, -bucket.height * bucket.width

    ranked = sorted(list_buckets(video), key=distance)
    fit = video.fit.model_copy(update={"speed": (1 - STRETCH, math.inf)})
    misfits = {bucket: _misfit(frames, height, width, bucket, fit) for bucket in ranked}
    # pyrefly: ignore[bad-return]
    return next((bucket for bucket in ranked if not misfits[bucket]), misfits[ranked[0]])


def _misfit(frames: float, height: int, width: int, bucket: Bucket, fit: Fit) -> Misfit | None:
    slowest, fastest = fit.speed
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
    if scale > fit.upscale:
        return Misfit("too_small", f"{height}x{width} would be enlarged {scale:.2f} times for the bucket {bucket}")
    if cut > fit.cut:
        return Misfit("aspect", f"{cut:.0%} of {height}x{width} would be cut off for the bucket {bucket}")
    return None
