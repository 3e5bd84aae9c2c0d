"""diffusers' caches between the steps of a video: blocks that are not computed where they would change little.

`pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))`, as for diffusers' own transformers. A cache
acts on the steps of a video alone (eq 17): text is written, and video and text are denoised in lockstep, without it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from .errors import ConfigError, first_line

CACHES = "FirstBlockCacheConfig, MagCacheConfig, or TaylorSeerCacheConfig with use_lite_mode=True"


class StepCacheMixin(CacheMixin):
    """diffusers' interface for caches, for a transformer whose blocks have two streams."""

    def enable_cache(self, config: Any) -> None:
        """Skip blocks in some of the steps of a video, as ``config`` says: one of `CACHES`.

        Raises ConfigError for another, which would act on attention layers that our blocks do not call as a whole.
        """
        from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

        lite = isinstance(config, TaylorSeerCacheConfig) and config.use_lite_mode
        if not lite and not isinstance(config, FirstBlockCacheConfig | MagCacheConfig):
            raise ConfigError(f"{type(config).__name__} has no effect on blocks with two streams: use {CACHES}.")
        if len(self.blocks) < 2:
            raise ConfigError("A cache keeps what follows the first block, and this model has one block alone.")
        _register_blocks()
        try:
            super().enable_cache(config)
        except ValueError as error:
            raise ConfigError(f"The cache can't be enabled ({first_line(error)}).") from error

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Within the block, all blocks are computed; a cache that was enabled is so again afterwards, and empty."""
        config = self._cache_config
        if config is not None:
            self.disable_cache()
        try:
            yield
        finally:
            if config is not None:
                self.enable_cache(config)

    def begin_cache(self) -> None:
        """Empty an enabled cache, before the first step of a video."""
        if self.is_cache_enabled:
            self._reset_stateful_cache()

    def in_cache(self, branch: str) -> AbstractContextManager[None]:
        """What a forward pass of one branch of guidance runs in: each has its own cache."""
        return self.cache_context(branch) if self.is_cache_enabled else nullcontext()


def check_spans(model: StepCacheMixin) -> None:
    """Raise ConfigError for a cache that counts the steps of a whole video, where its steps are taken in two parts."""
    from diffusers import MagCacheConfig

    if isinstance(model._cache_config, MagCacheConfig):
        raise ConfigError(
            "MagCache has a ratio for each step from the first to the last, and `joint` takes them in two parts: call"
            " `transformer.disable_cache()` before it, or use FirstBlockCacheConfig."
        )


def _register_blocks() -> None:
    """Tell diffusers' hooks where a block's streams are; its registry imports every transformer it knows."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    from .layers import UniViGUBlock

    class TwoStreams(TransformerBlockMetadata):
        """A block's first two arguments are streams, whose hidden states are their first element."""

        def _get_parameter_from_args_kwargs(self, identifier: str, args: Any = (), kwargs: Any = None) -> Tensor:
            video, text = args[:2]
            if identifier == "hidden_states":
                return video[0]
            return video[0][:, :0] if text is None else text[0]

    streams = TwoStreams(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    TransformerBlockRegistry.register(UniViGUBlock, streams)
