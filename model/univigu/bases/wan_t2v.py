"""Wan text-to-video: Wan2.1 T2V 1.3B and 14B, and whatever has their layout."""

from .base import Base

BASE = Base(
    name="Wan text-to-video",
    fits=lambda transformer, index: True,
    clip={"num_frames": 81, "height": 480, "width": 832},
)
