"""Evaluation of sub-graphs on chosen inputs: a pass asks what a sub-graph computes, not how it is spelled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.recipe import Constant


def evaluate(graph: ModelGraph, node: fx.Node, given: dict[fx.Node, Any]) -> Any:
    """Compute a node from the values of `given`; constants of the graph are known, other weights must be given."""
    values = dict(given)
    for ancestor in _in_order(node, values):
        if ancestor.op == "placeholder":
            values[ancestor] = _constant(graph, ancestor)
        else:
            args, kwargs = fx.node.map_arg((ancestor.args, ancestor.kwargs), values.__getitem__)
            values[ancestor] = ancestor.target(*args, **kwargs)
    return values[node]


def depends_on(node: fx.Node, roots: Iterable[fx.Node], memo: dict[fx.Node, bool]) -> bool:
    """Whether a node is computed from any of `roots`. Sizes of tensors do not count as dependence."""
    for n in _in_order(node, memo):
        memo[n] = n in roots or ("sym_size" not in str(n.target) and any(memo[i] for i in n.all_input_nodes))
    return memo[node]


def depends_on_tokens(graph: ModelGraph, memo: dict[fx.Node, bool], node: fx.Node) -> bool:
    """Whether a node carries activations, as opposed to positions, weights and sizes alone."""
    return depends_on(node, {graph.tokens}, memo)


def _in_order(node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """The ancestors of a node that are not known yet, and the node, inputs first."""
    order: list[fx.Node] = []
    seen = set()
    stack: list[tuple[fx.Node, bool]] = [(node, False)]
    while stack:
        current, expanded = stack.pop()
        if current in known or (current in seen and not expanded):
            continue
        if expanded:
            order.append(current)
            continue
        seen.add(current)
        stack.append((current, True))
        stack += [(i, False) for i in reversed(current.all_input_nodes)]
    return order


def _constant(graph: ModelGraph, node: fx.Node) -> Tensor:
    if is_weight(node) and isinstance(recipe := graph.recipe(node), Constant):
        return graph.constants[recipe.name]
    raise KeyError(f"{node.name} has no value at compile time")
