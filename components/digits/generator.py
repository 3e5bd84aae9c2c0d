"""The base's text-to-video generator: a small `WanTransformer3DModel`, trained together with its `UMT5EncoderModel`.

Flow matching in Wan's convention: z = (1 - sigma) x0 + sigma eps, the target is eps - x0, the timestep 1000 sigma.
The first latent frame of a causal autoencoder is an image, so training starts on those alone, at a third of the cost.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from components.digits import world
from components.digits.autoencoder import encode, to_tensor
from components.digits.prompts import words
from components.digits.training import Fit, load_tensors, save_atomically, train
from components.digits.worlds import DIGITS, World
from components.pipeline.progress import progress

ABSENT = 255  # code of a fact that a scene hasn't


@dataclass
class GeneratorConfig:
    """Sizes of the transformer and of the text encoder (diffusers' and transformers' names), and their training."""

    num_attention_heads: int = 4
    attention_head_dim: int = 32
    num_layers: int = 6
    ffn_dim: int = 512
    freq_dim: int = 64
    text_dim: int = 64
    text_layers: int = 2
    max_sequence_length: int = 32
    latent_clips: int = 24_000
    prompt_dropout: float = 0.12
    train_shift: float = 2.0
    sample_shift: float = 3.0
    sample_steps: int = 20
    guidance: float = 4.0
    report_clips: int = 64
    saved_precision: str = "fp32"  # or fp16: of the saved weights, half the size
    words: Fit = field(default_factory=lambda: Fit(steps=400, batch=128, lr=3e-3))
    images: Fit = field(default_factory=lambda: Fit(steps=1200, batch=96, lr=2e-3))
    clips: Fit = field(default_factory=lambda: Fit(steps=7000, batch=48, lr=1.5e-3, ema=0.999))


class Generator(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, config: GeneratorConfig, channels: int, vocabulary: int) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=channels,
            out_channels=channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            rope_max_seq_len=128,
        )
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocabulary,
                d_model=config.text_dim,
                d_kv=16,
                d_ff=2 * config.text_dim,
                num_layers=config.text_layers,
                num_heads=config.text_dim // 16,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=64,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                # pyrefly: ignore[unexpected-keyword]
                tie_word_embeddings=True,
            )
        )


def check_text_encoder(text_encoder: UMT5EncoderModel) -> None:
    """Raise `AssertionError` if the encoder's embedding isn't the shared table or is all zeros (a known loader bug)."""
    shared = text_encoder.shared.weight
    embedded = text_encoder.encoder.embed_tokens.weight
    if embedded.data_ptr() != shared.data_ptr() or not shared.abs().sum() > 0:
        raise AssertionError("The text encoder's embed_tokens is not its shared table, or holds only zeros.")


def encode_prompts(
    text_encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], length: int
) -> torch.Tensor:
    """Prompts -> (B, length, text_dim): encoded with their mask, then padded with zeros, as WanPipeline does."""
    tokens = tokenizer(prompts, padding=True, max_length=length, truncation=True, return_tensors="pt")
    states = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    states = states * tokens.attention_mask[..., None]
    return nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))


def cache_latents(
    vae: AutoencoderKLWan, count: int, path: Path, seed: int, kind: World = DIGITS
) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Normalised latents (N, z, T, h, w) of clips rendered from the training scans, and their scenes."""
    batch = 64
    if not path.exists():
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        latents, codes = [], []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for i in progress(range(-(-count // batch)), "latents"):
                clips, scenes = kind.draw_clips(batch, seed + 1_000_003 + i)
                latents.append(((encode(vae, to_tensor(clips)).mode() - mean) / std).half())
                codes += [
                    [values.index(scene[name]) if name in scene else ABSENT for name, values in kind.questions.items()]
                    for scene in scenes
                ]
        tensors = {"latents": torch.cat(latents)[:count], "attributes": torch.tensor(codes[:count], dtype=torch.uint8)}
        save_atomically(tensors, path, {})
    tensors, _ = load_tensors(path)
    scenes = [
        {name: values[code] for (name, values), code in zip(kind.questions.items(), row, strict=True) if code != ABSENT}
        for row in tensors["attributes"].tolist()
    ]
    return tensors["latents"], [kind.complete(scene) for scene in scenes]


def pipeline(
    vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, generator: Generator, config: GeneratorConfig
) -> WanPipeline:
    """The parts as the WanPipeline that is saved."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.sample_shift,
        num_train_timesteps=1000,
    )
    pipe = WanPipeline(
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=generator.text_encoder,
        transformer=generator.transformer,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, config: GeneratorConfig, prompts: list[str], seed: int) -> np.ndarray:
    """Generate clips, uint8 (B, F, H, W, 3), with the base's default settings."""
    clips = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        height=world.SIZE,
        width=world.SIZE,
        num_frames=world.FRAMES,
        num_inference_steps=config.sample_steps,
        guidance_scale=config.guidance,
        max_sequence_length=config.max_sequence_length,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames
    return (np.asarray(clips) * 255).round().astype(np.uint8)


class Reader(nn.Module):
    """A text encoder with a linear head per question of a world, for its first training phase."""

    def __init__(self, text_encoder: UMT5EncoderModel, questions: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.d_model
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(v)) for name, v in questions.items()})


def fit_generator(
    generator: Generator,
    tokenizer: PreTrainedTokenizerFast,
    data: tuple[torch.Tensor, list[dict[str, str]]],
    config: GeneratorConfig,
    work: Path,
    seed: int,
    forbidden: frozenset[str] = frozenset(),
    report: Callable[[], dict[str, float]] | None = None,
    kind: World = DIGITS,
) -> None:
    """Train `generator` in place: the text encoder on facts, then both networks on images, then on clips.

    `data` is what `cache_latents` returns. No prompt is used whose words are in `forbidden` (see `prompts.words`).
    `report()` returns scores of the present weights.
    """
    losses = _Losses(generator, tokenizer, *data, config, seed, forbidden, kind)
    scores = (lambda _: report()) if report else None
    clips = work / "generator-clips.safetensors"
    if not clips.exists():
        reader = Reader(generator.text_encoder, kind.questions)
        reading = partial(losses.reading, reader)
        train("words", reader, reading, config.words, work / "generator-words.safetensors")
        train("images", generator, losses.image, config.images, work / "generator-images.safetensors")
    train("generator", generator, losses.clip, config.clips, clips, scores)


@dataclass
class _Losses:
    """The loss of each phase of the generator's training, as a function of the step."""

    generator: Generator
    tokenizer: PreTrainedTokenizerFast
    latents: torch.Tensor
    scenes: list[dict[str, str]]
    config: GeneratorConfig
    seed: int
    forbidden: frozenset[str]
    kind: World

    def reading(self, reader: Reader, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the facts that prompts state, predicted from the text encoder's states."""
        rng = np.random.default_rng((self.seed, 3, step))
        prompts = [self._draw_prompt(self.kind.sample(rng), rng) for _ in range(self.config.words.batch)]
        states = encode_prompts(reader.text_encoder, self.tokenizer, prompts, self.config.max_sequence_length)
        pooled = states.sum(1) / (states.abs().sum(2) > 0).sum(1, keepdim=True)
        said = [self.kind.read_text(prompt) for prompt in prompts]
        losses = []
        for name, values in self.kind.questions.items():
            target = torch.tensor([values.index(min(s[name])) if s.get(name) else -100 for s in said])
            losses.append(nn.functional.cross_entropy(reader.heads[name](pooled), target, reduction="sum") / len(said))
        return torch.stack(losses).sum(), {}

    def image(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return self._flow(self.config.images.batch, 1, (1, step))

    def clip(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return self._flow(self.config.clips.batch, self.latents.shape[2], (2, step))

    def _flow(self, batch: int, frames: int, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Squared error of the velocity, at times spread evenly over the batch."""
        rng = np.random.default_rng((self.seed, *key))
        noise_rng = torch.Generator().manual_seed(int(rng.integers(2**31)))
        index = rng.integers(len(self.latents), size=batch)
        dropout = self.config.prompt_dropout
        prompts = ["" if rng.random() < dropout else self._draw_prompt(self.scenes[i], rng) for i in index]
        text = encode_prompts(self.generator.text_encoder, self.tokenizer, prompts, self.config.max_sequence_length)
        x0 = self.latents[torch.from_numpy(index), :, :frames].float()
        u = (torch.rand(batch, generator=noise_rng) + torch.arange(batch)) / batch
        sigma = self.config.train_shift * u / (1 + (self.config.train_shift - 1) * u)
        noise = torch.randn(x0.shape, generator=noise_rng)
        s = sigma.view(-1, 1, 1, 1, 1)
        velocity = self.generator.transformer(
            hidden_states=(1 - s) * x0 + s * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        return ((velocity.float() - (noise - x0)) ** 2).mean(), {}

    def _draw_prompt(self, wanted: dict[str, str], rng: np.random.Generator) -> str:
        while words(text := self.kind.write_prompt(wanted, rng)) in self.forbidden:
            pass
        return text
