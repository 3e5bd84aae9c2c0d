"""Shares, means and differences with 95 % intervals, each as ``{"value", "low", "high", "n"}``.

A share over independent items gets a Wilson interval (Wilson 1927), which stays within [0, 1] and keeps its coverage
near the ends. A mean over several claims per clip gets a bootstrap over clips, because the claims about one clip are
not independent. Several trainings that differ in their seed get a bootstrap over clips and seeds, and the number of
``"seeds"`` beside ``"n"``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

from univigu.errors import BadInputError

CONFIDENCE = 0.95
RESAMPLES = 2000
DIGITS = 6  # decimals of a score: more would differ between machines by rounding

Score = dict[str, float | int]


def share(correct: Sequence[bool] | np.ndarray) -> Score:
    """The share of true values in `correct` (n,), with its Wilson interval; raises `BadInputError` when it is empty."""
    correct = np.asarray(correct, dtype=bool)
    if not correct.size:
        raise BadInputError("There are no items to compute a share of; evaluate at least one item of each task.")
    hits = int(correct.sum())
    return _score(hits / correct.size, *_wilson(hits, correct.size), correct.size)


def _wilson(hits: int, n: int) -> tuple[float, float]:
    """The interval of Wilson 1927 for a share of hits / n; scipy has it too, and takes a second to import."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = hits + z**2 / 2
    half = z * math.sqrt(hits * (n - hits) / n + z**2 / 4)
    # at the ends exactly 0 and 1, whatever the rounding
    low = 0.0 if hits == 0 else (centre - half) / (n + z**2)
    high = 1.0 if hits == n else (centre + half) / (n + z**2)
    return low, high


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Score:
    """The mean of one number per item (n,), with the percentile bootstrap's interval over items, drawn from `seed`.

    Raises `BadInputError` for fewer than two items, which have no interval.
    """
    values = np.asarray(values, dtype=np.float64)
    _check_items(values.size)
    return _score(float(values.mean()), *_bootstrap(values[:, None], np.ones((values.size, 1)), seed), values.size)


def jackknife(statistic: Callable[[np.ndarray], float], items: int) -> Score:
    """A statistic of a whole set of items, with a normal interval from the jackknife (Efron and Tibshirani 1993, 11).

    statistic: from the indices of items (k,) to the statistic of these alone. The bootstrap is not used: it draws items
    twice, which biases statistics that count different ones or measure their spread. Raises `BadInputError` for fewer
    than two items.
    """
    _check_items(items)
    every = np.arange(items)
    value = statistic(every)
    without = np.array([statistic(np.delete(every, item)) for item in every])
    error = math.sqrt((items - 1) / items * float(((without - without.mean()) ** 2).sum()))
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return _score(value, value - half, value + half, items)


def _check_items(count: int) -> None:
    if count < 2:
        raise BadInputError(f"An interval needs at least two items, and there are {count}; evaluate more.")


def clustered_mean(correct: Sequence[Mapping[str, bool]], seed: int = 0) -> Score:
    """The mean over attributes of each attribute's share of correct items; `n` is the number of items.

    `correct` maps, for each item, its scored attributes to whether they are correct. Items may be scored on different
    attributes, and every attribute has the same weight. Several claims of one attribute are named ``attribute:claim``.
    The interval is the percentile bootstrap over items, drawn from `seed`. Where all claims are correct (or all wrong),
    all resamples are equal, so the wider Wilson interval over items is used. Raises `BadInputError` for no claims.
    """
    scored, right = _claims(correct)
    value = float((right.sum(0) / scored.sum(0)).mean())
    if right.sum() in (0, scored.sum()):
        return {**share(np.full(len(correct), right.sum() > 0)), "value": round(value, DIGITS)}
    return _score(value, *_bootstrap(right, scored, seed), len(correct))


def paired_difference(ours: Sequence[Mapping[str, bool]], theirs: Sequence[Mapping[str, bool]], seed: int = 0) -> Score:
    """The `clustered_mean` of `ours` minus that of `theirs`, over the same items in the same order.

    The interval is the paired bootstrap's (Efron and Tibshirani 1993, chapter 8): each resample draws items, and uses
    both sides' claims about them, so the difficulty of an item cancels out. Raises `BadInputError` where the two don't
    score the same claims.
    """
    if [item.keys() for item in ours] != [item.keys() for item in theirs]:
        raise BadInputError(
            "The two lists of items were scored on different claims; compare evaluations of the same items."
        )
    scored, right = _claims(ours)
    gain = right - _claims(theirs)[1]
    value = float((gain.sum(0) / scored.sum(0)).mean())
    return _score(value, *_bootstrap(gain, scored, seed), len(ours))


def seeded_mean(runs: Sequence[Sequence[Mapping[str, bool]]], seed: int = 0) -> Score:
    """The `clustered_mean` over several trainings that differ only in their seed; `seeds` is their number.

    runs: for each training, its items, the same ones in the same order. Each resample draws trainings and,
    independently, items, both with replacement, so the interval covers another seed and other items (Owen 2007, "The
    pigeonhole bootstrap"). With one training it covers other items only. Where all claims are correct (or all wrong),
    the wider Wilson interval over items is used. Raises `BadInputError` for no training, no claims, or trainings with
    different numbers of items.
    """
    scored, right = _claims_by_run(runs)
    value, items = _crossed_mean(right, scored), right.shape[1]
    if right.sum() in (0, scored.sum()):
        score = {**share(np.full(items, right.sum() > 0)), "value": round(value, DIGITS)}
    else:
        score = _score(value, *_crossed_bootstrap(right, scored, seed), items)
    return {**score, "seeds": len(runs)}


def seeded_difference(
    ours: Sequence[Sequence[Mapping[str, bool]]], theirs: Sequence[Sequence[Mapping[str, bool]]], seed: int = 0
) -> Score:
    """The `seeded_mean` of `ours` minus that of `theirs`: trainings of the same seeds, on the same items.

    Each resample uses both sides' claims about the drawn items of the drawn seeds (see `paired_difference`). Raises
    `BadInputError` where the two don't have the same trainings, items and claims.
    """
    if [[item.keys() for item in run] for run in ours] != [[item.keys() for item in run] for run in theirs]:
        raise BadInputError(
            "The two sides have different seeds, items or claims; compare evaluations of the same items and seeds."
        )
    scored, right = _claims_by_run(ours)
    gain = right - _claims_by_run(theirs)[1]
    score = _score(_crossed_mean(gain, scored), *_crossed_bootstrap(gain, scored, seed), gain.shape[1])
    return {**score, "seeds": len(ours)}


def _claims_by_run(runs: Sequence[Sequence[Mapping[str, bool]]]) -> tuple[np.ndarray, np.ndarray]:
    """`_claims` of each training, each (trainings, items, attributes)."""
    if not runs or len({len(run) for run in runs}) > 1:
        raise BadInputError("Trainings can be averaged only over the same items; evaluate each of them on all items.")
    scored, right = _claims([item for run in runs for item in run])
    shape = (len(runs), len(runs[0]), scored.shape[1])
    return scored.reshape(shape), right.reshape(shape)


def _crossed_mean(points: np.ndarray, scored: np.ndarray) -> float:
    return float((points.sum((0, 1)) / scored.sum((0, 1))).mean())


def _crossed_bootstrap(points: np.ndarray, scored: np.ndarray, seed: int) -> tuple[float, float]:
    """The percentile interval of the mean over attributes, over resampled trainings and resampled items."""
    runs, items, attributes = points.shape
    generator = np.random.default_rng(seed)
    drawn_items = generator.multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
    drawn_runs = generator.multinomial(runs, np.full(runs, 1 / runs), size=RESAMPLES)
    sums = np.zeros((2, RESAMPLES, attributes))
    for run in range(runs):
        weight = drawn_runs[:, run, None]
        sums += np.stack([weight * (drawn_items @ points[run]), weight * (drawn_items @ scored[run])])
    with np.errstate(invalid="ignore"):  # an attribute without any item in a resample is nan there
        means = np.nanmean(sums[0] / sums[1], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _claims(correct: Sequence[Mapping[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """The number of scored claims, and of correct ones, each (items, attributes)."""
    names = sorted({attribute(name) for item in correct for name in item})
    if not names:
        raise BadInputError("There are no scored claims to average; evaluate at least one item of each task.")
    columns = {name: number for number, name in enumerate(names)}
    scored, right = np.zeros((2, len(correct), len(names)))
    for row, item in enumerate(correct):
        for name, is_right in item.items():
            scored[row, columns[attribute(name)]] += 1
            right[row, columns[attribute(name)]] += bool(is_right)
    return scored, right


def attribute(name: str) -> str:
    """The attribute of a claim: the part before the colon of ``attribute:claim``, or the whole name."""
    return name.partition(":")[0]


def _bootstrap(points: np.ndarray, scored: np.ndarray, seed: int) -> tuple[float, float]:
    """The percentile interval, over resampled items, of the mean over attributes of points per scored claim."""
    items = len(points)
    drawn = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
    with np.errstate(invalid="ignore"):  # an attribute without any item in a resample is nan there
        means = np.nanmean((drawn @ points) / (drawn @ scored), axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _score(value: float, low: float, high: float, n: int) -> Score:
    return {"value": round(value, DIGITS), "low": round(float(low), DIGITS), "high": round(float(high), DIGITS), "n": n}
