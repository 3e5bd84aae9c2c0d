"""Retrieval by CLIP (R-precision, arXiv 1711.10485): a clip is right if no other prompt fits its frames better."""

from univigu.evaluation.clip import ClipScorer, load

__all__ = ["ClipScorer", "load"]
