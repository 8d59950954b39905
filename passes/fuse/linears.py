"""Every linear becomes a region that the rules can grow."""

from __future__ import annotations

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.quantize.choose import QUANTIZATION
from dscompile.passes.rule import Log, Rule, apply_rule
from dscompile.runtime.plan import Linear, Segment


def _rewrite(graph: ModelGraph, node: fx.Node) -> None:
    x, weight, *bias = node.args
    out_features, in_features = weight.meta["val"].shape
    spec = Linear(
        in_features,
        out_features,
        (Segment(0, out_features),),
        bias=bool(bias),
        quantization=node.meta.get(QUANTIZATION),
    )
    weights = {"weight": weight, "bias": bias[0]} if bias else {"weight": weight}
    replace_with_region(graph, node, fused_linear, ((x,), (), weights, spec), [node], RULE.name)


RULE = Rule("x W + b", lambda graph, node: node if node.target is vocabulary.linear else None, _rewrite)


def anchor_linears(graph: ModelGraph, log: Log) -> None:
    """Make a region of every linear."""
    apply_rule(RULE, graph, log)
