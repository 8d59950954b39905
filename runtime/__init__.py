"""Everything the serving machine needs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dscompile.runtime.engine import Engine
    from dscompile.runtime.errors import UserError
    from dscompile.runtime.generate import Request, Result
    from dscompile.runtime.loader import load
    from dscompile.runtime.sampler import SamplingParams

__all__ = ["Engine", "Request", "Result", "SamplingParams", "UserError", "load"]

_HOMES = {
    "Engine": "engine",
    "Request": "generate",
    "Result": "generate",
    "SamplingParams": "sampler",
    "UserError": "errors",
    "load": "loader",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands that only read files do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
