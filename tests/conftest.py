"""What many tests share: a random tiny Wan in diffusers' own layout."""

import pytest


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory):
    """A random Wan text-to-video pipeline for clips of 9 frames of 32x32: latents (4, 3, 8, 8), 48 video tokens.

    Its tokenizer is the embedded world's own.
    """
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from components.digits.tokenizer import build_tokenizer, corpus

    folder = tmp_path_factory.mktemp("base") / "tiny-wan"
    tokenizer = build_tokenizer(corpus(300, seed=0), 512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(tokenizer),
                    d_model=32,
                    d_kv=16,
                    d_ff=64,
                    num_layers=1,
                    num_heads=2,
                    dropout_rate=0.0,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            ).eval(),
            vae=AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                attn_scales=[],
                temperal_downsample=[True, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[0.5, 1.0, 1.5, 2.0],
                scale_factor_spatial=4,
                scale_factor_temporal=4,
            ).eval(),
            transformer=WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=32,
                freq_dim=32,
                ffn_dim=48,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=128,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speaking_model(tiny_wan_folder, tmp_path_factory):
    """The folder of an untrained Uni-ViGU whose text head is random, so that every input has an effect on its text."""
    import torch

    from univigu import UniViGUPipeline

    folder = tmp_path_factory.mktemp("uni-vigu") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = UniViGUPipeline.from_wan(
            tiny_wan_folder,
            num_frames=9,
            height=32,
            width=32,
            fps=8,
            max_sequence_length=32,
            num_inference_steps=3,
            caption_steps=3,
            guidance_scale=2.0,
            text_length=48,
            text_latent_dim=16,
        )
        torch.nn.init.normal_(pipeline.transformer.text_head.proj_out.weight, std=0.3)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_tracking_store(monkeypatch):
    """MLflow notes its store in the environment, where the next test would take it for the user's choice."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
