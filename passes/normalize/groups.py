"""Rows [1, T, G, P] of G groups of columns become plain rows [1, T, G * P]: group i is columns i * P to (i + 1) * P.

Models that compute something for all layers at once (per-layer embeddings) lay it out like this, and each layer takes
its group. Flat, the whole stays one product, one look-up and one norm, and a group is a range of its columns.
"""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import depends_on_tokens
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.cleanup import RESHAPES
from dscompile.passes.pointwise import is_pointwise
from dscompile.passes.rule import Log

aten = torch.ops.aten


def flatten_groups(graph: ModelGraph, log: Log) -> None:
    """f(reshape(x))[:, :, i]  ->  columns(f(x), i * P, (i + 1) * P)   where f works on groups one by one"""
    activations: dict[fx.Node, bool] = {}
    flat: dict[fx.Node, fx.Node] = {}
    for node in list(graph.graph.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op != "call_function" or source is None or not depends_on_tokens(graph, activations, node):
            continue
        if _is_grouped(node) and (new := _flattened(graph, node, flat)) is not None:
            flat[node] = new
        elif source in flat and (new := _exit(graph, node, flat[source])) is not None:
            node.replace_all_uses_with(new)
            log.matched("f(reshape(x))[i] -> f(x)[columns]")
    graph.drop_dead()


def _is_grouped(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim == 4 and all(isinstance(s, int) for s in value.shape[2:])


def _flattened(graph: ModelGraph, node: fx.Node, flat: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """What a node [1, T, G, P] computes as rows [1, T, G * P], or None where that is not known."""
    source, (groups, width) = node.args[0], node.meta["val"].shape[2:]
    if node.target in RESHAPES:
        shape = source.meta["val"].shape
        return source if len(shape) == 3 and shape[-1] == groups * width else flat.get(source)
    if node.target is vocabulary.norm and source in flat:
        _, weight, bias, spec = node.args
        shared = all(w is None or w.meta["val"].ndim == 1 for w in (weight, bias))
        return _call(graph, node, vocabulary.group_norm, (flat[source], weight, bias, spec, groups)) if shared else None
    alike = all(i in flat and i.meta["val"].shape == node.meta["val"].shape for i in node.all_input_nodes)
    numbers = node.meta["val"].is_floating_point()
    if not is_pointwise(node.target) or node.kwargs or not alike or not numbers:
        return None
    return _call(graph, node, node.target, tuple(flat[a] if isinstance(a, fx.Node) else a for a in node.args))


def _exit(graph: ModelGraph, node: fx.Node, x: fx.Node) -> fx.Node | None:
    """A node [1, T, ..] that takes one group, or lays all of them out as rows again."""
    groups, width = node.args[0].meta["val"].shape[2:]
    if node.target is aten.select.int and node.args[1] in (2, -2):
        start = node.args[2] % groups * width
        return _call(graph, node, vocabulary.columns, (x, start, start + width))
    back = node.target in RESHAPES and node.meta["val"].ndim == 3 and node.meta["val"].shape[-1] == groups * width
    return x if back else None


def _call(graph: ModelGraph, node: fx.Node, target: object, args: tuple) -> fx.Node:
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(target, args)
    value = args[0].meta["val"]
    width = args[2] - args[1] if target is vocabulary.columns else value.shape[-1]
    new.meta = {**node.meta, "val": value.new_empty((*value.shape[:-1], width))}
    return new
