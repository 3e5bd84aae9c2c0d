"""The base's video autoencoder: diffusers' `AutoencoderKLWan`, trained on the world's clips.

Single frames first: a causal autoencoder codes the first frame alone, which is cheap and already teaches the digits.
Then whole clips, with every temporal kernel starting as "look at the present only". A world may start from another
world's autoencoder (`AutoencoderConfig.start`), which has learnt edges and movement already: clips only, then.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from components.digits import world
from components.digits.training import Fit, train
from components.digits.worlds import DIGITS, World
from components.pipeline.progress import progress
from univigu.errors import ConfigError, MissingInputError


@dataclass
class AutoencoderConfig:
    """Sizes of the autoencoder (names are `AutoencoderKLWan`'s) and its two rounds of training.

    With `start`, the folder of a base whose autoencoder has these sizes, its weights take the place of the first round.
    """

    start: str | None = None
    base_dim: int = 32
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 2])
    num_res_blocks: int = 1
    z_dim: int = 48
    patch_size: int = 2
    ink_weight: float = 10.0
    kl_weight: float = 2e-4
    frames: Fit = field(default_factory=lambda: Fit(steps=2400, batch=32, lr=2e-3, bf16=True))
    clips: Fit = field(default_factory=lambda: Fit(steps=4700, batch=8, lr=1.5e-3, bf16=True))
    statistics_clips: int = 1024


def build(config: AutoencoderConfig) -> AutoencoderKLWan:
    """A new autoencoder; its config has its strides, from which WanPipeline computes the size of latents."""
    stages = len(config.dim_mult) - 1
    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        dim_mult=config.dim_mult,
        num_res_blocks=config.num_res_blocks,
        z_dim=config.z_dim,
        attn_scales=[],
        temperal_downsample=[True] * stages,
        in_channels=3 * config.patch_size**2,
        out_channels=3 * config.patch_size**2,
        patch_size=config.patch_size,
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
        scale_factor_spatial=2**stages * config.patch_size,
        scale_factor_temporal=2**stages,
    )
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, WanCausalConv3d) and layer.kernel_size[0] == 3:
                layer.weight[:, :, :2] = 0
                layer.weight[:, :, 2] *= 3**0.5
        for layer in vae.modules():
            if isinstance(layer, WanResample) and layer.mode.endswith("3d"):
                weight = layer.time_conv.weight
                weight.zero_()
                layer.time_conv.bias.zero_()
                weight[:, :, 2, 0, 0] = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
    return vae


def load(config: AutoencoderConfig, folder: Path) -> AutoencoderKLWan:
    """The autoencoder of the base in `folder`, to start from; its weights are in fp32.

    Raises `MissingInputError` if the folder has none, `ConfigError` if its sizes are others than `config`'s.
    """
    if not (folder / "vae" / "config.json").exists():
        raise MissingInputError(f"There is no autoencoder in {folder}/vae; correct autoencoder.start, or leave it out.")
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    for name in ("base_dim", "dim_mult", "num_res_blocks", "z_dim", "patch_size"):
        found, wanted = vae.config[name], getattr(config, name)
        if found != wanted:
            raise ConfigError(f"{folder}/vae has {name} {found}, the settings {wanted}; a start needs the same sizes.")
    return vae


# --- the same function as vae.encode / vae.decode, in one piece instead of chunks of four frames ---------------------


def _resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        b, c, t, h, w = x[:, :, 1:].shape
        later = layer.time_conv(x[:, :, 1:]).reshape(b, 2, c, t, h, w)
        x = torch.cat([x[:, :, :1], later.transpose(1, 2).transpose(2, 3).reshape(b, c, 2 * t, h, w)], dim=2)
    x = layer(x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def encode(vae: AutoencoderKLWan, frames: torch.Tensor) -> DiagonalGaussianDistribution:
    """Frames (B, 3, F, H, W) in -1..1 -> posterior over latents (B, z, 1 + (F-1)/4, H/8, W/8).

    Equals `vae.encode` for F = 4k + 1; one pass over all frames costs a CPU half of what the chunks do.
    """
    encoder = vae.encoder
    x = encoder.conv_in(patchify(frames, vae.config.patch_size))
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    return DiagonalGaussianDistribution(vae.quant_conv(x).float())


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents -> frames (B, 3, F, H, W), as `vae.decode` but not clamped, so that gradients flow everywhere."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size).float()


# --- data and training -----------------------------------------------------------------------------------------------


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (B, F, H, W, 3) -> float (B, 3, F, H, W) in -1..1."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(video: torch.Tensor) -> np.ndarray:
    """Float (B, 3, F, H, W) in -1..1 -> uint8 (B, F, H, W, 3)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


draw_clips = DIGITS.draw_clips  # of the first world


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB: the mean over clips."""
    error = ((a.astype(np.float32) - b.astype(np.float32)) ** 2).reshape(len(a), -1).mean(1)
    return float((10 * np.log10(255.0**2 / np.maximum(error, 1e-3))).mean())


def fit_autoencoder(
    vae: AutoencoderKLWan, config: AutoencoderConfig, work: Path, seed: int, kind: World = DIGITS
) -> dict:
    """Train `vae` in place, on frames and then on clips; write its latent statistics to its config; return the logs."""
    draw_clips = kind.draw_clips
    held_out, _ = draw_clips(128, 7, world.heldout_scans())

    def loss_on(frames: np.ndarray, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = to_tensor(frames)
        posterior = encode(vae, x)
        torch.manual_seed(seed * 1_000_003 + step)
        difference = decode(vae, posterior.sample()) - x
        contrast = (x - x[:, :, :1, :1, :1]).abs().amax(1, keepdim=True)
        strongest = contrast.amax((2, 3, 4), keepdim=True).clamp(min=0.1)
        ink = torch.nn.functional.max_pool3d((contrast > 0.15 * strongest).float(), (1, 3, 3), 1, (0, 1, 1))
        # A pale digit on a similar ground is as hard to read as it is cheap to miss: weigh by what it stands out.
        weight = 1 + config.ink_weight * ink / strongest
        error = (weight * (difference.abs() + 2 * difference**2)).mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error + config.kl_weight * kl, {"l1": difference.abs().mean().item(), "kl": kl.item()}

    def frames_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        at = step % world.FRAMES
        return loss_on(draw_clips(config.frames.batch, 2 * step * 7919 + seed, None, slice(at, at + 1))[0], step)

    def clips_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return loss_on(draw_clips(config.clips.batch, (2 * step + 1) * 7919 + seed)[0], step)

    def report(frames: np.ndarray) -> dict[str, float]:
        rebuilt = to_frames(decode(vae, encode(vae, to_tensor(frames)).mode()))
        return {"psnr": psnr(frames, rebuilt)}

    logs = {}
    if not config.start and not (work / "autoencoder-clips.safetensors").exists():
        path = work / "autoencoder-frames.safetensors"
        logs["frames"] = train("frames", vae, frames_at, config.frames, path, lambda _: report(held_out[:, 4:5]))
    path = work / "autoencoder-clips.safetensors"
    logs["clips"] = train("clips", vae, clips_at, config.clips, path, lambda _: report(held_out))
    latents = encode_clips(
        vae, [draw_clips(64, 10_000_019 + i)[0] for i in range(max(1, config.statistics_clips // 64))]
    )
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )
    return logs


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, batches: list[np.ndarray]) -> torch.Tensor:
    """Posterior means (N, z, T, h, w), not normalised, of batches of uint8 clips."""
    vae.eval()
    return torch.cat([encode(vae, to_tensor(batch)).mode() for batch in progress(batches, "encode")])
