"""f(x W + b): an activation, soft cap or factor in the epilogue of the linear it reads."""

from __future__ import annotations

import dataclasses

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear, other_users, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule
from dscompile.runtime.plan import Linear

FUNCTIONS = {vocabulary.activation, vocabulary.softcap, vocabulary.scale}


def _pattern(graph: ModelGraph, node: fx.Node) -> fx.Node | None:
    candidate = node.target in FUNCTIONS and isinstance(node.args[0], fx.Node)
    return node if candidate and node.args[0].target is fused_linear else None


def _check(graph: ModelGraph, node: fx.Node) -> str | None:
    linear = node.args[0]
    if others := other_users(linear, node):
        return f"{linear.name} is also read by {others}"
    if linear.args[1]:
        return f"{linear.name} already adds a residual"
    if _with_function(linear.args[3], node) is None:
        return f"the epilogue of {linear.name} already has a function that comes after this one"
    return None


def _with_function(spec: Linear, node: fx.Node) -> Linear | None:
    """The spec with the function appended to its epilogue, softcap(act(p)) * scale; None if the order forbids it."""
    (segment,), parameter = spec.segments, node.args[1]
    if node.target is vocabulary.scale:
        return dataclasses.replace(spec, scale=spec.scale * parameter)
    if spec.scale != 1.0 or spec.softcap:
        return None
    if node.target is vocabulary.softcap:
        return dataclasses.replace(spec, softcap=parameter)
    if segment.activation != "none" or segment.gated:
        return None
    return dataclasses.replace(spec, segments=(dataclasses.replace(segment, activation=parameter),))


def _rewrite(graph: ModelGraph, node: fx.Node) -> None:
    xs, residuals, weights, spec = node.args[0].args
    alpha = {"alpha": node.args[2]} if len(node.args) > 2 else {}
    args = (xs, residuals, weights | alpha, _with_function(spec, node))
    replace_with_region(graph, node, fused_linear, args, [node.args[0], node], RULE.name)


RULE = Rule("f(x W + b)", _pattern, _rewrite, _check)


def fuse_epilogue(graph: ModelGraph, log: Log) -> None:
    """Fuse elementwise functions into the linears they read."""
    apply_rule(RULE, graph, log)
