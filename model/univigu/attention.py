"""Which implementation of attention a model uses: one of diffusers' backends, such as `flash` or `sage`."""

from typing import Any

from .errors import ConfigError, first_line


def set_attention_backend(model: Any, backend: str) -> None:
    """Make a model of diffusers, or ours, compute its attention with ``backend``; "" leaves torch's.

    Raises ConfigError for an unknown one, and for one that can't run here.
    """
    if not backend:
        return
    from diffusers.models.attention_dispatch import attention_backend

    try:
        with attention_backend():  # otherwise it would become the backend of every model in this process
            model.set_attention_backend(backend)
    except (AttributeError, ValueError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"The attention backend '{backend}' can't be used here ({first_line(error)}); leave it empty for torch's."
        ) from error
