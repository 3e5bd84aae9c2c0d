"""How well a model predicts given texts beside given clips: accuracy by time, the video's gain, and retrieval.

A text is seen at time tau, where it is part noise and part itself, and the model predicts its tokens (eq 16, 9). The
cross-entropy of these predictions stands for the text's likelihood: it is no exact one, but it is compared only between
two clips, or with no clip, beside the same text and the same noise.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from univigu import flow, text_space, wan
from univigu.errors import ConfigError
from univigu.sampling import batch_tau, token_table
from univigu.video import fit_frames

if TYPE_CHECKING:
    from univigu.pipeline import UniViGUPipeline
    from univigu.transformer import VideoCache

BINS = 10  # of tau; their centres are those of the training's held-out figures
RETRIEVAL_TAUS = (0.1, 0.3, 0.5)  # at later times most tokens can be read from the noisy text itself
TEXTS_AT_ONCE = 32


class Likelihood(NamedTuple):
    """Of one text beside its clip, each (BINS,): token accuracy and cross-entropy in nats a token, with and without."""

    accuracy: np.ndarray
    entropy: np.ndarray
    accuracy_without: np.ndarray
    entropy_without: np.ndarray

    @property
    def gain(self) -> float:
        """Nats a token by which the clip lowers the cross-entropy, mean over tau."""
        return float((self.entropy_without - self.entropy).mean())


class Retrieval(NamedTuple):
    """Whether the right one of n is found, each (n,) bool."""

    text_of_clip: np.ndarray  # no other clip's text fits the clip better
    clip_of_text: np.ndarray  # the text fits no other clip better


def check_categorical(pipeline: "UniViGUPipeline") -> None:
    """Raise `ConfigError` for a model that predicts no distribution over tokens."""
    kind = pipeline.transformer.config.prediction
    if kind != "categorical":
        raise ConfigError(f"The model's prediction is '{kind}', which gives no likelihood of a text.")


def encode_clip(pipeline: "UniViGUPipeline", frames: np.ndarray) -> Tensor:
    """Latents (1, C, T, H, W) of a clip, uint8 (F, H, W, 3) of any size, on the CPU."""
    config = pipeline.config
    fitted = fit_frames(frames, config.num_frames, config.height, config.width)
    return wan.encode_frames(pipeline.vae, torch.from_numpy(fitted)[None]).cpu()


@torch.no_grad()
def measure_text(pipeline: "UniViGUPipeline", latents: Tensor, text: str, number: int, seed: int = 0) -> Likelihood:
    """The likelihood of one text beside one clip's latents (1, C, T, H, W), at the centres of `BINS` bins of tau.

    number: the clip's, from which its noise comes, as in `training.heldout.evaluate_heldout`.
    """
    reader = _Reader(pipeline)
    key = (seed, "held out", number)
    ids = reader.tokenize([text])
    noise = flow.keyed_noise([(*key, "text")], reader.shape, reader.device)
    blank = flow.keyed_noise([(*key, "video")], latents.shape[1:], reader.device)
    taus = [(bin + 0.5) / BINS for bin in range(BINS)]
    found = []
    for cache in (reader.see(latents.to(reader.device), 1.0), reader.see(blank, 0.0)):
        accuracy, entropy = zip(*(reader.read(cache, ids, noise, tau) for tau in taus), strict=True)
        found += [torch.cat(accuracy).cpu().numpy(), torch.cat(entropy).cpu().numpy()]
    return Likelihood(*found)


@torch.no_grad()
def retrieve(pipeline: "UniViGUPipeline", latents: Sequence[Tensor], texts: Sequence[str], seed: int = 0) -> Retrieval:
    """Whether each of n clips finds its own text among the n, and each text its clip.

    latents: n of (1, C, T, H, W). What is compared is the gain of the clip: the text's cross-entropy without a clip
    minus that beside it, so that a text that is likely beside any clip gains nothing. Equal texts, and their clips,
    count as each other.
    """
    reader = _Reader(pipeline)
    blank = flow.keyed_noise([(seed, "no video")], latents[0].shape[1:], reader.device)
    without = reader.read_all(reader.see(blank, 0.0), texts, seed)
    rows = [without - reader.read_all(reader.see(one.to(reader.device), 1.0), texts, seed) for one in latents]
    gains, same = torch.stack(rows).cpu().numpy(), np.array([[one == other for other in texts] for one in texts])
    own = np.diagonal(gains)
    better_text, better_clip = (gains > own[:, None]) & ~same, (gains > own[None]) & ~same
    return Retrieval(np.logical_not(better_text.any(1)), np.logical_not(better_clip.any(0)))


class _Reader:
    """A pipeline's text side: what it predicts of texts beside a clip that it sees."""

    def __init__(self, pipeline: "UniViGUPipeline") -> None:
        check_categorical(pipeline)
        self.model: Any = pipeline.transformer
        self.tokenizer, self.device = pipeline.tokenizer, pipeline._execution_device
        self.shape = self.model.config.text_length, self.model.config.text_latent_dim
        self.table = token_table(self.model, self.device)
        self.empty = pipeline._encode_nothing()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return text_space.tokenize(self.tokenizer, texts, self.shape[0]).to(self.device)

    def see(self, latents: Tensor, tau: float) -> "VideoCache":
        # the model is called, not its methods: hooks that offload weights act on calls alone
        return self.model(latents, batch_tau(tau, latents), self.empty, attention="kv_only").cache

    def read(self, cache: "VideoCache", ids: Tensor, noise: Tensor, at: float) -> tuple[Tensor, Tensor]:
        """Accuracy and cross-entropy of the tokens, EOS included and PAD left out, each (B,)."""
        tau = batch_tau(at, noise)
        z = flow.interpolate(noise, text_space.embed(ids, self.table), tau)
        hidden = self.model(cache, text=z, text_tau=tau).text
        logits = self.model.read_text(hidden, z, tau, self.table).logits
        stated = ids != self.tokenizer.pad_token_id
        right = (logits.argmax(-1) == ids) & stated
        surprise = -logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0] * stated
        return right.sum(1) / stated.sum(1), surprise.sum(1) / stated.sum(1)

    def read_all(self, cache: "VideoCache", texts: Sequence[str], seed: int) -> Tensor:
        """The cross-entropy of each text, mean over `RETRIEVAL_TAUS`, (n,); its noise comes from the text itself."""
        means = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[start : start + TEXTS_AT_ONCE]
            ids = self.tokenize(part)
            noise = flow.keyed_noise([(seed, "retrieval", text) for text in part], self.shape, self.device)
            means.append(torch.stack([self.read(cache, ids, noise, tau)[1] for tau in RETRIEVAL_TAUS]).mean(0))
        return torch.cat(means)
