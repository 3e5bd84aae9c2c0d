"""LoRA adapters of Wan, in its public layouts, on the video side of Uni-ViGU.

The video side has Wan's weights under Wan's names, so diffusers' own loader of Wan's adapters applies: it reads the
layouts of diffusers and of the original code (``diffusion_model.``).

A model may come with one adapter, which it was trained with: ``pytorch_lora_weights.safetensors`` beside its parts, in
diffusers' layout. Such an adapter also loads in ``WanPipeline``.
"""

from pathlib import Path
from typing import Any

from diffusers.loaders import WanLoraLoaderMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import BadInputError, UniViGUError, first_line
from .extras import import_extra

TRAINED = "trained"  # the name of the adapter that a model was trained with
FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for the file of an adapter
_UP, _DOWN = ".lora_B.weight", ".lora_A.weight"


class UniViGULoraLoaderMixin(WanLoraLoaderMixin):
    """:class:`diffusers.loaders.WanLoraLoaderMixin`, from safetensors only, with a check of the base."""

    transformer: Any

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter to the transformer; the arguments are those of diffusers' ``load_lora_weights``.

        ``set_adapters``, ``fuse_lora`` and ``unload_lora_weights`` work on it as in any pipeline. Raises BadInputError
        for what is no adapter of Wan, and for an adapter that was made for another base.
        """
        source = pretrained_model_name_or_path_or_dict
        name = "The given adapter" if isinstance(source, dict) else f"The adapter {source}"
        import_extra("peft")
        if not isinstance(source, dict):
            source = str(source)
        try:
            hub = {key: value for key, value in kwargs.items() if key not in ("hotswap", "low_cpu_mem_usage")}
            state = self.lora_state_dict(source, **hub)
            _check_base(self.transformer, state, name)
            super().load_lora_weights(state, *args, **kwargs)
        except UniViGUError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
            raise BadInputError(
                f"{name} can't be loaded ({first_line(error)}): give a LoRA for Wan2.1 text-to-video, in safetensors."
            ) from error

    def _load_trained(self, folder: Path) -> None:
        """Load the adapter that the model in a folder was trained with, if there is one."""
        if (folder / FILE).is_file():
            self.load_lora_weights(folder, weight_name=FILE, adapter_name=TRAINED)

    def _take_trained(self) -> dict[str, Tensor] | None:
        """The layers of the adapter that the model was trained with, which is unloaded; None if there is none.

        Raises BadInputError where other adapters are loaded, because their layers would not load again.
        """
        adapters = set(getattr(self.transformer, "peft_config", None) or ())
        if adapters - {TRAINED}:
            raise BadInputError(
                "The pipeline has LoRA adapters, which are not saved with it: call `fuse_lora()` and"
                " `unload_lora_weights()` to save it with them, or `unload_lora_weights()` to save it without."
            )
        if not adapters:
            return None
        layers = adapter_layers(self.transformer, TRAINED)
        self.unload_lora_weights()
        return layers

    @classmethod
    def lora_state_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """The weights of an adapter under diffusers' names. Raises BadInputError for a pickle, which is not read."""
        weight_name = kwargs.get("weight_name") or ""
        if weight_name and not weight_name.endswith(".safetensors"):  # diffusers would unpickle it
            raise BadInputError(f"{weight_name} is no safetensors file: give a LoRA for Wan2.1 in safetensors.")
        return super().lora_state_dict(*args, **(kwargs | {"use_safetensors": True}))


def adapter_layers(transformer: Any, name: str) -> dict[str, Tensor]:
    """The weights of an adapter under diffusers' names, with its scale alpha / rank in them."""
    from peft.utils import get_peft_model_state_dict

    config = transformer.peft_config[name]
    state = get_peft_model_state_dict(transformer, adapter_name=name)
    scale = config.lora_alpha / config.r
    return {key: (value * scale if key.endswith(_UP) else value).detach().clone() for key, value in state.items()}


def _check_base(transformer: Any, state: dict[str, Tensor], name: str) -> None:
    """Raise BadInputError unless each part of the adapter fits a layer of the transformer."""
    parts = {key.removeprefix("transformer."): value for key, value in state.items() if key.startswith("transformer.")}
    if not parts:
        raise BadInputError(f"{name} has no weights for Wan's transformer: give a LoRA for Wan2.1 text-to-video.")
    layers = dict(transformer.named_modules())
    for key, value in parts.items():
        end = next((end for end in (_UP, _DOWN) if key.endswith(end)), None)
        if end is None:
            continue
        path = key.removesuffix(end)
        layer: Any = layers.get(path)
        layer = getattr(layer, "base_layer", layer)
        if not isinstance(layer, nn.Linear | nn.Conv3d):
            raise BadInputError(
                f"{name} was made for another base: it adapts the layer {path}, which this model doesn't have; use one"
                " for this model's base."
            )
        wanted = layer.weight.shape[0 if end == _UP else 1]
        found = value.shape[0 if end == _UP else 1]
        if wanted != found:
            raise BadInputError(
                f"{name} was made for another base: its part for {path} has a width of {found}, and this model's layer"
                f" one of {wanted}; use an adapter for this model's base."
            )
