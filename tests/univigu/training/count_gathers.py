"""How many weights each step of a run gathers under ZeRO 3: started by a test on several processes.

    python count_gathers.py FOLDER

At Wan's size a block's weights stay gathered while it runs, and those of the others don't; so do they here.
FOLDER/gathers.json has a list for a run without gradient checkpointing, and one for a run with it: of each step but the
last, the task, whether it is self-conditioned, and the gathered elements over those of all weights.
"""

import json
import os
import sys
from pathlib import Path

import tiny_run  # pyrefly: ignore[missing-import]
from deepspeed.runtime.zero import partition_parameters

from univigu.tasks import ObjectiveConfig, draw_step
from univigu.training import engine

CHOICES = {"task_draw": "step", "seed": 52}  # this seed draws every task with and without a guess in six steps
STEPS = 7
BLOCK = 12_000  # a little more than the weights of a block
settings_of = engine.engine_settings
gathered = [0]
all_gather = partition_parameters._dist_allgather_fn


def count(local, output, *arguments, **more):
    gathered[0] += output.numel()
    return all_gather(local, output, *arguments, **more)


def forget_at_once(*arguments):
    settings = settings_of(*arguments)
    limits = {"max_live_parameters": BLOCK, "max_reuse_distance": BLOCK}
    limits |= {"prefetch_bucket_size": 0, "param_persistence_threshold": 0}
    settings["zero_optimization"] |= {f"stage3_{name}": value for name, value in limits.items()}
    return settings


def run(folder: Path, **settings) -> list[tuple[str, bool, float]]:
    """What each step gathers, of a run with these settings."""
    found, weights = [], []

    def note(step, _):
        if step < STEPS:  # the last one is evaluated
            found.append((*draw_step(step, ObjectiveConfig(**CHOICES)), gathered[0] / weights[0]))
            gathered[0] = 0

    def count_weights(module, _):
        if not weights:
            weights.append(sum(parameter.ds_numel for parameter in module.parameters()))
            gathered[0] = 0

    rarely = {"steps": STEPS, "heldout_every": STEPS, "checkpoint_every": STEPS}
    tiny_run.run(folder, note, count_weights, layers=4, objective=CHOICES, zero_stage=3, **rarely, **settings)
    return found


if __name__ == "__main__":
    partition_parameters._dist_allgather_fn, engine.engine_settings = count, forget_at_once
    home = Path(sys.argv[1])
    gathers = [run(home / f"every-{every}", gradient_checkpointing=every) for every in (0, 1)]
    if os.environ["RANK"] == "0":
        (home / "gathers.json").write_text(json.dumps(gathers))
