"""norm((table[token] + positions[position]) * scale): everything between the tokens and the first residual row."""

from __future__ import annotations

import dataclasses

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_embed, other_users, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.recipe import Scale
from dscompile.passes.rule import Log, Rule, apply_rule
from dscompile.runtime.plan import Embed


def _anchor(graph: ModelGraph, node: fx.Node) -> None:
    args = (graph.tokens, graph.positions, {"table": node.args[1]}, Embed())
    replace_with_region(graph, node, fused_embed, args, [node], ANCHOR.name)


def _anchor_positions(graph: ModelGraph, node: fx.Node) -> None:
    _, table, offset = node.args
    spec = Embed(table=False, position_offset=offset)
    args = (graph.tokens, graph.positions, {"positions_table": table}, spec)
    replace_with_region(graph, node, fused_embed, args, [node], POSITIONS.name)


def _pattern(graph: ModelGraph, node: fx.Node) -> fx.Node | None:
    if node.target not in (vocabulary.add, vocabulary.scale, vocabulary.norm):
        return None
    return node if _embed(node) is not None else None


def _embed(node: fx.Node) -> fx.Node | None:
    return next((a for a in node.all_input_nodes if a.target is fused_embed), None)


def _check(graph: ModelGraph, node: fx.Node) -> str | None:
    embed = _embed(node)
    if others := other_users(embed, node):
        return f"{embed.name} is also read by {others}"
    if _grown(graph, embed.args, node) is None:
        return f"{node.name} does not fit the form norm((table + positions) * scale)"
    return None


def _grown(graph: ModelGraph, args: tuple, node: fx.Node) -> tuple | None:
    """The embedding's arguments with one more operation, or None where the form does not allow it.

    table * s + positions = (table + positions / s) * s
    """
    tokens, positions, weights, spec = args
    if spec.norm is not None:
        return None
    if node.target is vocabulary.norm:
        _, weight, bias, norm = node.args
        roles = {r: w for r, w in (("norm_weight", weight), ("norm_bias", bias)) if w is not None}
        return tokens, positions, weights | roles, dataclasses.replace(spec, norm=norm)
    if node.target is vocabulary.scale:
        return tokens, positions, weights, dataclasses.replace(spec, scale=spec.scale * node.args[1])
    table = next((a for a in node.args if a.target is vocabulary.position_embedding), None)
    if table is None or spec.scale == 0.0 or spec.position_offset is not None:
        return None
    _, weight, offset = table.args
    if spec.scale != 1.0:
        name = f"{weight.meta['weight']}/{spec.scale}"
        weight = graph.add_weight(name, Scale(graph.recipe(weight), 1.0 / spec.scale))
    return tokens, positions, weights | {"positions_table": weight}, dataclasses.replace(spec, position_offset=offset)


def _rewrite(graph: ModelGraph, node: fx.Node) -> None:
    embed = _embed(node)
    took = [embed, *(a for a in node.all_input_nodes if a.target is vocabulary.position_embedding), node]
    replace_with_region(graph, node, fused_embed, _grown(graph, embed.args, node), took, RULE.name)


ANCHOR = Rule("table[token]", lambda graph, node: node if node.target is vocabulary.embedding else None, _anchor)
POSITIONS = Rule(
    "positions[position]",
    lambda graph, node: node if node.target is vocabulary.position_embedding else None,
    _anchor_positions,
)
RULE = Rule("norm((table[token] + positions) * scale)", _pattern, _rewrite, _check)


def fuse_embedding(graph: ModelGraph, log: Log) -> None:
    """Fuse the embedding with what follows it; positions that are added later are looked up where they are."""
    apply_rule(ANCHOR, graph, log)
    while apply_rule(RULE, graph, log):
        continue
    apply_rule(POSITIONS, graph, log)
