"""Runs a graph on text, each weight loaded when its node runs, and stops before the nodes that are to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.recipe import Constant, Source, evaluate

Lookup = Callable[[Source | Constant], Tensor]
Values = list[tuple[Any, ...]]


def leaves(graph: ModelGraph, read: Callable[[str], Tensor]) -> Lookup:
    """The look-up of a graph's recipes. read: returns checkpoint tensors by name."""
    return lambda leaf: graph.constants[leaf.name] if isinstance(leaf, Constant) else read(leaf.name)


@torch.no_grad()
def walk(
    graph: ModelGraph, wanted: Mapping[fx.Node, tuple[fx.Node, ...]], windows: Sequence[Sequence[int]], lookup: Lookup
) -> Iterator[tuple[fx.Node, Values]]:
    """Yield each wanted node, in order, before it runs.

    wanted: node -> those of its inputs whose values are yielded with it, a tuple of them for every window
    An activation is kept, for all windows, until its last reader has run; a weight only while its node runs.
    """
    remaining = _readers(wanted)
    tokens = [torch.tensor([w]) for w in windows]
    positions = [torch.arange(len(w))[None] for w in windows]
    known: dict[fx.Node, list[Any]] = {graph.tokens: tokens, graph.positions: positions}
    for node in graph.graph.nodes:
        if node in wanted:
            yield node, list(zip(*(known[x] for x in wanted[node]), strict=True))
        if node not in remaining:
            continue
        if node.op == "call_function" and remaining[node]:
            weights = {n: evaluate(graph.recipe(n), lookup) for n in node.all_input_nodes if is_weight(n)}
            weights = {n: w.float() if w.is_floating_point() else w for n, w in weights.items()}
            known[node] = [_call(node, weights, known, i) for i in range(len(windows))]
        for source in set(node.all_input_nodes) & known.keys():
            remaining[source] -= 1
            if not remaining[source]:
                del known[source]


def _call(node: fx.Node, weights: dict[fx.Node, Tensor], known: dict[fx.Node, list[Any]], window: int) -> Any:
    find = lambda n: weights[n] if n in weights else known[n][window]  # noqa: E731
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), find)
    return node.target(*args, **kwargs)


def _readers(wanted: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """The wanted nodes and all that they are computed from, each with how many of these read it."""
    needed: dict[fx.Node, int] = {}
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed[node] = 0
        stack += node.all_input_nodes
    for node in needed:
        for source in node.all_input_nodes:
            needed[source] += 1
    return needed
