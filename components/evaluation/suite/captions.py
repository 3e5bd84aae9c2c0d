"""Figures of captions against one or several references per clip, and, where the truth is known, against it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.evaluation.pairs import common_stems, read_text
from components.evaluation.suite.data import Clip, Dataset
from components.prompts.embeddings import Neighbours
from univigu.errors import MissingInputError
from univigu.evaluation.claims import score_item, summarise
from univigu.evaluation.intervals import CONFIDENCE, DIGITS, RESAMPLES, clustered_mean, jackknife, mean, share
from univigu.evaluation.texts import distinct_share, repeated_share, words
from univigu.extras import import_extra

if TYPE_CHECKING:
    import numpy as np

Scores = dict[str, dict[str, float | int]]
LeftOut = dict[str, str]  # what is missing, and why
EMBEDDED_AT_ONCE = 256


def score_captions(
    dataset: Dataset, clips: Sequence[Clip], texts: Sequence[str | None], embedder: Path | None, seed: int
) -> tuple[Scores, LeftOut]:
    """Every figure of the captions of these clips, each ``{value, low, high, n}``, and what was left out, with why.

    texts: a caption for each clip, in order; None, which counts as an empty one, for a clip that failed. Raises
    `BadInputError` for fewer than two clips.
    """
    said = [text or "" for text in texts]
    scores = score_overlap([one.references for one in clips], said, seed) | score_variety(said, seed)
    left_out: LeftOut = {}
    if dataset.world:
        scores |= score_facts(dataset.world, clips, said, seed)
    else:
        scores |= score_content(clips, said, seed)
        left_out |= dict.fromkeys(
            ("facts", "hallucination", "omission"), "the truth about these clips isn't known, only their references"
        )
    if embedder is None:
        left_out["similarity"] = "no --embedder was given: a folder of a sentence-transformers or model2vec model"
    else:
        scores |= score_similarity([one.references for one in clips], said, embedder, seed)
    return scores, left_out


def score_facts(world: Any, clips: Sequence[Clip], said: Sequence[str], seed: int) -> Scores:
    """``facts`` (right), ``hallucination`` (stated wrongly) and ``omission`` (not stated): together all facts.

    Also ``fact.ATTRIBUTE``. An attribute with several values is stated wrongly, even if one of them is right.
    """
    right, wrong, silent = [], [], []
    for clip, text in zip(clips, said, strict=True):
        claims, found = world.claims(text), score_item(clip.truth, world.read_text(text))
        right.append(found)
        wrong.append({name: bool(claims[name]) and not found[name] for name in clip.truth})
        silent.append({name: not claims[name] for name in clip.truth})
    by_attribute = summarise(right, seed)
    scores = {"facts": by_attribute.pop("mean")}
    scores |= {"hallucination": clustered_mean(wrong, seed), "omission": clustered_mean(silent, seed)}
    return scores | {f"fact.{name}": score for name, score in by_attribute.items()}


def score_content(clips: Sequence[Clip], said: Sequence[str], seed: int) -> Scores:
    """``content``: the share of a reference's content words that the caption states, of the reference that fits best.

    Words are compared by their stems; those of more than half of the references say nothing about a clip, and don't
    count (`components.evaluation.pairs`).
    """
    common = common_stems([one.references[0] for one in clips])
    rows = []
    for clip, text in zip(clips, said, strict=True):
        found = read_text(text)
        claims = [{c: v for c, v in read_text(one).items() if c not in common} for one in clip.references]
        marked = [{"content:" + claim: claim in found for claim in one} for one in claims if one]
        rows.append(max(marked, key=lambda one: sum(one.values()) / len(one), default={}))
    return {"content": clustered_mean(rows, seed)} if any(rows) else {}


def score_overlap(references: Sequence[Sequence[str]], said: Sequence[str], seed: int) -> Scores:
    """``bleu`` and ``chrf`` of the corpus (0 to 100), and ``rouge_l`` (0 to 1) and ``cider`` (0 to 10) per clip.

    BLEU and chrF are sacrebleu's; ROUGE-L is rouge-score's F-measure with stems, of the reference
    that fits best; CIDEr-D is pycocoevalcap's, whose weights of n-grams come from these references, after a tokenizer
    of ours in place of its Java one. So compare CIDEr only on the same references.
    """
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(said, references, strict=True))
    rouge = [scorer.score_multi(list(theirs), text)["rougeL"].fmeasure for text, theirs in pairs]
    cider = import_extra("pycocoevalcap.cider.cider_scorer").CiderScorer()
    for text, theirs in pairs:
        cider += (" ".join(words(text)), [" ".join(words(one)) for one in theirs])
    _, by_clip = cider.compute_score()
    return {
        "bleu": _corpus_score("BLEU", references, said, seed),
        "chrf": _corpus_score("CHRF", references, said, seed),
        "rouge_l": mean(rouge, seed),
        "cider": mean(by_clip, seed),
    }


def _corpus_score(
    metric: str, references: Sequence[Sequence[str]], said: Sequence[str], seed: int
) -> dict[str, float | int]:
    """A metric of sacrebleu over the corpus, with the percentile bootstrap's interval over clips.

    sacrebleu's own bootstrap mixes types, and fails where a resample scores 0, so its counts of each clip are resampled
    here and its formula is applied to their sums.
    """
    import numpy as np

    most = max(map(len, references))
    streams = [[one[rank] if rank < len(one) else None for one in references] for rank in range(most)]
    scorer = getattr(import_extra("sacrebleu.metrics"), metric)()
    counts = np.array(scorer._extract_corpus_statistics(list(said), streams), dtype=np.float64)
    drawn = np.random.default_rng(seed).multinomial(len(said), np.full(len(said), 1 / len(said)), size=RESAMPLES)

    def score(totals: "np.ndarray") -> float:
        return float(scorer._compute_score_from_stats(totals.astype(int).tolist()).score)

    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile([score(totals) for totals in drawn @ counts], [tail, 100 - tail])
    values = {"value": score(counts.sum(0)), "low": float(low), "high": float(high)}
    return {**{name: round(value, DIGITS) for name, value in values.items()}, "n": len(said)}


def score_variety(said: Sequence[str], seed: int) -> Scores:
    """``repetition`` (share of 4-grams that repeat within a caption), and ``distinct_1`` and ``distinct_2`` of all."""

    def distinct(n: int) -> dict[str, float | int]:
        return jackknife(lambda chosen: distinct_share([said[i] for i in chosen], n), len(said))

    return {
        "repetition": mean([repeated_share(text) for text in said], seed),
        "empty": share([not text.strip() for text in said]),
        "distinct_1": distinct(1),
        "distinct_2": distinct(2),
    }


def score_similarity(references: Sequence[Sequence[str]], said: Sequence[str], folder: Path, seed: int) -> Scores:
    """``similarity``: the cosine of the embeddings of a caption and its reference that fits best; 0 for an empty one.

    ``retrieval.embedding``: the share of captions that are more similar to their own clip's references than to those
    of any other clip.
    """
    import numpy as np

    captions, theirs = embed(folder, said), embed(folder, [one for group in references for one in group])
    owner = np.repeat(np.arange(len(said)), [len(group) for group in references])
    cosines = captions @ theirs.T
    best = np.full((len(said), len(said)), -1.0)
    for column, clip in enumerate(owner):
        best[:, clip] = np.maximum(best[:, clip], cosines[:, column])
    stated = np.array([bool(text.strip()) for text in said])
    own = np.where(stated, np.diagonal(best), 0.0)
    same = np.array([[bool(set(one) & set(other)) for other in references] for one in references])
    found = stated & ~((best > np.diagonal(best)[:, None]) & ~same).any(1)
    return {"similarity": mean(own, seed), "retrieval.embedding": share(found)}


def embed(folder: Path, texts: Sequence[str]) -> "np.ndarray":
    """Embeddings (B, width) of length 1, by a model in the layout of sentence-transformers or model2vec.

    Raises `MissingInputError` if there is none in the folder.
    """
    import numpy as np

    from univigu.wan import read_json

    if not (folder / "config.json").is_file():
        raise MissingInputError(f"There is no embedding model in '{folder}' (no config.json); check --embedder.")
    if read_json(folder / "config.json").get("model_type", "model2vec") == "model2vec":
        found = import_extra("model2vec").StaticModel.from_pretrained(folder).encode(list(texts))
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    model, parts = Neighbours(folder, 0.0), range(0, len(texts), EMBEDDED_AT_ONCE)
    return np.concatenate([model.embed(texts[at : at + EMBEDDED_AT_ONCE]).cpu().numpy() for at in parts])
