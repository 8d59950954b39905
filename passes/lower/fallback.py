"""Nodes that no region took: each becomes one ATen operator executed by torch, if it works on rows."""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import is_weight
from dscompile.passes.pointwise import is_pointwise
from dscompile.runtime.errors import UserError
from dscompile.runtime.ops_aten import is_allowed
from dscompile.runtime.plan import Aten

ACTIVATIONS = {
    "relu": ("aten.relu.default", {}),
    "silu": ("aten.silu.default", {}),
    "gelu": ("aten.gelu.default", {}),
    "gelu_tanh": ("aten.gelu.default", {"approximate": "tanh"}),
    "tanh": ("aten.tanh.default", {}),
    "sigmoid": ("aten.sigmoid.default", {}),
    "softplus": ("aten.softplus.default", {}),
}
"""The activations that are an operator of torch; `passes/fuse/spell_out.py` spells out the others."""
# Casts are of numbers to truths and back: a plan has one dtype of numbers.
CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}


def fallback(node: fx.Node) -> tuple[Aten, dict[str, fx.Node], dict[str, fx.Node]]:
    """(spec, activations by role, weights by role) of a node; raises UserError for one that cannot be compiled."""
    target, kwargs = _target(node)
    inputs: dict[str, fx.Node] = {}
    weights: dict[str, fx.Node] = {}
    args = []
    for i, a in enumerate(node.args[:1] if node.target is vocabulary.activation else node.args):
        if not isinstance(a, fx.Node):
            args.append(a)
        elif is_weight(a) and all(s == 1 for s in a.meta["val"].shape[:-1]):
            weights[f"x{i}"] = a
            args.append(f"w.x{i}")
        elif not is_weight(a) and a.meta["val"].ndim == 3:
            inputs[f"x{i}"] = a
            args.append(f"in.x{i}")
        else:
            raise _unsupported(node)
    if node.target in CASTS:
        return Aten("aten.clone.default", ("in.x0",)), inputs, weights
    return Aten(target, tuple(args), kwargs | dict(node.kwargs)), inputs, weights


def _target(node: fx.Node) -> tuple[str, dict]:
    value = node.meta["val"]
    if value.ndim != 3 or not (value.is_floating_point() or value.dtype == torch.bool):
        raise _unsupported(node)
    if node.target is vocabulary.activation and node.args[1] in ACTIVATIONS:
        return ACTIVATIONS[node.args[1]]
    simple = {vocabulary.add: "aten.add.Tensor", vocabulary.mul: "aten.mul.Tensor", vocabulary.scale: "aten.mul.Scalar"}
    if node.target is vocabulary.repeat_columns:
        return "aten.repeat_interleave.self_int", {"dim": -1}
    if node.target in simple:
        return simple[node.target], {}
    if is_pointwise(node.target) and (is_allowed(str(node.target)) or node.target in CASTS):
        return str(node.target), {}
    raise _unsupported(node)


def _unsupported(node: fx.Node) -> UserError:
    path = list((node.meta.get("nn_module_stack") or {}).values())
    where = f" in {path[-1][0].removeprefix('model.')}" if path else ""
    name = str(node.target) if hasattr(node.target, "_schema") else getattr(node.target, "__name__", node.target)
    return UserError(f"operator {name}{where} is not supported by this compiler; report the architecture")
