"""dsc::attention with its head splitting, norms and rotation  ->  attention(q, k, v) over plain linears."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import evaluate
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.assemble import assemble, constant, select, select_rows
from dscompile.passes.normalize.operands import LAYOUT, Operand, OperandReader, Rotation, Unreadable
from dscompile.passes.rule import Log
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Attention, Norm


@dataclasses.dataclass
class Projection:
    """A canonical operand: the linear whose columns are head-major, and the norm between, if any."""

    linear: fx.Node
    norm: Norm | None
    norm_weight: fx.Node | None
    norm_bias: fx.Node | None
    across_heads: bool


def canonical_attentions(graph: ModelGraph, log: Log) -> None:
    """Replace every traced attention; raises UserError where an operand is not understood."""
    reader = OperandReader(graph)
    for layer, node in enumerate([n for n in graph.graph.nodes if n.target is torch.ops.dsc.attention.default]):
        try:
            _replace(graph, reader, node, layer)
        except Unreadable as e:
            path = node.meta.get("nn_module_stack")
            where = next(reversed(path.values()))[0] if path else node.name
            raise UserError(f"the attention of {where} cannot be compiled: {e}") from e
        log.matched("layout, rotation, dsc::attention -> attention")
    graph.drop_dead()


def _replace(graph: ModelGraph, reader: OperandReader, node: fx.Node, layer: int) -> None:
    names = ("q", "k", "v", "positions", "layer", "scale", "causal", "window", "chunk", "softcap", "sinks", "alibi")
    defaults = {"causal": True, "window": 0, "chunk": 0, "softcap": 0.0, "sinks": None, "alibi": None}
    given = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    operands = _share_heads(*(reader.read(given[name]) for name in ("q", "k", "v")))
    q, k, v = (_projection(graph, reader, node, o, f"{layer}.{name}") for o, name in zip(operands, "qkv", strict=True))
    rotation = _common_rotation(operands)
    if v.norm is not None or operands[2].scale != 1.0 or q.across_heads != k.across_heads:
        raise Unreadable("values are normalised or scaled, or q and k are normalised differently")
    weights = _weights(graph, rotation, given["alibi"], given["sinks"], q, k)
    num_heads, head_dim = len(operands[0].index), len(operands[0].index[0])
    spec = Attention(
        num_heads=num_heads,
        num_kv_heads=len(operands[1].index),
        head_dim=head_dim,
        v_head_dim=len(operands[2].index[0]),
        scale=given["scale"] * operands[0].scale * operands[1].scale,
        group=0,
        index=layer,
        causal=given["causal"],
        window=given["window"],
        chunk=given["chunk"],
        softcap=given["softcap"],
        rotary_dim=2 * rotation.pairs if rotation else 0,
        q_norm=q.norm,
        k_norm=k.norm,
        norm_across_heads=q.across_heads,
        alibi=given["alibi"] is not None,
        sinks=given["sinks"] is not None,
    )
    result = _flat_output(graph, node)
    with graph.graph.inserting_before(node):
        args = (q.linear, k.linear, v.linear, graph.positions, weights, spec)
        new = graph.graph.call_function(vocabulary.attention, args)
    new.meta = {**node.meta, "val": result.meta["val"]}
    result.replace_all_uses_with(new)


def _share_heads(q: Operand, k: Operand, v: Operand) -> list[Operand]:
    """The operands with repeated heads of keys and values once: query heads share them in groups."""
    for group in range(len(k.index), 1, -1):
        if len(k.index) == len(v.index) == len(q.index) and len(k.index) % group == 0:
            first = [slice(i, None, group) for i in range(group)]
            if all(o.index[f] == o.index[first[0]] for o in (k, v) for f in first):
                return [q, *(dataclasses.replace(o, index=o.index[::group]) for o in (k, v))]
    return [q, k, v]


def _projection(
    graph: ModelGraph, reader: OperandReader, attention: fx.Node, operand: Operand, name: str
) -> Projection:
    """Make the linear behind an operand produce its columns in canonical order."""
    source, index = operand.sources[0], torch.tensor(operand.index)
    if len(operand.sources) > 1:
        return Projection(assemble(graph, attention, operand, name), None, None, None, False)
    if source.target is vocabulary.linear:
        return Projection(select_rows(graph, attention, source, index, name), None, None, None, False)
    if source.target is not vocabulary.norm:
        raise Unreadable(f"{source.name} ({source.target}) is neither a linear nor a norm of one")
    x, weight, bias, spec = source.args
    width = source.meta["val"].shape[-1]
    across = width == index.numel() and index.shape[0] > 1
    column = index.flatten()[None] % width if across else index % width
    if bool((column != column[:1]).any()):
        raise Unreadable("heads take their columns in different orders after the norm")
    weight, bias = (select(graph, w, column[0], f"{name}_norm") for w in (weight, bias))
    if x.target is vocabulary.linear:
        linear, before = x, torch.arange(width)
    else:
        linear, before = reader.elements(x)
    if linear.target is not vocabulary.linear:
        raise Unreadable(f"{linear.name} ({linear.target}) is not a linear")
    rows = before.flatten()[index]
    return Projection(select_rows(graph, attention, linear, rows, name), spec, weight, bias, across)


def _common_rotation(operands: list[Operand]) -> Rotation | None:
    q, k, v = (o.rotation for o in operands)
    if v is not None or (q is None) != (k is None):
        raise Unreadable("values are rotated, or only one of q and k is")
    if q is not None and k is not None and not (torch.equal(q.cos, k.cos) and torch.equal(q.sin, k.sin)):
        raise Unreadable("q and k are rotated by different angles")
    return q


def _weights(
    graph: ModelGraph,
    rotation: Rotation | None,
    alibi: list[float] | None,
    sinks: fx.Node | None,
    q: Projection,
    k: Projection,
) -> dict[str, fx.Node]:
    weights: dict[str, fx.Node | None] = {"sinks": sinks}
    if rotation is not None:
        weights["rope_cos"] = constant(graph, "rope_cos", rotation.cos)
        weights["rope_sin"] = constant(graph, "rope_sin", rotation.sin)
    if alibi is not None:
        weights["alibi_slopes"] = constant(graph, "alibi_slopes", torch.tensor(alibi, dtype=torch.float32))
    weights |= {"q_norm_weight": q.norm_weight, "q_norm_bias": q.norm_bias}
    weights |= {"k_norm_weight": k.norm_weight, "k_norm_bias": k.norm_bias}
    return {role: node for role, node in weights.items() if node is not None}


def _flat_output(graph: ModelGraph, node: fx.Node) -> fx.Node:
    """The node that lays the output [1, T, H, Dv] out as rows [1, T, H * Dv], in order."""
    width = node.meta["val"].shape[2] * node.meta["val"].shape[3]
    code = torch.arange(width).view(1, 1, *node.meta["val"].shape[2:])
    zero = torch.zeros(1, 1, dtype=torch.long)
    given = {node: code, graph.tokens: zero, graph.positions: zero}
    current = node
    while True:
        users = list(current.users)
        if len(users) != 1 or users[0].target not in LAYOUT:
            break
        current = users[0]
    order = evaluate(graph, current, given)
    if order.shape != (1, 1, width) or not torch.equal(order.flatten(), torch.arange(width)):
        raise Unreadable(f"the heads' outputs are not concatenated in order (by {current.name})")
    return current
