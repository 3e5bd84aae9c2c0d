"""Exact and near duplicates among prompts: what two texts are compared by, and the index they are looked up in.

Fingerprints are made batch by batch, in any process; the index sees them one after another, in the order of the rows,
so which of two alike prompts stays is decided by their order alone. MinHash and LSH are rensa's (in Rust: two
microseconds a prompt); its candidates are verified by the exact Jaccard of their features.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from components.prompts import filters
from univigu.errors import ConfigError

PERMUTATIONS = 128  # of a MinHash: 512 bytes a text
RECALL = 0.98  # share of the pairs at the threshold that the LSH must put forward
CANDIDATES = 256  # verified for one text at most: what is more is a crowd that has enough members in the index
SEED = 1


class Fingerprint(NamedTuple):
    """What a text is compared by. Two texts that say the same have a digest in common."""

    text: int  # 64 bits of the text's SHA-256: its id
    content: tuple[int, ...] = ()  # what it says in order, and as a set of features
    features: array = array("Q")  # hashes of the features of a text that is long enough for Jaccard
    sketch: Any = None  # the MinHash of those


def fingerprints(texts: Sequence[str], min_features: int) -> list[Fingerprint]:
    """A fingerprint for each text; those with fewer than `min_features` features have no MinHash.

    In a short text a single word can be all that sets two prompts apart, so those are compared by their content alone.
    """
    from rensa import RMinHash

    phrases = [filters.content_phrases(text) for text in texts]
    features = [list(filters.content_features(each)) for each in phrases]
    hashes = [array("Q", sorted(each)) for each in RMinHash.hash_token_sets(features)]
    long = [each for each in features if len(each) >= min_features]
    sketches = iter(RMinHash.from_token_sets(long, PERMUTATIONS, SEED))
    prints = []
    for text, said, hashed in zip(texts, phrases, hashes, strict=True):
        in_order = _digest(" ".join(chain.from_iterable(said)).encode())
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


class Alike(NamedTuple):
    """An earlier text that another one is a near duplicate of."""

    id: str
    jaccard: float  # 1 where both say the same
    detail: str


class NearDuplicates:
    """The texts that were kept so far, and what they are found by.

    Texts that say the same up to case, punctuation and stop words, or up to the order of phrases, are found in a table.
    Longer ones that differ a little are candidates of a MinHash LSH, each verified by exact Jaccard of their features,
    of which `threshold` makes a near duplicate. A text that has `CANDIDATES` candidates and is like none of them is not
    put into the LSH any more (`left_out` counts them): so the cost of a prompt stays flat in a crowd of similar ones.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"'near_duplicate_jaccard' is {threshold}, and must lie above 0 and not above 1.")
        from rensa import RMinHashLSH

        self.threshold = threshold
        self.same: dict[int, int] = {}  # a digest of what a text says -> the text's id
        self.index = RMinHashLSH(threshold, PERMUTATIONS, bands(threshold))
        self.ids = array("Q")  # of the texts in the index
        self.features = array("Q")  # of one after another
        self.ends = array("Q", [0])
        self.left_out = 0

    def find(self, fingerprint: Fingerprint) -> Alike | None:
        """The earlier text that says the same or is most alike, if it is alike enough; else remembers this one."""
        for digest in fingerprint.content:
            if digest in self.same:
                like = f"{self.same[digest]:016x}"
                return Alike(like, 1.0, f"says the same as {like}")
        if fingerprint.sketch is not None and (found := self._find_alike(fingerprint)):
            return found
        self.same.update(dict.fromkeys(fingerprint.content, fingerprint.text))
        return None

    def _find_alike(self, fingerprint: Fingerprint) -> Alike | None:
        candidates = self.index.query(fingerprint.sketch)
        crowded = len(candidates) >= CANDIDATES
        features = frozenset(fingerprint.features)
        best, like = 0.0, 0
        for place in sorted(candidates)[:CANDIDATES]:
            found = self._jaccard(features, place)
            if found > best or (found == best and self.ids[place] < like):
                best, like = found, self.ids[place]
        if best >= self.threshold:
            return Alike(f"{like:016x}", best, f"like {like:016x}, Jaccard {best:.2f}")
        if crowded:
            self.left_out += 1
            return None
        self.index.insert(len(self.ids), fingerprint.sketch)
        self.ids.append(fingerprint.text)
        self.features.extend(fingerprint.features)
        self.ends.append(len(self.features))
        return None

    def _jaccard(self, features: frozenset[int], place: int) -> float:
        """Of some features and those of the text at `place`; 0 where their sizes alone say that it's too little."""
        start, end = self.ends[place], self.ends[place + 1]
        sizes = len(features), end - start
        if min(sizes) < self.threshold * max(sizes):
            return 0.0
        shared = len(features.intersection(self.features[start:end]))
        return shared / (sum(sizes) - shared)


def bands(threshold: float) -> int:
    """Into how many bands a MinHash is cut: as few as put forward `RECALL` of the pairs at the threshold.

    With b bands of r values, texts of Jaccard s share a band with probability 1 - (1 - s^r)^b.
    """
    wide = PERMUTATIONS
    while wide > 1 and 1 - (1 - threshold**wide) ** (PERMUTATIONS // wide) < RECALL:
        wide //= 2
    return PERMUTATIONS // wide
