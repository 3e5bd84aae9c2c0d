"""A Wan checkpoint with a new text side, in little more memory than both have."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch.nn.modules.module import register_module_module_registration_hook

from . import wan
from .layers import UniViGUBlock

Model = TypeVar("Model", bound=Any)


def build_from_wan(
    cls: type[Model], source: str | Path | WanTransformer3DModel, text_config: Mapping[str, Any]
) -> Model:
    """``UniViGUTransformer3DModel.from_wan``, which describes it; ``cls`` is that class.

    The weights of Wan's blocks exist once: the model's own are dropped as each block is made, and the checkpoint's
    tensors are taken over, not copied.
    """
    rows = None
    if isinstance(source, WanTransformer3DModel):
        base = source
    else:
        folder = wan.transformer_folder(source)
        with wan.reading(source):
            base, found = WanTransformer3DModel.from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        wan.check_keys(found["missing_keys"], found["unexpected_keys"])
        rows = wan.token_rows(folder.parent)
    if rows is not None:
        text_config = {"vocab_size": len(rows), "tokenizer_length": len(rows), **text_config}
    expected = cls._get_init_keys(cls)
    with blocks_without_wans_weights():
        model = cls(**{k: v for k, v in base.config.items() if k in expected} | dict(text_config))
    wan.check_keys(*model.load_state_dict(base.state_dict(), strict=False, assign=True))
    model.init_text_side()
    if rows is not None and model.text_space is not None:
        model.text_space.init_from(rows)
        if model.text_output is not None:
            model.text_output.init_from(rows)
    return model.eval()


@contextmanager
def blocks_without_wans_weights() -> Iterator[None]:
    """Within the block, each transformer block that this thread makes has Wan's parameters on the meta device.

    They are initialised first, and one block's at a time, so that the text side gets the same random numbers as in a
    model that is made whole.
    """
    thread = threading.get_ident()

    def drop(_: nn.Module, __: str, block: nn.Module | None) -> None:
        if isinstance(block, UniViGUBlock) and threading.get_ident() == thread:
            for name, parameter in list(block.named_parameters()):
                if not wan.is_text_side(f"blocks.0.{name}"):
                    owner, _, last = name.rpartition(".")
                    setattr(block.get_submodule(owner), last, nn.Parameter(parameter.detach().to("meta")))

    hook = register_module_module_registration_hook(drop)
    try:
        yield
    finally:
        hook.remove()
