"""Evaluation of sub-graphs on chosen inputs: a pass asks what a sub-graph computes, not how it is spelled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.passes import recipe as recipes
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.recipe import Constant, Source


class NoValue(KeyError):
    """What is needed while compiling is a weight or an activation; the message names it."""

    def __str__(self) -> str:
        return str(self.args[0])


def evaluate(graph: ModelGraph, node: fx.Node, given: dict[fx.Node, Any]) -> Any:
    """Compute a node from the values of `given`; constants of the graph are known, other weights must be given.

    Buffers of a checkpoint are taken to hold what the model's code puts into them, and noted in `graph.assumed`.
    """
    values = dict(given)
    order = _in_order(node, values)
    last_use = {i: ancestor for ancestor in order for i in ancestor.all_input_nodes}
    for ancestor in order:
        if ancestor.op == "placeholder":
            values[ancestor] = _constant(graph, ancestor)
        else:
            args, kwargs = fx.node.map_arg((ancestor.args, ancestor.kwargs), values.__getitem__)
            values[ancestor] = ancestor.target(*args, **kwargs)
            for used in [i for i in ancestor.all_input_nodes if last_use[i] is ancestor]:
                del values[used]
    return values[node]


def has_value(graph: ModelGraph, node: fx.Node) -> bool:
    """Whether tokens and positions are all that is needed to compute a node: no weight goes in."""
    weights = (n for n in _in_order(node, {}) if is_weight(n))
    return all(isinstance(graph.recipe(n), Constant) for n in weights)


def unknown_weights(graph: ModelGraph, node: fx.Node, given: fx.Node) -> list[fx.Node]:
    """The checkpoint's weights behind a node, where `given` is known."""
    weights = [n for n in _in_order(node, {given: None}) if is_weight(n)]
    return [w for w in weights if recipes.sources(graph.recipe(w))]


def is_number(graph: ModelGraph, node: fx.Node) -> bool:
    """Whether a node is one element that constants of the graph decide."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.numel() != 1 or not has_value(graph, node):
        return False
    return all(n.op != "placeholder" or is_weight(n) for n in _in_order(node, {}))


def describe(graph: ModelGraph, node: fx.Node, given: Iterable[fx.Node]) -> str:
    """What `evaluate` computes from `given`, in words that are equal where the computations are."""
    numbers: dict[fx.Node, Any] = {n: f"%{i}" for i, n in enumerate(given)}
    lines = []
    for ancestor in _in_order(node, numbers):
        numbers[ancestor] = f"%{len(numbers)}"
        if ancestor.op == "placeholder":
            value = _constant(graph, ancestor)
            data = value.detach().contiguous().flatten().view(torch.uint8).numpy()
            lines.append(f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}")
        else:
            args, kwargs = fx.node.map_arg((ancestor.args, ancestor.kwargs), numbers.__getitem__)
            lines.append(f"{ancestor.target} {args} {kwargs}")
    return "\n".join(lines)


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
    def known(leaf: Source | Constant) -> Tensor:
        if isinstance(leaf, Constant):
            return graph.constants[leaf.name]
        if leaf.name not in graph.buffers:
            raise NoValue(f"{leaf.name} has no value at compile time")
        graph.assumed.add(leaf.name)
        return graph.buffers[leaf.name]

    if not is_weight(node):
        raise NoValue(f"{node.name} has no value at compile time")
    return recipes.evaluate(graph.recipe(node), known)
