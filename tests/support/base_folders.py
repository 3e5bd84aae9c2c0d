"""Random tiny checkpoints in the layouts of Wan2.2 TI2V-5B and Wan2.1 I2V, and images to start their videos with."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 128,
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


def spread(count, first):
    """Statistics of latents that differ by channel."""
    return [first + 0.1 * (i % 5) for i in range(count)]


@pytest.fixture(scope="session")
def text_parts(tiny_wan_folder):
    pipeline = WanPipeline.from_pretrained(tiny_wan_folder, transformer=None, vae=None)
    return {"tokenizer": pipeline.tokenizer, "text_encoder": pipeline.text_encoder}


@pytest.fixture(scope="session")
def ti2v_folder(text_parts, tmp_path_factory):
    """Latents of 48 channels, 16x16 pixels and 4 frames each, by a residual autoencoder over patches of 2x2 pixels."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-ti2v"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            attn_scales=[],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            latents_mean=spread(48, -0.2),
            latents_std=spread(48, 0.5),
            scale_factor_spatial=16,
            scale_factor_temporal=4,
        )
        transformer = WanTransformer3DModel(in_channels=48, out_channels=48, **TRANSFORMER)
    parts = {"vae": vae.eval(), "transformer": transformer.eval(), "scheduler": UniPCMultistepScheduler(**FLOW)}
    WanPipeline(**text_parts, **parts, expand_timesteps=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def i2v_folder(text_parts, tiny_wan_folder, tmp_path_factory):
    """12 channels, of which 4 are the video's, and CLIP's states through keys and values of their own."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("bases") / "tiny-i2v"
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        image_encoder = CLIPVisionModel(CLIPVisionConfig(**size, image_size=16, patch_size=8)).eval()
        image_channels = {"in_channels": 12, "out_channels": 4, "image_dim": 16, "added_kv_proj_dim": 24}
        transformer = WanTransformer3DModel(**image_channels, **TRANSFORMER).eval()
    WanImageToVideoPipeline(
        **text_parts,
        image_encoder=image_encoder,
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        vae=AutoencoderKLWan.from_pretrained(tiny_wan_folder / "vae"),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(**FLOW),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images():
    """Two images of other sizes than the videos'."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]
