"""Tensors with shapes and no memory: what a model's code would need is counted without any of it."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def without_data() -> Iterator[None]:
    """Within the block, new tensors have shapes and no memory, and random states stay as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _FusedAttention(), KnownShapes():
        yield


@contextmanager
def without_weights() -> Iterator[None]:
    """Within the block, models are built to count their weights: these have shapes and no memory, and nothing is drawn.

    Only a constructor's small tables and what it would draw are tensors of zeros or numbers on the CPU: for arithmetic
    on tensors without memory, torch imports sympy, which takes longer than all else that counting does.
    """
    with torch.device("meta"), _SmallOnes():
        yield


class _SmallOnes(TorchFunctionMode):
    """Tensors of positions are made on the CPU, and zeros there in place of random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.randn):
            kwargs.setdefault("device", "cpu")
            return func(*args, **kwargs) if func is torch.arange else torch.zeros(*args, **kwargs)
        return func(*args, **kwargs)


def recomputed(module: nn.Module, *arguments: Any) -> Any:
    """Run a block whose activations are recomputed for the backward pass, in which no mode for functions is active."""
    contexts = nullcontext(), _FusedAttention()
    return checkpoint(module.__call__, *arguments, use_reentrant=False, context_fn=lambda: contexts)


class _FusedAttention(TorchFunctionMode):
    """Attention on meta tensors keeps what it keeps on a CPU or GPU; torch's own keeps the matrix of scores there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class KnownShapes(TorchDispatchMode):
    """Operations on meta tensors have their results' shapes computed once for each kind of arguments.

    torch computes most of them in Python, which takes a third of a millisecond for each; a model's blocks are alike.
    """

    _known: ClassVar[dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            key = (func, torch.get_default_dtype(), _kind(args), _kind(tuple(kwargs.items())))
            known = self._known.get(key)
        except _NotMetaError:
            return func(*args, **kwargs)
        if known is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if _is_new(func, out, (*args, *kwargs.values())):
            self._known[key] = (out.shape, out.stride(), out.dtype)
        return out


class _NotMetaError(Exception):
    """An argument is a tensor with data, or can't be a key."""


def _kind(value: Any) -> Any:
    """What the shape of a result can depend on, of an argument of an operation."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "meta":
            raise _NotMetaError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout):
        return type(value), value
    if isinstance(value, torch.memory_format):
        return value
    raise _NotMetaError


def _is_new(func: Any, out: Any, arguments: Any) -> bool:
    """Whether an operation's result is one meta tensor with memory of its own, and it changes no argument."""
    if not isinstance(out, torch.Tensor) or type(out) is not torch.Tensor or out.device.type != "meta":
        return False
    schema = func._schema
    if schema.is_mutable or any(returned.alias_info for returned in schema.returns):
        return False
    own = out.untyped_storage()._cdata
    given = (tensor for tensor in tree_leaves(arguments) if isinstance(tensor, torch.Tensor))
    return all(tensor.untyped_storage()._cdata != own for tensor in given)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are created within it: those alive ``now``, and the ``peak``.

    It counts storages, not tensors, because views share their storage; a storage's finalizer reports when it is freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen[storage] = None
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Don't count these tensors, which existed before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = None

    def _free(self, size: int) -> None:
        self.now -= size
