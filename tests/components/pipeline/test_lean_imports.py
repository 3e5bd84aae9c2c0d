"""A command leaves out packages that it doesn't need; other processes import what they always did."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import transformers.models
from safetensors.torch import load_file

REPO = Path(__file__).parents[3]
SCRIPT = """
import sys
from pathlib import Path

from components.cli.chosen_model import load
from components.pipeline.lean_imports import start_command

if sys.argv[2] == "command":
    start_command()
load(Path(sys.argv[1]))
names = "scipy", "peft", "torch._dynamo", "torch.distributed.tensor", "sympy"
print(*[name for name in names if hasattr(sys.modules.get(name), "__file__")])

import peft, scipy.stats
import transformers.models
from transformers.utils import import_utils
print(len({*transformers.__all__, *transformers.models.__all__}))
print(import_utils.create_import_structure_from_path.cache_info().maxsize)
"""


TRAINING = """
import json, sys
from pathlib import Path

from components.pipeline.lean_imports import import_training, start_command

start_command()
import_training()

from univigu.pipeline import UniViGUPipeline
from univigu.training.memory import parameter_count

folder = Path(sys.argv[1])
count = parameter_count(json.loads((folder / "transformer/config.json").read_text()))
UniViGUPipeline.from_pretrained(folder).save_pretrained(sys.argv[2])
print(count, "sympy" in sys.modules)
"""


COMPILING = """
import sys
import torch

from components.pipeline.lean_imports import import_models, start_command

start_command()
import_models()

@torch.compiler.disable
def left_alone():
    return torch.compiler.is_compiling()

print(hasattr(sys.modules["torch._dynamo"], "__file__"), left_alone())
print(*torch.compile(lambda: (torch.compiler.is_compiling(), left_alone()), backend="eager")())
"""


INSIDE = """
import os, sys

from components.pipeline.lean_imports import import_models, start_command

start_command()
import_models()
for inside in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    import importlib
    import torch._dynamo.config as config
    module = importlib.import_module(f"torch._dynamo.{inside}")
    import torch

    print(module is sys.modules[f"torch._dynamo.{inside}"], module.__spec__.name, config is torch._dynamo.config)
    print(*[name for name, each in sys.modules.items() if name.startswith("torch._dynamo") and not each.__file__])
    sys.exit()
"""


EXPECTATIONS = """
import sys

from components.pipeline.lean_imports import start_command
from components.validation.gates import expectations

start_command()
expectations()
import torch  # while which `inspect` asks every module for its file
print(*[name for name in ("google.auth", "botocore", "scipy.linalg") if name in sys.modules])

import google.auth
from scipy import stats
print(stats.norm.cdf(0.0), stats is sys.modules["scipy.stats"], stats.__spec__.name)
"""


def output(script, *arguments):
    """The words that a script prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imported(folder, kind):
    """Which of the packages loading a model imported; the process imports them itself afterwards."""
    return output(SCRIPT, folder, kind)


@pytest.mark.slow
def test_a_command_loads_a_model_without_packages_that_it_does_not_need(speaking_model):
    *packages, names, remembered = imported(speaking_model, "command")
    assert packages == []
    assert int(names) == len({*transformers.__all__, *transformers.models.__all__})
    assert remembered == "None"  # folders without limit


@pytest.mark.slow
def test_a_training_command_counts_and_saves_weights_without_sympy(speaking_model, tmp_path):
    *_, count, imported = output(TRAINING, speaking_model, tmp_path / "copy")
    saved = load_file(tmp_path / "copy/transformer/diffusion_pytorch_model.safetensors").values()
    assert (int(count), imported) == (sum(weight.numel() for weight in saved), "False")


@pytest.mark.slow
def test_a_gate_starts_without_clients_of_clouds_and_statistics_which_work_once_used():
    assert output(EXPECTATIONS) == ["0.5", "True", "scipy.stats"]


@pytest.mark.slow
def test_elsewhere_nothing_is_hidden(speaking_model):
    *packages, _, remembered = imported(speaking_model, "library")
    assert packages == ["scipy", "peft", "torch._dynamo", "torch.distributed.tensor", "sympy"]
    assert remembered == "128"


@pytest.mark.slow
def test_a_module_inside_the_compiler_is_the_real_one():
    modules = ["utils", "backends.debugging", "_trace_wrapped_higher_order_op"]
    said = output(INSIDE, *modules)
    assert said == [word for name in modules for word in ("True", f"torch._dynamo.{name}", "True")]


@pytest.mark.slow
def test_a_function_that_was_marked_without_the_compiler_is_left_alone_by_it():
    assert output(COMPILING) == ["False", "False", "True", "False"]
