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


def adapt(model: nn.Module) -> None:
    """Apply the adapter of the model's type, if there is one."""
    name = f"{__name__}.{model.config.model_type.replace('-', '_')}"
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name).adapt(model)


def rebind(model: nn.Module, class_name: str, method: str, function: Callable) -> None:
    """Replace a method of every module of a class (or of its subclasses) by `function(self, ...)`."""
    for module in model.modules():
        if any(cls.__name__ == class_name for cls in type(module).__mro__):
            setattr(module, method, types.MethodType(function, module))
