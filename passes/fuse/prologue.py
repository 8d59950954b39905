"""norm(x) W: a norm in the prologue of the one linear that reads it."""

from __future__ import annotations

import dataclasses

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule


def _pattern(graph: ModelGraph, node: fx.Node) -> fx.Node | None:
    if node.target is not fused_linear or node.args[3].norm is not None:
        return None
    return node if any(x.target is vocabulary.norm for x in node.args[0]) else None


def _check(graph: ModelGraph, node: fx.Node) -> str | None:
    xs = node.args[0]
    if len(xs) > 1:
        return "one of several concatenated inputs is normalised"
    others = [u.name for u in xs[0].users if u is not node]
    return f"{xs[0].name} is also read by {', '.join(others)}" if others else None


def _rewrite(graph: ModelGraph, node: fx.Node) -> None:
    (norm,), residuals, weights, spec = node.args
    x, weight, bias, rule = norm.args
    weights = weights | {r: w for r, w in (("norm_weight", weight), ("norm_bias", bias)) if w is not None}
    args = ((x,), residuals, weights, dataclasses.replace(spec, norm=rule))
    new = replace_with_region(graph, node, fused_linear, args, [norm, node], RULE.name)
    new.meta |= {key: node.meta.get(key) for key in ("layer", "nn_module_stack")}


RULE = Rule("norm(x) W", _pattern, _rewrite, _check)


def fuse_prologue(graph: ModelGraph, log: Log) -> None:
    """Fuse norms into the linears that read them."""
    apply_rule(RULE, graph, log)
