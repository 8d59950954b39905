"""One file per model type whose attention transformers hard-codes; found by file name, each with `adapt(model)`.

`adapt` rebinds methods of the instance it is given so that attention goes through `compiler.attention.attend`.
It must not touch classes or modules of transformers: other models in the process use them.
"""

from __future__ import annotations

import importlib
import importlib.util
import types
from collections.abc import Callable

from torch import nn
from transformers import PretrainedConfig


def adapt(model: nn.Module) -> None:
    """Apply the adapter of the model's type, if there is one."""
    adapter = _adapter(model.config)
    if adapter is not None:
        adapter.adapt(model)


def reference_attention(config: PretrainedConfig) -> str:
    """The attention of transformers that defines what a model computes: eager, unless its adapter says otherwise."""
    return getattr(_adapter(config), "REFERENCE_ATTENTION", "eager")


def _adapter(config: PretrainedConfig) -> types.ModuleType | None:
    name = f"{__name__}.{config.model_type.replace('-', '_')}"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)


def rebind(model: nn.Module, class_name: str, method: str, function: Callable) -> None:
    """Replace a method of every module of a class (or of its subclasses) by `function(self, ...)`."""
    for module in model.modules():
        if any(cls.__name__ == class_name for cls in type(module).__mro__):
            setattr(module, method, types.MethodType(function, module))
