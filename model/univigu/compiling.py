"""Compiling a transformer's blocks, which are all alike, so that one of them is compiled and the others reuse it."""

import os
import shutil
from typing import Any

from .errors import ConfigError

# Graphs of a block: its attention policies, with and without text and gradients, for each size of a batch. Beyond the
# limit torch would raise an error, because a block must be one graph.
GRAPHS = 128


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Let torch compile the repeated blocks of a model of diffusers, or ours, when they are first called.

    Each block is one graph, so nothing of it is left to Python. backend: which of torch's compilers. Raises ConfigError
    for a model without such blocks, and where torch lacks what it compiles with: a C++ compiler, and Triton for a GPU.
    """
    if not getattr(model, "_repeated_blocks", None):
        raise ConfigError(f"{type(model).__name__} has no repeated blocks to compile; set 'compile' to none.")
    if missing := _missing_tool():
        raise ConfigError(f"The blocks can't be compiled, because torch finds no {missing}; set 'compile' to none.")
    import torch._dynamo  # takes a second

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)


def _missing_tool() -> str:
    """What is missing to compile for this machine; empty where nothing is."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))):
        return "C++ compiler (Debian: apt install g++)"
    import torch

    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton"
    return ""
