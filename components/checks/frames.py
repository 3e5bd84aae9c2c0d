"""The frames of a clip that a costly check looks at."""

import numpy as np


def spread(clip: np.ndarray, count: int) -> np.ndarray:
    """At most `count` frames of a clip (F, H, W, 3), evenly spread from its first to its last."""
    return clip[np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int)]
