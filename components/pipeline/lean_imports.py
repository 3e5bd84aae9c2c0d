"""Saves a command the time to import packages that it doesn't need.

diffusers and transformers import some packages whenever they are installed: scipy for losses of object detection and
schedules that no model here uses, peft for adapters. The library `univigu` requires neither, so without them a command
runs as it does where only the library is installed. Both also import torch's compiler, to mark functions that it must
leave alone; a command imports it once something is compiled. A small model loads in two thirds of the time this way.
transformers also reads the sources of all its models whenever it is imported: see `model_folders`.
Great Expectations imports clients of clouds and scipy's statistics, which take a third of its time. DeepSpeed imports
MLflow for a tuner of its settings, of which nothing is used.
"""

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import LazyLoader, find_spec, module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from components.pipeline.model_folders import remember

_CLOUDS = ("google.cloud", "google.auth", "google.api_core", "google.oauth2", "boto3", "botocore")
_COMPILER = "torch._dynamo"
_FOLDERS = "create_import_structure_from_path"  # of transformers
_SHARDED, _STORAGE = "torch.distributed.tensor", ("get_torch_storage_id", "get_torch_storage_size")
_TRACING, _MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op", "TransformGetItemToIndex"  # used by transformers


class _Process:
    is_command = False


def start_command() -> None:
    """Note that this process runs one command and then ends; elsewhere, as in tests, nothing is hidden."""
    _Process.is_command = True
    _read_models_once()


def import_models() -> None:
    """Import what runs models, without scipy, which may still be imported, and torch's compiler, which waits.

    transformers does without torch's sharded tensors: the models that processes share here are trained by DeepSpeed.
    """
    import torch.distributed

    with ExitStack() as left_out:
        left_out.enter_context(without("scipy"))
        # diffusers looks for OpenCV and a few others under the names of all distributions that are installed
        left_out.enter_context(_answering(metadata, "packages_distributions", {}))
        left_out.enter_context(_answering(torch.distributed, "is_available", False))
        _postpone_compiler()
        _leave_empty_tensors()
        import diffusers.pipelines.pipeline_utils  # noqa: F401

        import univigu.transformer  # noqa: F401
    _save_whole_tensors()


def import_training() -> None:
    """Import what trains models: `import_models` and DeepSpeed, without MLflow, which may still be imported."""
    import_models()
    with without("mlflow", importers=("deepspeed",)):
        import deepspeed  # noqa: F401


@contextmanager
def _answering(module: ModuleType, function: str, answer: object) -> Iterator[None]:
    """Within the block, a function without arguments gives this answer to a command."""
    asked = vars(module)[function]
    if _Process.is_command:
        vars(module)[function] = lambda: answer
    try:
        yield
    finally:
        vars(module)[function] = asked


def import_expectations() -> None:
    """Import Great Expectations without clients of clouds, where no table of ours is, and scipy's tests once used."""
    with without(*_CLOUDS, importers=("great_expectations",)):
        if _Process.is_command and "scipy.stats" not in sys.modules:
            _postpone("scipy.stats")
        import great_expectations  # noqa: F401


def _postpone(name: str) -> None:
    """Import a module once it is used, in the way that `importlib` documents for it."""
    package, _, attribute = name.rpartition(".")
    spec = find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = LazyLoader(spec.loader)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    known = {"__name__": name, "__file__": spec.origin, "__class__": ModuleType}

    class Postponed(type(module)):
        """Keeps waiting when `inspect` asks all modules which file they are, as it does while torch is imported."""

        def __getattribute__(self, attribute: str) -> Any:
            return known[attribute] if attribute in known else super().__getattribute__(attribute)

    module.__class__ = Postponed
    sys.modules[name] = module
    setattr(sys.modules[package], attribute, module)


@contextmanager
def without(*packages: str, importers: Collection[str] = ("diffusers", "transformers")) -> Iterator[None]:
    """Import as if `packages` were not installed, unless they have been imported already.

    The `importers` remember what they found, so adapters can't be used later in the same process, and once one of them
    is imported nothing is hidden any more.
    """
    hides = _Process.is_command and not {*importers} & sys.modules.keys()
    hidden = [name for name in packages if hides and name not in sys.modules]
    for name in hidden:
        # Python's own way to make an import fail
        # pyrefly: ignore[unsupported-operation]
        sys.modules[name] = None
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _read_models_once() -> None:
    """Let transformers remember what its models' folders export, also between processes.

    It reads every source file for that, asks twice, and its own cache holds fewer folders than it has (transformers
    5.23, utils/import_utils.py).
    """
    if "transformers" not in sys.modules and not any(isinstance(each, _RememberedFolders) for each in sys.meta_path):
        sys.meta_path.insert(0, _RememberedFolders())


class _RememberedFolders(MetaPathFinder):
    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != "transformers.utils.import_utils":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_remember(module: ModuleType) -> None:
            execute(module)
            read = vars(module)[_FOLDERS].__wrapped__
            vars(module)[_FOLDERS] = functools.cache(read)  # calls itself by this name for subfolders
            version = str(vars(sys.modules["transformers"]).get("__version__"))
            vars(module)[_FOLDERS] = remember(read, Path(str(spec.origin)).parents[1], version)

        vars(spec.loader)["exec_module"] = execute_and_remember
        return spec


def _leave_empty_tensors() -> None:
    """Draw no random numbers for tensors on the meta device, which hold none; torch imports sympy to do it.

    transformers creates text encoders there before it loads their weights.
    """
    import torch.nn.init as initial

    draw = initial.normal_
    if not _Process.is_command or hasattr(draw, "__wrapped__"):
        return

    @functools.wraps(draw)
    def draw_into(tensor: Any, *args: Any, **options: Any) -> Any:
        return tensor if tensor.is_meta else draw(tensor, *args, **options)

    initial.normal_ = draw_into


def _save_whole_tensors() -> None:
    """Look for sharded tensors among weights to save only where their package is imported already.

    huggingface_hub imports it, and with it sympy, to ask whether a weight is one (2.4, serialization/_torch.py).
    """
    from huggingface_hub.serialization import _torch as saving

    for name in _STORAGE if _Process.is_command else ():
        ask = vars(saving)[name]
        if not hasattr(ask, "__wrapped__"):
            vars(saving)[name] = _without_sharded(ask)


def _without_sharded(ask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(ask)
    def ask_whole(tensor: Any) -> Any:
        with without(_SHARDED, importers=()):
            return ask(tensor)

    return ask_whole


def _postpone_compiler() -> None:
    """Let a stand-in be torch's compiler until more of it is asked for than marks on functions."""
    if not _Process.is_command or _COMPILER in sys.modules:
        return
    import torch

    tracing = ModuleType(_TRACING)
    vars(tracing)[_MASKS] = lambda: getattr(import_module(_TRACING), _MASKS)()
    sys.modules.update({_COMPILER: _StandIn(), _TRACING: tracing})
    sys.meta_path.insert(0, _INSIDE)
    vars(torch)["_dynamo"] = sys.modules[_COMPILER]


def _import_compiler() -> ModuleType:
    import torch

    if _INSIDE in sys.meta_path:
        sys.meta_path.remove(_INSIDE)
        del sys.modules[_COMPILER], sys.modules[_TRACING], vars(torch)["_dynamo"]
    return import_module(_COMPILER)


class _StandIn(ModuleType):
    def __init__(self) -> None:
        super().__init__(_COMPILER)
        self.__path__ = []  # of a package
        self.disable, self.allow_in_graph = disable, allow_in_graph
        self.assume_constant_result = assume_constant_result
        self.eval_frame = SimpleNamespace(OptimizedModule=())  # for isinstance: no module is compiled
        # called where nothing is compiled, by torch's process groups and optimizers
        self.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
        self.graph_break = lambda msg="": None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks every module for its file
            raise AttributeError(name)
        return getattr(_import_compiler(), name)


class _InsideCompiler(MetaPathFinder, Loader):
    """Finder and loader of the modules inside the compiler: imports the compiler first."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.startswith(f"{_COMPILER}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _import_compiler()
        module = import_module(spec.name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec  # its own; it has run


_INSIDE = _InsideCompiler()


# --- marks of torch's compiler, for functions that are defined before it is imported ---------------------------------


def disable(function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Callable[..., Any]:
    """`torch._dynamo.disable`: as long as the compiler isn't imported, nothing is compiled."""
    if function is None:
        return functools.partial(disable, recursive=recursive, **options)

    whole: Callable[..., Any] = function

    @functools.cache
    def marked() -> Callable[..., Any]:
        return import_module(_COMPILER).disable(whole, recursive, **options)

    @functools.wraps(whole)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_imported = hasattr(sys.modules.get(_COMPILER), "__file__")
        return (marked() if is_imported else whole)(*args, **kwargs)

    return call


def allow_in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch._dynamo.allow_in_graph`, as diffusers does without it: the compiler may look inside."""
    return function


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch._dynamo.assume_constant_result`, which sets this mark."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
