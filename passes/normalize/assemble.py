"""Linears that produce an attention operand's columns in canonical order, from one linear or from several."""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.operands import Operand, Unreadable
from dscompile.passes.recipe import Concat, Constant, Gather, Scale, Zeros, shape_of


def select_rows(graph: ModelGraph, attention: fx.Node, linear: fx.Node, index: torch.Tensor, name: str) -> fx.Node:
    """The linear, or a new one that computes its columns `index` in that order."""
    x, *weights = linear.args
    rows = index.flatten()
    if torch.equal(rows, torch.arange(linear.meta["val"].shape[-1])):
        return linear
    with graph.graph.inserting_before(attention):
        selected = tuple(select(graph, w, rows, name) for w in weights)
        new = graph.graph.call_function(vocabulary.linear, (x, *selected))
    value = linear.meta["val"]
    new.meta = {**linear.meta, "val": value.new_empty((*value.shape[:-1], len(rows)))}
    return new


def select(graph: ModelGraph, weight: fx.Node | None, rows: torch.Tensor, name: str) -> fx.Node | None:
    if weight is None or torch.equal(rows, torch.arange(weight.meta["val"].shape[0])):
        return weight
    return graph.add_weight(f"{weight.meta['weight']}@{name}", Gather(graph.recipe(weight), tuple(rows.tolist())))


def scaled(graph: ModelGraph, attention: fx.Node, linear: fx.Node, by: float) -> fx.Node:
    """A linear times a number."""
    x, *weights = linear.args
    if linear.target is not vocabulary.linear:
        raise Unreadable(f"{described(linear)} is scaled, and no linear")
    products = (graph.add_weight(f"{w.meta['weight']}*{by:.6g}", Scale(graph.recipe(w), by)) for w in weights)
    return _linear(graph, attention, (x, *products), linear)


def described(node: fx.Node) -> str:
    """A node and its operator, for a refusal."""
    return f"{node.name} ({getattr(node.target, '__name__', node.target)})"


def assemble(graph: ModelGraph, attention: fx.Node, operand: Operand, name: str) -> fx.Node:
    """The sum of one linear for each source: its columns in their places, zero in all others.

    A source whose columns go to several places (a rotated key that all heads share) computes them once, and a linear
    with a constant weight of zeros and ones copies them. Fusion makes one linear of the sum, concatenated along K.
    """
    index = torch.tensor(operand.index).flatten()
    terms, start = [], 0
    for number, source in enumerate(operand.sources):
        if source.target is not vocabulary.linear:
            raise Unreadable(f"{described(source)} is one of several activations, and no linear")
        stop = start + source.meta["val"].shape[-1]
        mine = (index >= start) & (index < stop)
        columns = torch.where(mine, index - start, -1)
        place = _copied if len(columns[mine].unique()) < int(mine.sum()) else _placed
        terms.append(place(graph, attention, source, columns, f"{name}.{number}"))
        start = stop
    total = terms[0]
    for term in terms[1:]:
        with graph.graph.inserting_before(attention):
            new = graph.graph.call_function(vocabulary.add, (total, term))
        new.meta = dict(term.meta)
        total = new
    return total


def _placed(graph: ModelGraph, attention: fx.Node, linear: fx.Node, columns: torch.Tensor, name: str) -> fx.Node:
    """A linear that computes column columns[i] of `linear` at i, zero where that is -1."""
    x, *weights = linear.args
    rows = linear.meta["val"].shape[-1]
    index = tuple(torch.where(columns < 0, rows, columns).tolist())
    placed = []
    for weight in weights:
        recipe = graph.recipe(weight)
        padded = Concat((recipe, Zeros((1, *shape_of(recipe)[1:]))))
        placed.append(graph.add_weight(f"{weight.meta['weight']}@{name}", Gather(padded, index)))
    return _linear(graph, attention, (x, *placed), linear)


def _copied(graph: ModelGraph, attention: fx.Node, linear: fx.Node, columns: torch.Tensor, name: str) -> fx.Node:
    """The same for columns that are wanted in several places."""
    used = columns[columns >= 0].unique()
    once = select_rows(graph, attention, linear, used, name)
    weight = constant(graph, "copies", (columns[:, None] == used).float())
    return _linear(graph, attention, (once, weight), linear)


def _linear(graph: ModelGraph, attention: fx.Node, args: tuple, like: fx.Node) -> fx.Node:
    with graph.graph.inserting_before(attention):
        new = graph.graph.call_function(vocabulary.linear, args)
    value = like.meta["val"]
    new.meta = {**like.meta, "val": value.new_empty((*value.shape[:-1], args[1].meta["val"].shape[0]))}
    return new


def constant(graph: ModelGraph, stem: str, value: torch.Tensor) -> fx.Node:
    """The constant of that value, under a new name if the stem is taken by another value."""
    number = 0
    while (name := f"{stem}.{number}") in graph.constants and not torch.equal(graph.constants[name], value):
        number += 1
    graph.constants[name] = value
    return graph.add_weight(name, Constant(name, tuple(value.shape)))
