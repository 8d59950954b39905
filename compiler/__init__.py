"""The compiler: the only package that knows Hugging Face.

`compile_model` makes an artifact; `init_inference` compiles a live transformers model in one call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dscompile.compiler.compile import compile_model
    from dscompile.compiler.inference import init_inference

__all__ = ["compile_model", "init_inference"]

# Loaded on first use: importing transformers takes seconds, and argument errors should not wait for it.
_HOMES = {"compile_model": "compile", "init_inference": "inference"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
