"""Token and position look-ups, and everything that depends on positions alone, become embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import depends_on, depends_on_tokens, evaluate, has_value
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.recipe import Constant
from dscompile.passes.rule import Log

aten = torch.ops.aten


def canonical_embeddings(graph: ModelGraph, log: Log) -> None:
    """embedding(w, tokens) -> embedding;  w[f(positions)] with f(p) = p + offset -> position_embedding

    A tensor [1, T, D] computed from positions alone is tabulated for all positions up to max_seq_len.
    """
    memo: dict[fx.Node, bool] = {}
    for node in list(graph.graph.nodes):
        if node.target is aten.embedding.default and node.args[1] is graph.tokens:
            _replace(graph, node, vocabulary.embedding, (graph.tokens, node.args[0]))
            log.matched("w[tokens] -> embedding")
        elif (index := _looked_up(node)) is not None:
            offset = _position_offset(graph, index)
            if offset is not None:
                _replace(graph, node, vocabulary.position_embedding, (graph.positions, node.args[0], offset))
                log.matched("w[positions + c] -> position_embedding")
        elif node.target is vocabulary.add or node.target is aten.add.Tensor:
            for term in node.args:
                if isinstance(term, fx.Node) and _is_position_table(graph, term, memo):
                    _tabulate(graph, term)
                    log.matched("f(positions) -> position_embedding")
    graph.drop_dead()


def _looked_up(node: fx.Node) -> fx.Node | None:
    """The index [1, T] of a node that takes rows of a weight."""
    if node.target not in (aten.embedding.default, aten.index.Tensor) or not is_weight(node.args[0]):
        return None
    index = node.args[1] if node.target is aten.embedding.default else node.args[1][0]
    several = node.target is aten.index.Tensor and len(node.args[1]) > 1
    return None if several or index is None or index.meta["val"].ndim != 2 else index


def _position_offset(graph: ModelGraph, index: fx.Node) -> int | None:
    """c where index = positions + c, found by evaluating it."""
    probe = torch.arange(graph.max_seq_len)[None]
    if not depends_on(index, {graph.positions}, {}) or depends_on(index, {graph.tokens}, {}):
        return None
    offsets = evaluate(graph, index, {graph.positions: probe, graph.tokens: torch.zeros_like(probe)}) - probe
    return int(offsets[0, 0]) if bool((offsets == offsets[0, 0]).all()) else None


def _is_position_table(graph: ModelGraph, node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    if node.target is vocabulary.position_embedding or node.op != "call_function":
        return False
    if not isinstance(value := node.meta.get("val"), Tensor) or value.ndim != 3 or not has_value(graph, node):
        return False
    return not depends_on_tokens(graph, memo, node) and depends_on(node, {graph.positions}, {})


def _tabulate(graph: ModelGraph, node: fx.Node) -> None:
    positions = torch.arange(graph.max_seq_len)[None]
    table = evaluate(graph, node, {graph.positions: positions, graph.tokens: torch.zeros_like(positions)})[0].float()
    name = f"positions:{node.name}"
    graph.constants[name] = table
    weight = graph.add_weight(name, Constant(name, tuple(table.shape)))
    _replace(graph, node, vocabulary.position_embedding, (graph.positions, weight, 0))


def _replace(graph: ModelGraph, node: fx.Node, target: object, args: tuple) -> None:
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
