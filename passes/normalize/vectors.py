"""Vectors of weights that are added to every row: a linear's bias, or a term that broadcasts."""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.rule import Log

aten = torch.ops.aten
EXPANSIONS = {aten.expand.default, aten.expand_as.default}
BROADCASTING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def canonical_vectors(graph: ModelGraph, log: Log) -> None:
    """f(x, expand(w))  ->  f(x, w);  linear(x, w) + b  ->  linear(x, w, b)"""
    for node in list(graph.graph.nodes):
        if node.target in EXPANSIONS and _is_vector(node.args[0]) and all(_broadcasts(u, node) for u in node.users):
            node.replace_all_uses_with(node.args[0])
            log.matched("expand(w) -> w")
    for node in list(graph.graph.nodes):
        if (operands := _bare_linear_and_bias(node)) is not None:
            linear, bias = operands
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(vocabulary.linear, (*linear.args[:2], bias))
            new.meta = dict(linear.meta)
            node.replace_all_uses_with(new)
            log.matched("x w + b -> linear")
    graph.drop_dead()


def _is_vector(node: object) -> bool:
    return isinstance(node, fx.Node) and is_weight(node) and node.meta["val"].ndim == 1


def _broadcasts(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user combines a node with another operand of its shape."""
    if user.target not in BROADCASTING or user.kwargs:
        return False
    others = [a for a in user.args if a is not node]
    shapes = [a.meta["val"].shape for a in others if isinstance(a, fx.Node)]
    return len(others) == 1 and shapes == [node.meta["val"].shape]


def _bare_linear_and_bias(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for linear, bias in (node.args, node.args[::-1]):
        bare = isinstance(linear, fx.Node) and linear.target is vocabulary.linear and len(linear.args) == 2
        if bare and _is_vector(bias) and len(linear.users) == 1 and node.meta["val"].shape == linear.meta["val"].shape:
            return linear, bias
    return None
