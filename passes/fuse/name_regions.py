"""Gives each region its names, from what it reads and what reads it."""

from __future__ import annotations

import operator

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_embed, fused_linear
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log

ORDER = ("attn_in", "mlp_in", "router", "attn_out", "mlp_out")
VIEWS = {operator.getitem, vocabulary.columns}


def name_regions(graph: ModelGraph, log: Log) -> None:
    """Set meta["regions"]: embed, attn_in, attention, attn_out, mlp_in, mlp_out, router,
    moe, head or norm; there may be several."""
    for node in graph.graph.nodes:
        if node.target is fused_linear:
            node.meta["regions"] = _linear_names(node)
        elif node.target is vocabulary.attention:
            node.meta["regions"] = ("attention",)
        elif node.target is vocabulary.moe:
            node.meta["regions"] = ("moe",)
        elif node.target is fused_embed:
            node.meta["regions"] = ("embed",)
        elif node.target in (vocabulary.norm, vocabulary.group_norm):
            node.meta["regions"] = ("norm",)


def _linear_names(node: fx.Node) -> tuple[str, ...]:
    if node.args[3].rows == "R":
        return ("head",)
    names = []
    readers = _readers(node)
    # A row that a residual is added to is no latent one, though layers that share a module share a number.
    layer = node.meta.get("layer")
    if any(r.target is vocabulary.attention or (not node.args[1] and _leads_to_attention(r, layer)) for r in readers):
        names.append("attn_in")
    if any(_computes_hidden(node, r) for r in readers):
        names.append("mlp_in")
    if any(r.target is vocabulary.moe and _producer(r.args[1]) is node for r in readers):
        names.append("router")
    for x in node.args[0]:
        producer = _producer(x)
        if producer.target is vocabulary.attention:
            names.append("attn_out")
        elif producer.target is fused_linear and not _is_sum(x) and _computes_hidden(producer, node):
            names.append("mlp_out")
    return tuple(n for n in ORDER if n in names) or ("linear",)


def _leads_to_attention(reader: fx.Node, layer: int | None) -> bool:
    """Whether a reader is an attention, or a linear or norm of the same layer between a latent row and one."""
    if reader.target is vocabulary.attention:
        return True
    if reader.meta.get("layer") != layer or reader.target not in (fused_linear, vocabulary.norm):
        return False
    if reader.target is fused_linear:
        _, residuals, _, spec = reader.args[:4]
        if residuals or spec.add or any(s.gated or s.activation != "none" for s in spec.segments):
            return False
    return any(_leads_to_attention(r, layer) for r in _readers(reader))


def _computes_hidden(node: fx.Node, reader: fx.Node) -> bool:
    """Whether a linear's activated product is what another linear reads: the hidden row of an MLP."""
    reads = reader.target is fused_linear and any(_producer(x) is node for x in reader.args[0])
    return reads and any(s.gated or s.activation != "none" for s in node.args[3].segments)


def _is_sum(x: fx.Node) -> bool:
    """Whether a row is the sum that a region stores of what it reads."""
    return x.target is operator.getitem and x.args[1] == len(x.args[0].args[3].segments)


def _readers(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        found += _readers(user) if user.target in VIEWS else [user]
    return found


def _producer(node: fx.Node) -> fx.Node:
    while node.target in VIEWS:
        node = node.args[0]
    return node
