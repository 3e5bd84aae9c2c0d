"""The Fréchet distance between two sets of feature vectors: FVD where these are a video network's."""

import numpy as np


def frechet_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The Fréchet distance between two normal distributions fitted to vectors (n, d) and (m, d).

    It is ``|mean - mean'|^2 + tr(S + S' - 2 (S S')^1/2)`` (Heusel et al. 2017, arXiv 1706.08500, equation 6;
    Unterthiner et al. 2018, arXiv 1812.01717, for videos). The last trace is the sum of the singular values of
    ``X X'^T / sqrt((n-1)(m-1))`` of the centred vectors, which needs no d x d matrix. With few vectors the distance
    is too large, so compare it only with one of the same n and m.
    """
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    apart = ours.mean(0) - theirs.mean(0)
    one, other = ours - ours.mean(0), theirs - theirs.mean(0)
    n, m = max(1, len(ours) - 1), max(1, len(theirs) - 1)
    shared = np.linalg.svd(one @ other.T / np.sqrt(n * m), compute_uv=False).sum()
    distance = apart @ apart + (one**2).sum() / n + (other**2).sum() / m - 2 * shared
    return max(0.0, float(distance))
