"""Fold a norm's weight and bias into the linears that read it.

norm(x; g, b) W^T + c  =  norm(x) (W g)^T + (W b + c)   (g multiplies W's columns)

The kernel then multiplies raw rows and normalises the product: rms needs one factor per row, layer norm also the row
sums of the stored weight. Refused where something else reads the norm, or the weight serves another purpose.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.recipe import Add, MatVec, Scale
from dscompile.passes.rule import Log, Rule, apply_rule


@dataclass(frozen=True)
class Match:
    norm: fx.Node
    linears: tuple[fx.Node, ...]


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    if node.target is not vocabulary.norm or not (node.args[3].weight or node.args[3].bias):
        return None
    linears = tuple(u for u in node.users if u.target is vocabulary.linear)
    return Match(node, linears) if linears else None


def _check(graph: ModelGraph, match: Match) -> str | None:
    others = [u.name for u in match.norm.users if u not in match.linears]
    if others:
        return f"{match.norm.name} is also read by {', '.join(others)}"
    for linear in match.linears:
        shared = [u.name for u in linear.args[1].users if u is not linear]
        if shared:
            return f"the weight of {linear.name} is tied to {', '.join(shared)}"
    return None


def _rewrite(graph: ModelGraph, match: Match) -> None:
    x, weight, bias, spec = match.norm.args
    for linear in match.linears:
        _, w, *old = linear.args
        recipe, name = graph.recipe(w), w.meta["weight"]
        folded = graph.add_weight(f"{name}*norm", Scale(recipe, graph.recipe(weight)) if weight else recipe)
        c = old[0] if old else None
        if bias is not None:
            shift = MatVec(recipe, graph.recipe(bias))
            c = graph.add_weight(f"{name}@norm_bias", Add(shift, graph.recipe(c)) if c else shift)
        linear.args = (match.norm, folded) if c is None else (match.norm, folded, c)
    match.norm.args = (x, None, None, dataclasses.replace(spec, weight=False, bias=False))


RULE = Rule("norm(x; g, b) W -> norm(x) (W g) + W b", _pattern, _rewrite, _check)


def fold_norm(graph: ModelGraph, log: Log) -> None:
    """Fold every norm that allows it."""
    apply_rule(RULE, graph, log)
