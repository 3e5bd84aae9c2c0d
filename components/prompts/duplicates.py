"""Exact and near duplicates among prompts: the fingerprints that texts are compared by, and the index of them.

Fingerprints are computed in batches, in any process. The index receives them one after another, in the order of the
rows, so of two similar prompts the first always stays. MinHash and LSH are rensa's (in Rust: two microseconds per
prompt); their candidates are verified by the exact Jaccard similarity of their features.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from components.prompts import filters
from univigu.errors import ConfigError

PERMUTATIONS = 128  # of a MinHash: 512 bytes per text
RECALL = 0.98  # share of the pairs at the threshold that the LSH must find
CANDIDATES = 256  # verified per text at most: a text with more is in a cluster that the index covers well enough
SEED = 1


class Fingerprint(NamedTuple):
    """What a text is compared by. Two texts with the same content have a digest in `content` in common."""

    text: int  # 64 bits of the text's SHA-256: its id
    content: tuple[int, ...] = ()  # digests of its content words: in order, and as a set of features
    features: array = array("Q")  # hashes of its features, if the text is long enough for Jaccard
    sketch: Any = None  # the MinHash of `features`


def fingerprints(texts: Sequence[str], min_features: int) -> list[Fingerprint]:
    """A fingerprint for each text; texts with fewer than `min_features` features have no MinHash.

    Short prompts can differ in a single word that matters, so they are compared by their content alone.
    """
    from rensa import RMinHash

    phrases = [filters.content_phrases(text) for text in texts]
    features = [list(filters.content_features(each)) for each in phrases]
    hashes = [array("Q", sorted(each)) for each in RMinHash.hash_token_sets(features)]
    long_enough = [each for each in features if len(each) >= min_features]
    sketches = iter(RMinHash.from_token_sets(long_enough, PERMUTATIONS, SEED))
    prints = []
    for text, words, hashed in zip(texts, phrases, hashes, strict=True):
        in_order = _digest(" ".join(chain.from_iterable(words)).encode())
        content = (in_order, _digest(hashed.tobytes()))
        compared = (hashed, next(sketches)) if len(hashed) >= min_features else ()
        prints.append(Fingerprint(int(filters.text_id(text), 16), content, *compared))
    return prints


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


class ExactTexts:
    """The texts seen so far."""

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()

    def add(self, fingerprint: Fingerprint) -> int:
        """Remember a text; returns how often it was seen before."""
        before = self.times[fingerprint.text]
        self.times[fingerprint.text] = before + 1
        return before


class Match(NamedTuple):
    """An earlier text of which a text is a near duplicate."""

    id: str
    jaccard: float  # 1 if both have the same content
    detail: str


class NearDuplicates:
    """The index of the texts that were kept so far.

    Texts that are equal up to case, punctuation and stop words, or up to the order of phrases, are found in a table.
    Longer texts that differ slightly are candidates of a MinHash LSH; each is verified by the exact Jaccard similarity
    of the features, and from `threshold` on it is a near duplicate. A text with `CANDIDATES` candidates that matches
    none of them is not added to the LSH (`left_out` counts these), so the cost per prompt stays constant in a large
    cluster of similar prompts.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"'near_duplicate_jaccard' is {threshold}; set it above 0 and up to 1.")
        from rensa import RMinHashLSH

        self.threshold = threshold
        self.same: dict[int, int] = {}  # digest of a text's content -> the text's id
        self.index = RMinHashLSH(threshold, PERMUTATIONS, bands(threshold))
        self.ids = array("Q")  # of the texts in the LSH
        self.features = array("Q")  # of all these texts, concatenated
        self.ends = array("Q", [0])
        self.left_out = 0

    def find(self, fingerprint: Fingerprint) -> Match | None:
        """The most similar earlier text, if it is a near duplicate; otherwise adds this one to the index."""
        for digest in fingerprint.content:
            if digest in self.same:
                like = f"{self.same[digest]:016x}"
                return Match(like, 1.0, f"says the same as {like}")
        if fingerprint.sketch is not None and (found := self._find_similar(fingerprint)):
            return found
        self.same.update(dict.fromkeys(fingerprint.content, fingerprint.text))
        return None

    def _find_similar(self, fingerprint: Fingerprint) -> Match | None:
        candidates = self.index.query(fingerprint.sketch)
        crowded = len(candidates) >= CANDIDATES
        features = frozenset(fingerprint.features)
        best, like = 0.0, 0
        for index in sorted(candidates)[:CANDIDATES]:
            found = self._jaccard(features, index)
            if found > best or (found == best and self.ids[index] < like):
                best, like = found, self.ids[index]
        if best >= self.threshold:
            return Match(f"{like:016x}", best, f"like {like:016x}, Jaccard {best:.2f}")
        if crowded:
            self.left_out += 1
            return None
        self.index.insert(len(self.ids), fingerprint.sketch)
        self.ids.append(fingerprint.text)
        self.features.extend(fingerprint.features)
        self.ends.append(len(self.features))
        return None

    def _jaccard(self, features: frozenset[int], index: int) -> float:
        """Jaccard similarity with the text at `index`; 0 if the sizes alone show that it is below the threshold."""
        start, end = self.ends[index], self.ends[index + 1]
        sizes = len(features), end - start
        if min(sizes) < self.threshold * max(sizes):
            return 0.0
        shared = len(features.intersection(self.features[start:end]))
        return shared / (sum(sizes) - shared)


def bands(threshold: float) -> int:
    """Number of LSH bands of a MinHash: the fewest that find `RECALL` of the pairs at the threshold.

    With b bands of r values, texts of Jaccard similarity s share a band with probability 1 - (1 - s^r)^b.
    """
    rows = PERMUTATIONS
    while rows > 1 and 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) < RECALL:
        rows //= 2
    return PERMUTATIONS // rows
