"""Elementwise functions of heads that are laid flat afterwards become functions of flat rows."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.cleanup import RESHAPES, reshaped_back
from dscompile.passes.pointwise import is_pointwise
from dscompile.passes.rule import Log

aten = torch.ops.aten


def flatten_heads(graph: ModelGraph, log: Log) -> None:
    """flat(f(x, y, ..)) of heads [1, T, H, D]  ->  f(flat(x), flat(y), ..); a number for each head is repeated"""
    flats = [n for n in graph.graph.nodes if _lays_flat(n)]
    while flats:
        flat = flats.pop()
        function = flat.args[0]
        kinds = [_kind(a, function) for a in function.args]
        if not is_pointwise(function.target) or len(function.users) > 1 or None in kinds:
            continue
        pairs = zip(function.args, kinds, strict=True)
        args = [a if kind == "number" else _flattened(graph, flat, a, kind) for a, kind in pairs]
        flats += [a for a in args if isinstance(a, fx.Node) and _lays_flat(a) and a not in flats]
        with graph.graph.inserting_before(flat):
            new = graph.graph.call_function(function.target, tuple(args), dict(function.kwargs))
        new.meta = {**function.meta, "val": flat.meta["val"]}
        flat.replace_all_uses_with(new)
        for dead in (flat, function):
            graph.graph.erase_node(dead)
        log.matched("flat(f(heads)) -> f(flat(heads))")
    graph.drop_dead()


def _lays_flat(node: fx.Node) -> bool:
    """Whether a node reshapes heads [1, T, H, D] to rows [1, T, H * D]."""
    if node.target not in RESHAPES:
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    known = len(before) == 4 and len(after) == 3 and all(isinstance(s, int) for s in (*before[2:], after[2]))
    return known and before[0] == after[0] == 1 and before[2] * before[3] == after[2]


def _kind(argument: object, function: fx.Node) -> str | None:
    """How an argument of a function of heads is spread: "number", "column" or "head"; None for any other way."""
    if not isinstance(argument, fx.Node):
        return "number"
    value, heads = argument.meta.get("val"), function.meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape[:-1] != heads.shape[:-1]:
        return None
    if value.shape == heads.shape:
        return "column"
    splits = argument.target is aten.unsqueeze.default and argument.args[1] in (-1, 3)
    return "head" if splits and value.shape[-1] == 1 else None


def _flattened(graph: ModelGraph, flat: fx.Node, argument: fx.Node, kind: str | None) -> fx.Node:
    """Columns laid flat as `flat` does; a number for each head [1, T, H] repeated over its columns."""
    with graph.graph.inserting_before(flat):
        if kind == "head":
            times = flat.args[0].meta["val"].shape[-1]
            new = graph.graph.call_function(vocabulary.repeat_columns, (argument.args[0], times))
        else:
            new = graph.graph.call_function(aten.reshape.default, (argument, [1, -1, flat.meta["val"].shape[-1]]))
    new.meta = {**argument.meta, "val": flat.meta["val"]}
    if kind == "head":
        return new
    return reshaped_back(new, argument) or new
