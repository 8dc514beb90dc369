"""PyTorch's compiler, loaded when it is used.

torchvision, timm and optimizers import `torch._dynamo` only to say what it isn't to compile. With sympy and FSDP, which
it brings, that is a quarter of what a worker loads. They get this stand-in, which answers what they ask, and which the
module itself replaces as soon as anything else of it is used.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (self.__name__, name) != (NAME, "__path__"):  # asked for its other submodules
            raise AttributeError(name)
        return getattr(_loaded(self.__name__), name)


def load_when_used() -> None:
    """Put off the import of `torch._dynamo`, unless it has been imported."""
    if NAME in sys.modules:
        return
    for name in (NAME, f"{NAME}.utils"):
        sys.modules[name] = module = _StandIn(name)
        module.__spec__ = ModuleSpec(name, None)
    sys.modules[NAME].__dict__.update(disable=_disable, graph_break=lambda msg="": None)
    sys.modules[f"{NAME}.utils"].__dict__.update(is_compile_supported=_is_compile_supported)


def _loaded(module: str) -> ModuleType:
    """Import the module itself."""
    for name in (NAME, f"{NAME}.utils"):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
    return importlib.import_module(module)


def _disable(fn: Any = None, recursive: bool = True, **named: Any) -> Any:
    """Return the function as it is: nothing compiles it."""
    return fn if fn is not None else lambda fn: fn


def _is_compile_supported(device_type: str) -> Any:
    return _loaded(f"{NAME}.utils").is_compile_supported(device_type)
