"""Pretraining: resumable loops, an autoencoder that is diffusers' own function, and a bundle that WanPipeline loads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from components.cli.main import app
from components.digits import autoencoder, generator, pretrain, world
from components.digits.stories.recogniser import load_recogniser
from components.digits.training import Fit, load_tensors, train
from components.digits.worlds import STORIES
from univigu.errors import ConfigError, MissingInputError

ROOT = Path(__file__).parents[3]
SMALL = """
corpus_lines: 200
score_clips: 4
autoencoder:
  base_dim: 8
  z_dim: 8
  frames: {steps: 2, batch: 4, lr: 1.0e-3}
  clips: {steps: 2, batch: 2, lr: 1.0e-3}
  statistics_clips: 64
recogniser:
  widths: [8, 8, 8, 8]
  rebuilt_clips: 8
  fit: {steps: 2, batch: 8, lr: 1.0e-3}
generator:
  num_attention_heads: 1
  attention_head_dim: 12
  num_layers: 1
  ffn_dim: 16
  text_dim: 16
  text_layers: 1
  latent_clips: 64
  report_clips: 4
  sample_steps: 2
  words: {steps: 2, batch: 4, lr: 1.0e-3}
  images: {steps: 2, batch: 4, lr: 1.0e-3}
  clips: {steps: 2, batch: 4, lr: 1.0e-3}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "small.yaml").write_text(SMALL)
    options = {"settings": "small.yaml", "out": "out", "work": "work", "recogniser": "recogniser"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(folder / value))]
    result = CliRunner().invoke(app, ["pretrain", *arguments, "--heldout", str(ROOT / "data" / "heldout.json")])
    assert result.exit_code == 0, result.output
    return folder, pretrain.load_config(folder / "small.yaml")


@pytest.mark.slow
def test_the_same_command_makes_the_base_of_the_other_world(tmp_path):
    small = SMALL.replace("generator:", "generator:\n  saved_precision: fp16")
    (tmp_path / "small.yaml").write_text("world: stories" + small)
    options = {"settings": "small.yaml", "out": "out", "work": "work", "recogniser": "recogniser"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(tmp_path / value))]
    result = CliRunner().invoke(app, ["pretrain", *arguments, "--heldout", str(ROOT / "data" / "heldout-stories.json")])
    assert result.exit_code == 0, result.output
    assert "generator.then" in result.output
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    pipe = WanPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    config = pretrain.load_config(tmp_path / "small.yaml")
    clips = generator.generate(pipe, config.generator, ["A red three waits. A blue two moves left slowly."], 0)
    seen = pretrain.JUDGES["stories"].read(load_recogniser(tmp_path / "recogniser"), clips)
    assert all(name in ("passes", "side", *STORIES.questions) for facts in seen for name in facts)
    caption = STORIES.write_caption(STORIES.sample(np.random.default_rng(0)), np.random.default_rng(0))
    assert pipe.tokenizer.unk_token_id not in pipe.tokenizer(caption).input_ids


@pytest.mark.slow
def test_the_whole_command_makes_a_folder_that_wan_pipeline_runs(small):
    folder, config = small
    pipe = WanPipeline.from_pretrained(folder / "out")
    generator.check_text_encoder(pipe.text_encoder)
    clips = generator.generate(pipe, config.generator, ["a red seven", "a blue two"], 0)
    assert clips.shape == (2, world.FRAMES, world.SIZE, world.SIZE, 3)
    assert (clips == generator.generate(pipe, config.generator, ["a red seven", "a blue two"], 0)).all()


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_ends_the_same(small):
    folder, config = small
    scores = pretrain.pretrain(folder / "again", folder / "work", config, recogniser_out=folder / "recogniser")
    readme = (folder / "out" / "README.md").read_text()
    assert all(f"| {name} | {value:.2f} |" in readme for name, value in scores.items())
    for path in (folder / "out").rglob("*.safetensors"):
        assert path.read_bytes() == (folder / "again" / path.relative_to(folder / "out")).read_bytes()


def test_training_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path: Path):
    def run(path: Path, stop_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(4, 4)

        def loss_at(step: int) -> tuple[torch.Tensor, dict]:
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return ((module(x) - x.flip(1)) ** 2).mean(), {}

        train("test", module, loss_at, Fit(steps=12, batch=8, lr=0.1, warmup=3, save_seconds=0.0), path)
        return module.weight.detach().clone()

    whole = run(tmp_path / "whole.safetensors", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped.safetensors", 7)
    assert load_tensors(tmp_path / "stopped.safetensors")[1]["step"] == 7
    assert torch.equal(run(tmp_path / "stopped.safetensors", None), whole)


@pytest.mark.slow
def test_a_world_may_start_from_the_autoencoder_of_another(small, tmp_path):
    folder, config = small
    frames = autoencoder.draw_clips(4, 0)[0]
    start = autoencoder.load(config.autoencoder, folder / "out")
    learnt = replace(config.autoencoder, start=str(folder / "out"), clips=replace(config.autoencoder.clips, lr=0.0))
    pretrain.pretrain(
        tmp_path / "out", tmp_path, replace(config, world="stories", autoencoder=learnt), ("autoencoder",)
    )
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    video = autoencoder.to_tensor(frames)
    assert torch.allclose(autoencoder.encode(vae, video).mode(), autoencoder.encode(start, video).mode(), atol=1e-2)
    assert vae.config.latents_mean != start.config.latents_mean  # of clips of the new world
    assert not (tmp_path / "autoencoder-frames.safetensors").exists()


def test_a_start_without_an_autoencoder_or_of_other_sizes_is_refused(small, tmp_path):
    folder, config = small
    with pytest.raises(MissingInputError, match=r"There is no autoencoder in .*correct autoencoder\.start"):
        autoencoder.load(config.autoencoder, tmp_path)
    with pytest.raises(ConfigError, match="has base_dim 8, the settings 16"):
        autoencoder.load(replace(config.autoencoder, base_dim=16), folder / "out")


def test_autoencoding_in_one_piece_is_what_diffusers_does_in_chunks():
    torch.manual_seed(0)
    vae = autoencoder.build(autoencoder.AutoencoderConfig(base_dim=8, z_dim=8)).eval()
    frames = autoencoder.to_tensor(autoencoder.draw_clips(2, 0)[0])
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        latents = vae.encode(frames).latent_dist.mode()
        assert latents.shape == (2, 8, 3, 4, 4)
        assert torch.allclose(latents, autoencoder.encode(vae, frames).mode(), atol=1e-5)
        rebuilt = autoencoder.decode(vae, latents).clamp(-1, 1)
        assert torch.allclose(vae.decode(latents).sample, rebuilt, atol=1e-5)


def test_prompts_are_encoded_as_wan_pipeline_encodes_them(small):
    folder, _ = small
    pipe = WanPipeline.from_pretrained(folder / "out")
    prompts = ["a red seven", "", "the digit two in cyan moving left fast"]
    theirs, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=32)
    ours = generator.encode_prompts(pipe.text_encoder, pipe.tokenizer, prompts, 32)
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_mistakes_are_named(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("generator: {layers: 3}")
    with pytest.raises(ConfigError, match="layers"):
        pretrain.load_config(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("world: letters")
    with pytest.raises(ConfigError, match="choose from digits, stories"):
        pretrain.load_config(tmp_path / "bad.yaml")
    pretrain.pretrain(tmp_path / "out", tmp_path / "other", pretrain.PretrainConfig("stories", corpus_lines=9), ())
    with pytest.raises(ConfigError, match="world 'stories'"):
        pretrain.pretrain(tmp_path / "out", tmp_path / "other", pretrain.PretrainConfig(corpus_lines=9), ())
    with pytest.raises(ConfigError, match="polish"):
        pretrain.pretrain(tmp_path / "out", tmp_path / "work", phases=("polish",))
    with pytest.raises(MissingInputError, match="autoencoder"):
        pretrain.pretrain(tmp_path / "out", tmp_path / "work", phases=("generator",))


@pytest.mark.slow
def test_the_bundled_base_is_small_and_draws_what_is_asked():
    folder = ROOT / "model" / "tiny-wan"
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 16 * 2**20
    pipe = WanPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    generator.check_text_encoder(pipe.text_encoder)
    config = pretrain.load_config()
    scores = pretrain.score_generator(pipe, config, 32, pretrain.recogniser_training.BUNDLED)
    assert np.mean([scores["colour"], scores["background"], scores["direction"]]) > 0.85, scores
