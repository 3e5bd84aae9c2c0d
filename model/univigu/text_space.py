"""The space of text latents: a table E of token embeddings, and the way into and out of it (eq 7, 8).

E has V rows of d numbers, each with norm r. A token can be read from z_tau alone once tau > tau* = a / (a + r), with
a = sqrt(2 ln V). r is chosen so that tau* is about 0.4: with a larger r, nearly every tau drawn in training would only
teach copying. d is small (64), so no tensor of size V x width ever exists.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flow
from .errors import ConfigError

PREDICTIONS = ("categorical", "x1", "velocity")
CONFIDENCE_LIMIT = 20.0  # of k(tau), which has a pole at tau = 1


def row_norm_for(vocab_size: int, tau_star: float = 0.4) -> float:
    """The row norm r at which tokens become readable at ``tau_star``: r = a (1 - tau*) / tau*, a = sqrt(2 ln V)."""
    return math.sqrt(2 * math.log(vocab_size)) * (1 - tau_star) / tau_star


class TextSpace(nn.Module):
    """The learnable table E. Calling it returns the table (V, d), float32, with all rows scaled to ``row_norm``."""

    def __init__(self, vocab_size: int, dim: int, row_norm: float):
        super().__init__()
        self.row_norm = row_norm
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))

    def forward(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=-1) * self.row_norm

    @torch.no_grad()
    def init_from(self, rows: Tensor, fit_rows: int = 16384, seed: int = 0) -> None:
        """Set E to a projection of another table's rows (V, D), such as umT5's: see `project_rows`."""
        vocab_size, dim = self.weight.shape
        self.weight.copy_(project_rows(rows, vocab_size, dim, fit_rows, seed))


class TextOutput(nn.Module):
    """An output table (V, w) with a bias per token: what the head can say beyond the d numbers of the flow's space.

    A softmax over h E^T has the rank d, so with d = 64 the head can't tell many likely words at a place apart. The
    table adds g W^T + b to the logits, for w more numbers g that the head reads from the full width. Tokens stay points
    of E: noise, guesses and eq 8 don't know about it. The bias starts from the tokens' frequencies; then an untrained
    head gives the posterior of a token given its noisy embedding with those frequencies as the prior.
    """

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """g (B, N, w) to logits (B, N, V), float32, to be added to those of E."""
        return F.linear(hidden.type_as(self.weight), self.weight, self.bias).float()

    @torch.no_grad()
    def init_from(self, rows: Tensor) -> None:
        """Set the table to a projection of another table's rows (V, D), such as umT5's: see `project_rows`."""
        vocab_size, dim = self.weight.shape
        self.weight.copy_(project_rows(rows, vocab_size, dim) / math.sqrt(dim))

    @torch.no_grad()
    def init_bias(self, counts: Tensor) -> None:
        """Set the bias to the log of the tokens' shares, from their counts (V,), with one more for each."""
        shares = counts.double() + 1
        self.bias.copy_((shares / shares.sum()).log())


def project_rows(rows: Tensor, vocab_size: int, dim: int, fit_rows: int = 16384, seed: int = 0) -> Tensor:
    """A table's rows (V, D) in ``dim`` numbers of unit variance, (V, dim): its principal directions, whitened.

    Directions are fitted on at most ``fit_rows`` evenly spaced rows. With D < dim the rows are embedded in a random
    orthogonal frame instead. A little noise separates rows that are equal, or zero, in the source. Raises ConfigError
    where the source hasn't ``vocab_size`` rows.
    """
    if len(rows) != vocab_size:
        raise ConfigError(
            f"The token table has {len(rows)} rows and the model expects {vocab_size}: set vocab_size to match."
        )
    sample = rows[:: max(1, len(rows) // fit_rows)].float()
    mean = sample.mean(0)
    generator = torch.Generator().manual_seed(seed)
    if min(sample.shape) > dim:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, singular, directions = torch.svd_lowrank(sample - mean, q=dim, niter=4)
        basis = directions * (math.sqrt(len(sample)) / singular.clamp_min(1e-6))
    else:
        width = rows.shape[1]
        frame, _ = torch.linalg.qr(torch.randn(max(width, dim), max(width, dim), generator=generator))
        basis = frame[:width, :dim] / (sample - mean).std().clamp_min(1e-6)
    projected = torch.cat([(chunk.float() - mean) @ basis for chunk in rows.split(65536)])
    scale = projected.std().clamp_min(1e-6)
    return projected / scale + 0.02 * torch.randn(projected.shape, generator=generator)


class TextPrediction(NamedTuple):
    """The text stream's prediction at (z_tau, tau)."""

    logits: Tensor | None  # (B, N, V), None unless the prediction is categorical
    data: Tensor  # predicted z_1, (B, N, d)
    velocity: Tensor  # predicted u, (B, N, d)


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """z_1 = E[y]: ids (B, N) to (B, N, d) (eq 7)."""
    return F.embedding(ids, table)


def similarity(z: Tensor, table: Tensor, tokenizer_length: int) -> Tensor:
    """z . E_k for every token: (B, N, V), with -inf for the rows that the tokenizer doesn't use."""
    scores = z.float() @ table.T
    scores[..., tokenizer_length:] = -torch.inf
    return scores


def nearest(z: Tensor, table: Tensor, tokenizer_length: int) -> Tensor:
    """y_i = argmax_k z_i . E_k: (B, N, d) to ids (B, N) (eq 8)."""
    return similarity(z, table, tokenizer_length).argmax(-1)


def confidence(tau: Tensor) -> Tensor:
    """k(tau) = tau / (1 - tau)^2, at most 20: the weight of z_tau in the log-posterior over tokens."""
    return (tau / (1 - tau).square()).clamp_max(CONFIDENCE_LIMIT)


def read_out(
    hidden: Tensor,
    z: Tensor,
    tau: Tensor,
    table: Tensor,
    tokenizer_length: int,
    prediction: str,
    floor: float = 0.0,
    temperature: float = 1.0,
    more_logits: Tensor | None = None,
) -> TextPrediction:
    """From the text head's output h (B, N, d), the state z_tau (B, N, d) and tau (B,) to logits, z_1 and velocity.

    ``categorical``: logits = (h + k(tau) z_tau) E^T and z_1 = softmax(logits) E, so that an untrained head (h = 0)
    already gives the posterior of a token given its noisy embedding. ``x1``: h is z_1. ``velocity``: h is the velocity,
    the paper's literal head. Where a velocity is divided by 1 - tau, this is at least ``floor``. ``temperature``
    divides categorical logits: 1 samples from the likely texts, 0 takes the most likely token at each position.
    ``more_logits`` (B, N, V), a `TextOutput`'s, are added to them before.
    Raises ConfigError for an unknown ``prediction``.
    """
    hidden, z = hidden.float(), z.float()
    if prediction == "velocity":
        return TextPrediction(None, flow.velocity_to_data(hidden, z, tau), hidden)
    if prediction == "x1":
        return TextPrediction(None, hidden, flow.data_to_velocity(hidden, z, tau, floor))
    if prediction != "categorical":
        raise ConfigError(f"Unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}.")
    logits = similarity(hidden + confidence(flow.expand_tau(tau, z)) * z, table, tokenizer_length)
    if more_logits is not None:
        logits = logits + more_logits
    data = (logits / temperature).softmax(-1) @ table if temperature else embed(logits.argmax(-1), table)
    return TextPrediction(logits, data, flow.data_to_velocity(data, z, tau, floor))


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Token ids (B, length): the text, EOS, then PAD; a text that is too long is cut before its EOS."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = torch.full((len(rows), length), tokenizer.pad_token_id, dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        tokens = [*tokens[: length - 1], tokenizer.eos_token_id]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def detokenize(tokenizer: Any, ids: Tensor) -> list[str]:
    """Text up to the first EOS of each row of ids (B, N) (eq 8)."""
    ended = (ids == tokenizer.eos_token_id).cumsum(1) > 0
    rows = [row[~stop].tolist() for row, stop in zip(ids.cpu(), ended.cpu(), strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
