"""dsc::moe with its router  ->  moe(x, logits) over weights in one layout."""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.cleanup import RESHAPES
from dscompile.passes.normalize.routers import read_router
from dscompile.passes.recipe import Recipe, Reshape, ScaleRows, Transpose
from dscompile.passes.rule import Log
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Moe

aten = torch.ops.aten


def canonical_experts(graph: ModelGraph, log: Log) -> None:
    """Replace every traced mixture of experts; raises UserError where its router is not understood."""
    activations: dict[fx.Node, bool] = {}
    for node in [n for n in graph.graph.nodes if n.target is torch.ops.dsc.moe.default]:
        _replace(graph, node, activations)
        log.matched("router, dsc::moe -> moe")
    graph.drop_dead()


def _replace(graph: ModelGraph, node: fx.Node, activations: dict[fx.Node, bool]) -> None:
    x, index, factors, gate_up, down, up_bias, down_bias, activation, limit, shift, transposed, interleaved, scaled = (
        node.args
    )
    reading = read_router(graph, index, factors, activations)
    weights: dict = {"gate_up": _up(graph, gate_up, transposed, interleaved), "down": _rows(graph, down, transposed)}
    if up_bias is not None:
        weights |= {"gate_up_bias": _up(graph, up_bias, False, interleaved), "down_bias": down_bias}
    if reading.correction is not None:
        weights["correction"] = reading.correction
    if reading.factors is not None:
        if scaled:
            raise UserError(f"the router {reading.logits.name} multiplies inputs of experts by a factor for each")
        weights |= {r: _times(graph, w, reading.factors) for r, w in weights.items() if r in ("down", "down_bias")}
    _, width, hidden = weights["down"].meta["val"].shape
    spec = Moe(
        in_features=width,
        hidden_features=hidden,
        router=reading.router,
        activation=activation,
        limit=limit,
        shift=shift,
        bias=up_bias is not None,
        scale_input=scaled,
    )
    source = x
    while source.target in RESHAPES and source.meta["val"].ndim == 2:
        source = source.args[0]
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(vocabulary.moe, (source, reading.logits, (), weights, spec))
        flat = graph.graph.call_function(aten.squeeze.dim, (new, 0))
    new.meta = {**node.meta, "val": source.meta["val"].new_empty(source.meta["val"].shape)}
    flat.meta = dict(node.meta)
    node.replace_all_uses_with(flat)


def _times(graph: ModelGraph, weight: fx.Node, factors: fx.Node) -> fx.Node:
    """A weight [E, ...] with each expert's part times its factor [E]: what the expert returns is that times it."""
    name = f"{weight.meta['weight']}*{factors.meta['weight']}"
    flat = Reshape(graph.recipe(factors), (factors.meta["val"].numel(),))
    return graph.add_weight(name, ScaleRows(graph.recipe(weight), flat))


def _rows(graph: ModelGraph, weight: fx.Node, transposed: bool) -> fx.Node:
    """A weight as [E, out, in]."""
    recipe = graph.recipe(weight)
    return graph.add_weight(f"{weight.meta['weight']}:rows", Transpose(recipe)) if transposed else weight


def _up(graph: ModelGraph, weight: fx.Node, transposed: bool, interleaved: bool) -> fx.Node:
    """A weight [E, 2 F, ...] with the gate rows before the up rows."""
    weight = _rows(graph, weight, transposed)
    if not interleaved:
        return weight
    experts, rows, *rest = weight.meta["val"].shape
    paired: Recipe = Reshape(graph.recipe(weight), (experts, rows // 2, 2, *rest))
    halves = Reshape(Transpose(paired, (1, 2)), (experts, rows, *rest))
    return graph.add_weight(f"{weight.meta['weight']}:halves", halves)
