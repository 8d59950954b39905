"""Every product of activations with a weight becomes `linear(x, weight, bias)`, one per role."""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.normalize.cleanup import RESHAPES, split_outputs
from dscompile.passes.recipe import Slice, Transpose
from dscompile.passes.rule import Log

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.matmul.default}


def canonical_linears(graph: ModelGraph, log: Log) -> None:
    """linear(x, w, b), addmm(b, x, w'), mm(x, w'), matmul(x, w') with w' [in, out]  ->  linear(x, w, b)"""
    for node in list(graph.graph.nodes):
        operands = _operands(graph, node)
        if operands is None:
            continue
        x, weight, bias = operands
        source = _rows(x)
        if source.meta["val"].ndim == 2:
            continue
        args = (source, weight) if bias is None else (source, weight, bias)
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(vocabulary.linear, args)
            new.meta = dict(node.meta)
            shape = (*source.meta["val"].shape[:-1], node.meta["val"].shape[-1])
            new.meta["val"] = node.meta["val"].new_empty(shape)
            replacement = new
            if source is not x:
                back = aten.squeeze.dim if x.meta["val"].ndim == 2 else aten.unsqueeze.default
                replacement = graph.graph.call_function(back, (new, 0 if back is aten.squeeze.dim else 1))
                replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        log.matched("x w' + b -> linear")
    graph.drop_dead()


def _operands(graph: ModelGraph, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """x, weight [N, K] and bias of a node that multiplies activations with a weight."""
    if node.target is aten.linear.default and is_weight(node.args[1]):
        return node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    if node.target is aten.addmm.default and not node.kwargs and is_weight(node.args[2]) and is_weight(node.args[0]):
        return node.args[1], _transposed(graph, node.args[2]), node.args[0]
    if node.target in PRODUCTS and is_weight(node.args[1]) and not is_weight(node.args[0]):
        weight = node.args[1]
        return (node.args[0], _transposed(graph, weight), None) if weight.meta["val"].ndim == 2 else None
    return None


def _transposed(graph: ModelGraph, weight: fx.Node) -> fx.Node:
    recipe = graph.recipe(weight)
    if isinstance(recipe, Transpose):
        name = weight.meta["weight"].split(":")[0]
        return graph.add_weight(f"{name}:rows", recipe.x)
    return graph.add_weight(f"{weight.meta['weight']}:t", Transpose(recipe))


def _rows(x: fx.Node) -> fx.Node:
    """The [1, T, K] node behind a [T, K] or [1, 1, T, K] view of it, or the node itself."""
    source, value = x, x.meta["val"]
    while source.target in RESHAPES and source.meta["val"].ndim != 3:
        source = source.args[0]
    shape = source.meta["val"].shape
    same = len(shape) == 3 and isinstance(shape[2], int) and shape[2] == value.shape[-1]
    return source if same and (value.ndim == 2 or value.shape[1] == 1) else x


def split_packed_linears(graph: ModelGraph, log: Log) -> None:
    """linear(x, w, b)[..., i:j], ...  ->  linear(x, w[i:j], b[i:j]), ...   where nothing else reads the product"""
    for node in list(graph.graph.nodes):
        if node.target is not vocabulary.linear or not node.users:
            continue
        parts = [part for user in node.users for part in (_column_ranges(user) or [None])]
        if None in parts:
            continue
        for part, start, stop in parts:
            part.replace_all_uses_with(rows_of_linear(graph, node, start, stop))
        log.matched("linear(x, w)[i:j] -> linear(x, w[i:j])")
    graph.drop_dead()


def rows_of_linear(graph: ModelGraph, node: fx.Node, start: int, stop: int) -> fx.Node:
    """Return a new linear that computes columns [start, stop) of a linear's output."""
    x, *weights = node.args
    sliced = []
    for weight in weights:
        name = f"{weight.meta['weight']}[{start}:{stop}]"
        sliced.append(graph.add_weight(name, Slice(graph.recipe(weight), start, stop)))
    with graph.graph.inserting_after(node):
        new = graph.graph.call_function(vocabulary.linear, (x, *sliced))
    new.meta = dict(node.meta)
    value = node.meta["val"]
    new.meta["val"] = value.new_empty((*value.shape[:-1], stop - start))
    return new


def _column_ranges(user: fx.Node) -> list[tuple[fx.Node, int, int]] | None:
    """The column ranges a slicing user takes: (node to replace, start, stop)."""
    source = user.args[0] if user.args else None
    if not isinstance(source, fx.Node) or not source.meta["val"].shape:
        return None
    last, width = source.meta["val"].ndim - 1, source.meta["val"].shape[-1]
    if user.target is aten.slice.Tensor and user.args[1] in (last, -1) and (len(user.args) < 5 or user.args[4] == 1):
        start = user.args[2] or 0
        start += width if start < 0 else 0
        return [(user, start, start + user.meta["val"].shape[-1])]
    if user.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        if (user.args[2] if len(user.args) > 2 else 0) not in (last, -1):
            return None
        sizes = [v.shape[-1] for v in user.meta["val"]]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [(n, starts[i], starts[i] + sizes[i]) for i, n in split_outputs(user).items()]
    return _rows_of_view(user) if user.target in RESHAPES else None


def _rows_of_view(view: fx.Node) -> list[tuple[fx.Node, int, int]] | None:
    """The column ranges of a product that is seen as [1, T, n, m] and of which each user selects one of n."""
    shape = view.meta["val"].shape
    if len(shape) != 4 or len(view.args[0].meta["val"].shape) != 3 or not all(isinstance(s, int) for s in shape[2:]):
        return None
    if any(u.target is not aten.select.int or u.args[1] not in (2, -2) for u in view.users):
        return None
    places = [(u, u.args[2] % shape[2]) for u in view.users]
    return [(u, place * shape[3], (place + 1) * shape[3]) for u, place in places]
