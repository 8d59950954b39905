"""s (r + norm(z; g)) = s r + norm(z; s g): a factor of a residual sum leaves the sum to the linears that read it.

The factor is a weight of one element. What remains of it is a product of r alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.recipe import Scale
from dscompile.passes.rule import Log, Rule, apply_rule


@dataclass(frozen=True)
class Match:
    product: fx.Node
    factor: fx.Node
    norm: fx.Node
    residual: fx.Node


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    if node.target is not torch.ops.aten.mul.Tensor or len(node.args) != 2:
        return None
    total, factor = node.args
    if not is_weight(factor) or factor.meta["val"].numel() != 1 or total.target is not vocabulary.add:
        return None
    norm, residual = total.args if total.args[0].target is vocabulary.norm else total.args[::-1]
    return Match(node, factor, norm, residual) if norm.target is vocabulary.norm else None


def _check(graph: ModelGraph, match: Match) -> str | None:
    (total, _) = match.product.args
    for node, user in ((match.norm, total), (total, match.product)):
        if others := [u.name for u in node.users if u is not user]:
            return f"{node.name} is also read by {', '.join(others)}"
    return None if match.norm.args[3].weight else f"{match.norm.name} has no weight"


def _rewrite(graph: ModelGraph, match: Match) -> None:
    z, *parts, spec = match.norm.args
    by = graph.recipe(match.factor)
    products = [
        p and graph.add_weight(f"{p.meta['weight']}*{match.factor.meta['weight']}", Scale(graph.recipe(p), by))
        for p in parts
    ]
    with graph.graph.inserting_before(match.product):
        norm = graph.graph.call_function(vocabulary.norm, (z, *products, spec))
        residual = graph.graph.call_function(match.product.target, (match.residual, match.factor))
        total = graph.graph.call_function(vocabulary.add, (residual, norm))
    for new, old in ((norm, match.norm), (residual, match.product), (total, match.product)):
        new.meta = dict(old.meta)
    match.product.replace_all_uses_with(total)


RULE = Rule("s (r + norm(z; g)) -> s r + norm(z; s g)", _pattern, _rewrite, _check)


def share_factor(graph: ModelGraph, log: Log) -> None:
    """Share every factor of a residual sum between its terms."""
    apply_rule(RULE, graph, log)
