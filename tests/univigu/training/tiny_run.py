"""A training run of seconds on random latents: imported by tests, and started by them as a separate process.

    python tiny_run.py FOLDER '{"zero_stage": 1}' [STEP KILL|TERM|DIE]
    python tiny_run.py FOLDER '{"one": {"zero_stage": 1}, "other": {}}' ALL    # in FOLDER/one and FOLDER/other

After STEP, the process kills itself (KILL), or sends SIGTERM to its parent (TERM), as a cluster does with a pod, and
slows down from there. DIE kills the process of rank 1 while it saves the checkpoint of STEP. At the end the weights are
in FOLDER/weights.safetensors.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from univigu import ObjectiveConfig, TrainingObjective, UniViGUTransformer3DModel
from univigu.errors import UniViGUError
from univigu.training.data import (
    EMPTY_PROMPT,
    LatentDataset,
    SampleRef,
    token_weights,
    write_empty_prompt,
    write_latents,
)
from univigu.training.engine import TrainingConfig
from univigu.training.loop import train

VOCABULARY, LENGTH = 23, 10
SETTINGS = {
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "checkpoint_every": 3,
    "heldout_every": 4,
}


def open_data(folder: Path, train=slice(0, 20), heldout=slice(20, 24), sizes=1) -> tuple[LatentDataset, LatentDataset]:
    """20 samples to train on and 4 held-out ones, the same on every call and machine.

    With two `sizes`, every third is larger, and the two lie in a shard each.
    """
    refs = []
    for size in range(sizes):
        shard = folder / ("latents.safetensors" if not size else f"latents-{size}.safetensors")
        rows = [row for row in range(24) if sizes == 1 or (row % 3 == 2) == (size == 1)]
        if not shard.is_file():
            generator = torch.Generator().manual_seed(size)
            ids = torch.randint(2, VOCABULARY, (len(rows), LENGTH), generator=generator)
            ids[:, 7], ids[:, 8:] = 1, 0
            prompts = [torch.randn(3, 16, generator=generator) for _ in rows]
            latents = torch.randn(len(rows), 4, 2 + size, 4, 4 + 2 * size, generator=generator)
            write_latents(shard, latents=latents, prompt_embeds=prompts, prompt_ids=ids, target_ids=ids)
            write_empty_prompt(folder, torch.randn(1, 16, generator=generator))
        refs += [(n, SampleRef(f"sample-{n}", shard, row, (size,) * (sizes > 1))) for row, n in enumerate(rows)]
    refs = [ref for _, ref in sorted(refs, key=lambda pair: pair[0])]
    return tuple(LatentDataset(part, folder / EMPTY_PROMPT, prompt_length=4) for part in (refs[train], refs[heldout]))


def make_objective(dataset: LatentDataset, output_dim=0, layers=2, **settings) -> TrainingObjective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UniViGUTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
            rope_max_seq_len=64,
            text_latent_dim=8,
            vocab_size=VOCABULARY,
            tokenizer_length=VOCABULARY,
            text_length=LENGTH,
            text_output_dim=output_dim,
        )
    weights = token_weights(dataset.target_ids, VOCABULARY, 0, "rarity")
    return TrainingObjective(model, ObjectiveConfig(**settings), weights)


def nothing(*_) -> None: ...


def run(
    folder: Path,
    report=nothing,
    before_forward=nothing,
    parts=(),
    sizes=1,
    text_draws=1,
    task_draw="sample",
    output_dim=0,
    layers=2,
    objective=None,
    **settings,
) -> dict[str, torch.Tensor]:
    """Train in `folder`, resuming a run that stopped there; returns the weights. `objective`: its further settings."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset, heldout = open_data(folder, *parts, sizes=sizes)
    given = {"text_draws": text_draws, "task_draw": task_draw} | (objective or {})
    objective = make_objective(dataset, output_dim, layers, **given)
    objective.register_forward_pre_hook(before_forward)
    train(objective, dataset, heldout, TrainingConfig(**{**SETTINGS, **settings}), folder, report)
    return {name: tensor.clone() for name, tensor in objective.transformer.state_dict().items()}


def save(weights: dict[str, torch.Tensor], folder: Path) -> None:
    if os.environ["RANK"] == "0":
        save_file(weights, folder / "weights.safetensors")


if __name__ == "__main__":
    where, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    if sys.argv[3:] == ["ALL"]:
        for name, each in settings.items():
            save(run(where / name, **each), where / name)
        sys.exit()
    if sys.argv[4:] == ["DIE"] and os.environ["RANK"] == "1":
        from univigu.training import checkpoints

        def save_half(state, path):
            save_file(state, path)
            if path.parent.name == f"step-{int(sys.argv[3]):08d}":
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.save_file = save_half
    last, how = (int(sys.argv[3]), sys.argv[4]) if len(sys.argv) > 3 else (None, "")

    def stop_after_step(step, metrics):
        if step == last and how != "DIE":
            os.kill(*((os.getpid(), signal.SIGKILL) if how == "KILL" else (os.getppid(), signal.SIGTERM)))
        if last is not None and how != "DIE" and step >= last:
            time.sleep(2)

    try:
        save(run(where, stop_after_step, **settings), where)
    except UniViGUError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
