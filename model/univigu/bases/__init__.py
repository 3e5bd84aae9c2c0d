"""The kinds of base that a model can start from: one object for each, in one file.

What all of them share is in `univigu.wan`: time, latents, the encoding of prompts, and the keys of checkpoints. All are
one `UniViGUTransformer3DModel`, because Wan's kinds differ in what they are given, not in their blocks.
"""

from collections.abc import Mapping
from typing import Any

from . import wan_i2v, wan_t2v, wan_ti2v
from .base import Base, ImageCondition

BASES = (wan_i2v.BASE, wan_ti2v.BASE, wan_t2v.BASE)

__all__ = ["BASES", "Base", "ImageCondition", "find_base"]


def find_base(transformer: Mapping[str, Any], index: Mapping[str, Any]) -> Base:
    """The kind of base by the config of its transformer and its model_index.json, or a pipeline's own two configs."""
    return next(base for base in BASES if base.fits(transformer, index))
