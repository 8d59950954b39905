"""Mixtures of experts while tracing: one opaque node per layer, its gate read by evaluating it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dscompile.passes.vocabulary import ACTIVATIONS
from dscompile.runtime.errors import UserError

IMPLEMENTATION = "dscompile"
_LARGE = 1e4


@dataclass(frozen=True)
class Gate:
    """act(min(g, limit)) * (clamp(u, -limit, limit) + shift) of g and u, one after the other or interleaved."""

    activation: str
    limit: float
    shift: float
    interleaved: bool


def read_gate(apply: Callable[[Tensor], Tensor]) -> Gate | None:
    """The gate that a function [..., 2 F] -> [..., F] computes, or None if it is none we know."""
    for interleaved in (False, True):
        gate = _fit(apply, interleaved)
        if gate is not None:
            return gate
    return None


def _fit(apply: Callable[[Tensor], Tensor], interleaved: bool) -> Gate | None:
    def call(g: Tensor, u: Tensor) -> Tensor:
        return apply(torch.stack([g, u], -1).flatten(-2) if interleaved else torch.cat([g, u], -1))

    one = torch.ones(2, dtype=torch.float64)
    at_zero, at_one, at_large = (call(one, one * u)[0].item() for u in (0.0, 1.0, _LARGE))
    slope = at_one - at_zero
    if not slope:
        return None
    shift = round(at_zero / slope, 6)
    limit = round(at_large / slope - shift, 6)
    limit = 0.0 if limit > _LARGE / 2 else limit
    generator = torch.Generator().manual_seed(0)
    g, u = 6 * torch.randn(2, 512, dtype=torch.float64, generator=generator)
    bounded = g.clamp(max=limit) if limit else g
    factor = (u.clamp(-limit, limit) if limit else u) + shift
    for activation, function in ACTIVATIONS.items():
        if torch.allclose(call(g, u), function(bounded) * factor, rtol=1e-6, atol=1e-6):
            return Gate(activation, limit, shift, interleaved)
    return None


def read_experts(model: nn.Module) -> None:
    """Note on every module of experts what its gate computes; to be called before tracing, which has no values."""
    for module in model.modules():
        apply: Any = getattr(module, "_apply_gate", None)
        if apply is not None:
            vars(module)["gate"] = read_gate(apply)


def experts(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, scale_input: bool = False) -> Tensor:
    """The node of one layer's experts: x [T, K], index and weights [T, k] -> [T, K].

    Raises UserError for a gate that is not understood. transformers calls it for
    `experts_implementation`, adapters for experts that are hard-coded.
    """
    gate = getattr(module, "gate", None)
    if gate is None or not getattr(module, "has_gate", True):
        raise UserError(f"{type(module).__name__} computes its experts in a way dscompile does not understand")
    return torch.ops.dsc.moe(
        x,
        index,
        weights,
        module.gate_up_proj,
        module.down_proj,
        getattr(module, "gate_up_proj_bias", None),
        getattr(module, "down_proj_bias", None),
        gate.activation,
        gate.limit,
        gate.shift,
        bool(getattr(module, "is_transposed", False)),
        gate.interleaved,
        scale_input,
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts)
