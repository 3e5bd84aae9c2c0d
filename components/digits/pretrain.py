"""Train a world's base, a tiny Wan in diffusers' layout, from scratch: the code behind `univigu pretrain`.

tokenizer -> autoencoder -> recogniser -> latents -> generator -> bundle. Each phase saves checkpoints in the work
folder and resumes from them: after a kill, run the same command again.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKLWan, WanPipeline
from torch import nn
from transformers import PreTrainedTokenizerFast

from components.digits import autoencoder as vae_training
from components.digits import generator as generator_training
from components.digits import recogniser as recogniser_training
from components.digits import world
from components.digits.prompts import heldout_prompts, words
from components.digits.stories import recogniser as story_recogniser
from components.digits.tokenizer import build_tokenizer, corpus
from components.digits.training import load_tensors
from components.digits.worlds import find_world
from univigu.errors import ConfigError, MissingInputError
from univigu.files import read_yaml

PHASES = ("autoencoder", "recogniser", "latents", "generator", "bundle")
DEFAULT_CONFIG = Path(__file__).with_suffix(".yaml")
CONFIGS = {"digits": DEFAULT_CONFIG, "stories": Path(__file__).parent / "stories" / "pretrain.yaml"}
HELDOUT = {"digits": Path("data/heldout.json"), "stories": Path("data/heldout-stories.json")}


class Judge(NamedTuple):
    """The recogniser of a world: its network, where its weights belong, how they are loaded, and what it sees."""

    build: Callable[[list[int], int, int], nn.Module]
    folder: Path
    load: Callable[[Path], Any]
    read: Callable[[Any, np.ndarray], list[dict[str, str]]]


JUDGES = {
    "digits": Judge(
        recogniser_training.Recogniser,
        recogniser_training.BUNDLED,
        recogniser_training.load_recogniser,
        recogniser_training.read,
    ),
    "stories": Judge(
        story_recogniser.StoryRecogniser,
        story_recogniser.BUNDLED,
        story_recogniser.load_recogniser,
        story_recogniser.read,
    ),
}


@dataclass
class PretrainConfig:
    """One YAML file: the world, the seed, and each network's sizes and training."""

    world: str = "digits"
    seed: int = 0
    corpus_lines: int = 4000
    score_clips: int = 256
    autoencoder: vae_training.AutoencoderConfig = field(default_factory=vae_training.AutoencoderConfig)
    recogniser: recogniser_training.RecogniserConfig = field(default_factory=recogniser_training.RecogniserConfig)
    generator: generator_training.GeneratorConfig = field(default_factory=generator_training.GeneratorConfig)


def _from_dict(kind: type, values: dict[str, Any], where: str) -> Any:
    known: dict[str, Any] = {f.name: f.type for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"'{key}' is not a setting of {where}; known are {', '.join(known)}.")
    return kind(**{k: _from_dict(known[k], v, k) if is_dataclass(known[k]) else v for k, v in values.items()})


def load_config(path: Path = DEFAULT_CONFIG) -> PretrainConfig:
    """Read a YAML file like `pretrain.yaml`; omitted settings keep their defaults."""
    if not path.exists():
        raise MissingInputError(f"There is no configuration at {path}; omit the option to use the default.")
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not readable YAML ({error}); correct it.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a YAML mapping of settings; compare it with {DEFAULT_CONFIG.name}.")
    config = _from_dict(PretrainConfig, values, path.name)
    find_world(config.world)
    if config.generator.saved_precision not in ("fp32", "fp16"):
        raise ConfigError(f"There is no precision '{config.generator.saved_precision}'; choose fp32 or fp16.")
    return config


def pretrain(
    out: Path,
    work: Path,
    config: PretrainConfig | None = None,
    phases: tuple[str, ...] = PHASES,
    recogniser_out: Path | None = None,
    without: Path | None = None,
) -> dict[str, float]:
    """Run `phases` and return the scores written to `out`/README.md (empty without the bundle phase).

    `work` has the checkpoints; `out` becomes the WanPipeline folder, replaced as a whole; the recogniser's weights are
    written to `recogniser_out`, by default to the bundled one's place. Prompts of the held-out items in `without`
    (`HELDOUT`) are excluded.
    Raises `MissingInputError` if a phase's own input has not been made yet.
    """
    for phase in phases:
        if phase not in PHASES:
            raise ConfigError(f"'{phase}' is not a phase of pretraining; choose from {', '.join(PHASES)}.")
    if without and not without.exists():
        raise MissingInputError(f"There are no held-out items at {without}; run this in the project's root.")
    config = config or load_config()
    kind, judge = find_world(config.world), JUDGES[config.world]
    recogniser_out = recogniser_out or judge.folder
    work.mkdir(parents=True, exist_ok=True)
    _note_settings(work, config)
    texts = corpus(config.corpus_lines, config.seed, kind)
    tokenizer = build_tokenizer(texts, config.generator.max_sequence_length * 2)
    if "autoencoder" in phases:
        torch.manual_seed(config.seed)
        start = config.autoencoder.start
        vae = vae_training.load(config.autoencoder, Path(start)) if start else vae_training.build(config.autoencoder)
        vae_training.fit_autoencoder(vae, config.autoencoder, work, config.seed, kind)
        vae.half().save_pretrained(work / "vae")
    if "recogniser" in phases:
        network, _ = recogniser_training.fit_recogniser(
            _load_vae(work), config.recogniser, work, config.seed, kind, judge.build, judge.read
        )
        recogniser_training.save_recogniser(network, config.recogniser, recogniser_out)
    if "latents" in phases:
        _cache(work, config)
    if "generator" in phases:
        torch.manual_seed(config.seed)
        vae = _load_vae(work)
        generator = generator_training.Generator(config.generator, vae.config.z_dim, len(tokenizer))
        pipe = generator_training.pipeline(vae, tokenizer, generator, config.generator)

        def report() -> dict[str, float]:
            if not (recogniser_out / "model.safetensors").exists():
                return {}
            return score_generator(pipe, config, config.generator.report_clips, recogniser_out)

        forbidden = frozenset(words(prompt) for prompt in heldout_prompts(without)) if without else frozenset()
        data = _cache(work, config)
        generator_training.fit_generator(
            generator, tokenizer, data, config.generator, work, config.seed, forbidden, report, kind
        )
    if "bundle" in phases:
        return bundle(out, work, config, tokenizer, recogniser_out)
    return {}


def _note_settings(work: Path, config: PretrainConfig) -> None:
    """Record each configuration used in this work folder, and how many steps were done before it."""
    path = work / "settings.json"
    history = json.loads(path.read_text()) if path.exists() else []
    before = history[-1]["config"].get("world", "digits") if history else config.world
    if before != config.world:
        raise ConfigError(f"{work} holds checkpoints of the world '{before}'; choose another folder with --work.")
    if not history or history[-1]["config"] != asdict(config):
        done = {state.stem: load_tensors(state)[1].get("step") for state in sorted(work.glob("*.safetensors"))}
        history.append({"done": {name: steps for name, steps in done.items() if steps}, "config": asdict(config)})
        part = path.with_suffix(".part")
        part.write_text(json.dumps(history, indent=1) + "\n")
        os.replace(part, path)


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _changes(work: Path) -> str:
    """Settings that changed during the run, as lines for the README."""
    history = json.loads((work / "settings.json").read_text())
    lines = []
    for before, after in pairwise(history):
        old, new = _flat(before["config"]), _flat(after["config"])
        changed = ", ".join(f"{key} {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value)
        done = ", ".join(f"{name} {steps:,}" for name, steps in after["done"].items())
        lines.append(f"- after {done or 'no'} steps: {changed}")
    return "\n".join(lines) or "None."


def _load_vae(work: Path) -> AutoencoderKLWan:
    if not (work / "vae").exists():
        raise MissingInputError(f"{work} holds no trained autoencoder; run the phase 'autoencoder' first.")
    return AutoencoderKLWan.from_pretrained(work / "vae", dtype=torch.float32).eval()


def _cache(work: Path, config: PretrainConfig) -> tuple[torch.Tensor, list[dict[str, str]]]:
    path = work / "latents.safetensors"
    vae = None if path.exists() else _load_vae(work)
    kind = find_world(config.world)
    return generator_training.cache_latents(vae, config.generator.latent_clips, path, config.seed, kind)


# --- scores ----------------------------------------------------------------------------------------------------------


def score_generator(pipe: WanPipeline, config: PretrainConfig, count: int, recogniser: Path) -> dict[str, float]:
    """For each kind of fact, the share of generated clips that show what their prompt states."""
    rng = np.random.default_rng(20_000_003)
    kind, judge = find_world(config.world), JUDGES[config.world]
    network = judge.load(recogniser)
    asked = [kind.write_prompt(kind.sample(rng), rng) for _ in range(count)]
    right: dict[str, list[bool]] = {name.partition(":")[0]: [] for name in kind.questions}
    for i in range(0, count, 64):
        prompts = asked[i : i + 64]
        read = judge.read(network, generator_training.generate(pipe, config.generator, prompts, i))
        for prompt, seen in zip(prompts, read, strict=True):
            for name, values in kind.read_text(prompt).items():
                if values:
                    right.setdefault(name.partition(":")[0], []).append(values == {seen.get(name)})
    return {name: float(np.mean(hits)) for name, hits in right.items() if hits}


def score_eyes(vae: AutoencoderKLWan, config: PretrainConfig, recogniser: Path) -> dict[str, float]:
    """PSNR of the autoencoder on held-out scans, and accuracy of the recogniser with and without it."""
    kind, judge = find_world(config.world), JUDGES[config.world]
    network = judge.load(recogniser)
    clips, truth = kind.draw_clips(config.score_clips, 13, world.heldout_scans())
    rebuilt = recogniser_training.rebuild(vae, clips)
    before, behind = (recogniser_training.share_right(judge.read(network, one), truth) for one in (clips, rebuilt))
    return {
        "autoencoder.psnr": vae_training.psnr(clips, rebuilt),
        "autoencoder.digit": behind["digit"],
        "autoencoder.mean": behind["mean"],
        "recogniser.digit": before["digit"],
        "recogniser.mean": before["mean"],
    }


# --- the bundle ------------------------------------------------------------------------------------------------------


def bundle(
    out: Path, work: Path, config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, recogniser: Path
) -> dict[str, float]:
    """Write the WanPipeline folder with the latest averaged weights, load and score it, and add a README."""
    newest = [path for name in ("clips", "images") if (path := work / f"generator-{name}.safetensors").exists()]
    if not newest:
        raise MissingInputError(f"{work} holds no generator; run the phase 'generator' first.")
    tensors, _ = load_tensors(newest[0])
    vae = _load_vae(work).half()
    generator = generator_training.Generator(config.generator, vae.config.z_dim, len(tokenizer))
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.copy_(tensors[f"average.{name}"])
    if config.generator.saved_precision == "fp16":
        generator.half()
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    generator_training.pipeline(vae, tokenizer, generator, config.generator).save_pretrained(part)

    pipe = WanPipeline.from_pretrained(part, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator_training.check_text_encoder(pipe.text_encoder)
    scores = score_eyes(pipe.vae, config, recogniser)
    asked = score_generator(pipe, config, config.score_clips, recogniser)
    scores |= {f"generator.{name}": value for name, value in asked.items()}
    (part / "README.md").write_text(_readme(part, out.name, work, config, scores), encoding="utf-8")
    for path in part.rglob("*.safetensors"):
        path.chmod(0o644)
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)
    return scores


def _readme(folder: Path, name: str, work: Path, config: PretrainConfig, scores: dict[str, float]) -> str:
    files = sorted(folder.rglob("*.safetensors"))
    sizes = "\n".join(f"| `{path.relative_to(folder)}` | {path.stat().st_size / 1e6:.2f} MB |" for path in files)
    times = "\n".join(
        f"| {path.stem} | {state['step']:,} | {state['seconds'] / 60:.1f} |"
        for path in sorted(work.glob("*.safetensors"))
        if "seconds" in (state := load_tensors(path)[1])
    )
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in scores.items())
    settings = yaml.safe_dump(asdict(config), sort_keys=False, default_flow_style=None, width=100)
    return f"""# {name}

A text-to-video model in the layout of diffusers' `WanPipeline`, small enough to train and use on one CPU core. It
generates clips of {find_world(config.world).shows}:
{world.FRAMES} frames of {world.SIZE}x{world.SIZE} pixels at {world.FPS} frames per second. In this project's demo it
has the role that Wan2.1 has in the paper. The command that made the folder wrote this page.

## Use
Guidance {config.generator.guidance}, {config.generator.sample_steps} steps, `negative_prompt=""`,
`max_sequence_length={config.generator.max_sequence_length}`, height and width {world.SIZE}, {world.FRAMES} frames.

## Training
`univigu pretrain --world {config.world} --out FOLDER` makes it again, and resumes if it was stopped. All training data
are rendered from scikit-learn's scans of handwritten digits (BSD licence). Every {world.HOLDOUT_EVERY}th scan is held
out; no network was trained on those.

| network | steps | minutes |
|---|---|---|
{times}

## Scores
Measured on {config.score_clips} clips of held-out scans and {config.score_clips} generated clips. `autoencoder.digit`
is the share of digits that the recogniser still reads after encoding and decoding. `generator.*` is the share of
generated clips that show what their prompt states, as the recogniser reads them.

| score | value |
|---|---|
{rows}

## Files
| file | size |
|---|---|
{sizes}

## Settings
```yaml
{settings}```
Settings that were changed during training:

{_changes(work)}
"""
