"""Every spelling of a row normalisation becomes `norm(x, weight, bias, Norm)`."""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.rule import Log
from dscompile.runtime.plan import Norm

aten = torch.ops.aten


def canonical_norms(graph: ModelGraph, log: Log) -> None:
    """layer_norm, rms_norm, x * rsqrt(mean(x^2) + eps), (x - mean) * rsqrt(var + eps), each [* w] [+ b]  ->  norm"""
    for node in list(graph.graph.nodes):
        if node not in graph.graph.nodes:
            continue
        if node.target is aten.layer_norm.default:
            _replace_layer_norm(graph, node, log)
        elif node.target is aten.rms_norm.default:
            eps = node.args[3] if len(node.args) > 3 and node.args[3] is not None else torch.finfo(torch.float32).eps
            weight = node.args[2] if len(node.args) > 2 else None
            _replace(graph, node, node.args[0], weight, None, Norm("rms", eps, weight is not None), log)
        elif (match := _reciprocal_deviation(node)) is not None:
            _replace_open_norm(graph, *match, log)
    graph.drop_dead()


def _replace_layer_norm(graph: ModelGraph, node: fx.Node, log: Log) -> None:
    x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    if len(shape) == 1:
        _replace(graph, node, x, weight, bias, Norm("layer", eps, weight is not None, bias is not None), log)


def _reciprocal_deviation(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(node, x, eps) where node = 1 / sqrt(mean(x^2) + eps) over the last dimension."""
    if node.target is aten.rsqrt.default or (node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        shifted = node.args[0]
    else:
        return None
    if shifted.target is not aten.add.Tensor or not isinstance(shifted.args[1], float | int):
        return None
    mean, eps = shifted.args
    if mean.target is not aten.mean.dim or not _over_last(mean):
        return None
    square = mean.args[0]
    if square.target is aten.pow.Tensor_Scalar and square.args[1] == 2:
        return node, square.args[0], float(eps)
    if square.target is aten.mul.Tensor and square.args[0] is square.args[1]:
        return node, square.args[0], float(eps)
    return None


def _over_last(mean: fx.Node) -> bool:
    last = mean.args[0].meta["val"].ndim - 1
    return [d % (last + 1) for d in mean.args[1]] == [last] and len(mean.args) > 2 and bool(mean.args[2])


def _replace_open_norm(graph: ModelGraph, deviation: fx.Node, x: fx.Node, eps: float, log: Log) -> None:
    scaled = next((u for u in deviation.users if u.target is aten.mul.Tensor and x in u.args), None)
    if scaled is None:
        return
    kind, source = "rms", x
    if _is_centred(x):
        kind, source = "layer", x.args[0]
    # Norms of one row that differ in their weights alone have been merged up to here.
    weighted = [(u, w) for u in scaled.users if (w := _weight_beside(scaled, u, aten.mul.Tensor)) is not None]
    results = weighted if len(weighted) == len(scaled.users) else [*weighted, (scaled, None)]
    for result, weight in results:
        bias = None
        if (step := _only_user(result, aten.add.Tensor)) is not None:
            result, bias = step
        _replace(graph, result, source, weight, bias, Norm(kind, eps, weight is not None, bias is not None), log)


def _is_centred(x: fx.Node) -> bool:
    """Whether x = z - mean(z) over the last dimension."""
    if x.target is not aten.sub.Tensor or not isinstance(x.args[1], fx.Node):
        return False
    mean = x.args[1]
    return mean.target is aten.mean.dim and mean.args[0] is x.args[0] and _over_last(mean)


def _only_user(node: fx.Node, target: object) -> tuple[fx.Node, fx.Node] | None:
    """(user, weight) where the node's only user combines it with a weight."""
    users = list(node.users)
    weight = _weight_beside(node, users[0], target) if len(users) == 1 else None
    return None if weight is None else (users[0], weight)


def _weight_beside(node: fx.Node, user: fx.Node, target: object) -> fx.Node | None:
    """What a user combines a node with, if it is a weight: a vector over the last dimension, or, of heads
    [1, T, H, D], a vector for each."""
    if user.target is not target:
        return None
    other = [a for a in user.args[:2] if a is not node]
    shapes = [node.meta["val"].shape[-1:]] + [node.meta["val"].shape[-2:]] * (node.meta["val"].ndim == 4)
    return other[0] if len(other) == 1 and is_weight(other[0]) and other[0].meta["val"].shape in shapes else None


def _replace(
    graph: ModelGraph,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    spec: Norm,
    log: Log,
) -> None:
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(vocabulary.norm, (x, weight, bias, spec))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    log.matched(f"{spec.kind} norm")
