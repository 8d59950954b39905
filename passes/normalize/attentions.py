"""dsc::attention with its head splitting, norms and rotation  ->  attention(q, k, v) over plain linears."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import NoValue, evaluate
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.assemble import assemble, constant, described, scaled, select, select_rows
from dscompile.passes.normalize.operands import LAYOUT, Operand, OperandReader, Rotation, Unreadable
from dscompile.passes.pointwise import is_pointwise
from dscompile.passes.recipe import Concat, Reshape
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
    by_head: bool = False
    weighed_rotated: bool = False


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
    found = {name: _before_norm(reader, reader.read(given[name])) for name in ("q", "k", "v")}
    operands = _share_heads(*(operand for operand, _ in found.values()))
    q, k, v = (
        _projection(graph, reader, node, o, after, f"{layer}.{name}")
        for o, (name, (_, after)) in zip(operands, found.items(), strict=True)
    )
    rotation = _common_rotation(operands)
    if v.across_heads or v.by_head:
        raise Unreadable("values are normalised over several heads, or each head by weights of its own")
    if any(getattr(q, how) != getattr(k, how) for how in ("across_heads", "by_head", "weighed_rotated")):
        raise Unreadable("q and k are normalised differently")
    if operands[2].scale != 1.0 and v.norm is not None:
        raise Unreadable("values are scaled after their norm")
    if operands[2].scale != 1.0:
        v.linear = scaled(graph, node, v.linear, operands[2].scale)
    weights = _weights(graph, rotation, given["alibi"], given["sinks"], {"q": q, "k": k, "v": v})
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
        norm_by_head=q.by_head,
        weigh_rotated=q.weighed_rotated,
        alibi=given["alibi"] is not None,
        sinks=given["sinks"] is not None,
        v_norm=v.norm,
    )
    result = _flat_output(graph, node)
    with graph.graph.inserting_before(node):
        args = (q.linear, k.linear, v.linear, graph.positions, weights, spec)
        new = graph.graph.call_function(vocabulary.attention, args)
    new.meta = {**node.meta, "val": result.meta["val"]}
    result.replace_all_uses_with(new)


def _before_norm(reader: OperandReader, operand: Operand) -> tuple[Operand, fx.Node | None]:
    """What a norm reads that comes after the rotation, and the norm: a rotation keeps a head's norm, so the two may
    change places if the norm's weights stay behind."""
    source = operand.sources[0]
    if len(operand.sources) > 1 or operand.rotation or source.target is not vocabulary.norm:
        return operand, None
    x, weight, bias, norm = source.args
    shape = source.meta["val"].shape
    if bias is not None or norm.kind != "rms" or len(shape) != 4 or isinstance(shape[2], int):
        return operand, None
    if weight is not None and weight.meta["val"].ndim > 1:
        return operand, None
    try:
        before = reader.read(x)
    except Unreadable:
        return operand, None
    order = torch.tensor(operand.index).flatten()
    if before.rotation is None or operand.scale != 1.0 or before.scale != 1.0:
        return operand, None
    if not torch.equal(order, torch.arange(len(order))) or len(order) != torch.tensor(before.index).numel():
        return operand, None
    turn = before.rotation.cos.double() ** 2 + before.rotation.sin.double() ** 2
    return (before, source) if torch.allclose(turn, torch.ones_like(turn), rtol=1e-6) else (operand, None)


def _share_heads(q: Operand, k: Operand, v: Operand) -> list[Operand]:
    """The operands with repeated heads of keys and values once: query heads share them in groups."""
    for group in range(len(k.index), 1, -1):
        if len(k.index) == len(v.index) == len(q.index) and len(k.index) % group == 0:
            first = [slice(i, None, group) for i in range(group)]
            if all(o.index[f] == o.index[first[0]] for o in (k, v) for f in first):
                return [q, *(dataclasses.replace(o, index=o.index[::group]) for o in (k, v))]
    return [q, k, v]


def _projection(
    graph: ModelGraph, reader: OperandReader, attention: fx.Node, operand: Operand, after: fx.Node | None, name: str
) -> Projection:
    """Make the linear behind an operand produce its columns in canonical order. after: a norm that follows the
    rotation."""
    source, index = operand.sources[0], torch.tensor(operand.index)
    if source.target is vocabulary.norm:
        return _normed(graph, reader, attention, operand, name)
    if len(operand.sources) > 1:
        linear = assemble(graph, attention, operand, name)
    else:
        linear = _columns(graph, attention, source, index, name)
    if after is None:
        return Projection(linear, None, None, None, False)
    _, weight, _, norm = after.args
    weight = select(graph, weight, torch.tensor(operand.order), f"{name}_norm")
    return Projection(linear, norm, weight, None, False, weighed_rotated=weight is not None)


def _columns(graph: ModelGraph, attention: fx.Node, source: fx.Node, index: torch.Tensor, name: str) -> fx.Node:
    """Columns of a linear, or of an elementwise function of one, in a new order."""
    if source.target is vocabulary.linear:
        return select_rows(graph, attention, source, index, name)
    inner = source.args[0] if source.args else None
    if not is_pointwise(source.target) or source.all_input_nodes != [inner] or inner.target is not vocabulary.linear:
        raise Unreadable(f"{described(source)} is neither a linear nor a norm of one")
    linear = select_rows(graph, attention, inner, index, name)
    with graph.graph.inserting_before(attention):
        new = graph.graph.call_function(source.target, (linear, *source.args[1:]), dict(source.kwargs))
    new.meta = {**source.meta, "val": linear.meta["val"]}
    return new


def _normed(graph: ModelGraph, reader: OperandReader, attention: fx.Node, operand: Operand, name: str) -> Projection:
    """The linear and the norm behind heads that share the norm's weights, have their own, or are one row to it."""
    index, spec = torch.tensor(operand.index), operand.sources[0].args[3]
    width = operand.sources[0].meta["val"].shape[-1]
    if any(s.target is not vocabulary.norm or s.args[3] != spec for s in operand.sources):
        raise Unreadable("heads are normalised differently")
    weights = [_concatenated(graph, [s.args[part] for s in operand.sources], f"{name}_norm") for part in (1, 2)]
    by_head = len(operand.sources) > 1 or any(w is not None and w.meta["val"].ndim > 1 for w in weights)
    across = not by_head and width == index.numel() and index.shape[0] > 1
    column = index.flatten()[None] % width if across else index % width
    if bool((column != column[:1]).any()):
        raise Unreadable("heads take their columns in different orders after the norm")
    if by_head and not torch.equal(index // width, index[:, :1] // width + 0 * index):
        raise Unreadable("heads mix columns of different heads after the norm")
    if by_head:
        weights = [_flat(graph, w) for w in weights]
    weight, bias = (select(graph, w, index.flatten() if by_head else column[0], f"{name}_norm") for w in weights)
    sources = [_linear_behind(reader, source) for source in operand.sources]
    if any(linear is not sources[0][0] for linear, _ in sources):
        raise Unreadable("heads come from different linears")
    rows = torch.cat([before for _, before in sources])[index]
    linear = select_rows(graph, attention, sources[0][0], rows, name)
    return Projection(linear, spec, weight, bias, across, by_head)


def _linear_behind(reader: OperandReader, norm: fx.Node) -> tuple[fx.Node, torch.Tensor]:
    """The linear that a norm reads, and its column for each of the norm's elements."""
    x = norm.args[0]
    if x.target is vocabulary.linear:
        return x, torch.arange(x.meta["val"].shape[-1])
    linear, before = reader.elements(x)
    if linear.target is not vocabulary.linear:
        raise Unreadable(f"{described(linear)} is not a linear")
    return linear, before.flatten()


def _concatenated(graph: ModelGraph, weights: list[fx.Node | None], name: str) -> fx.Node | None:
    """The weights of several norms one after another."""
    if len(weights) == 1 or any(w is None for w in weights):
        return weights[0]
    parts = tuple(graph.recipe(w) for w in weights if w is not None)
    return graph.add_weight(f"{weights[0].meta['weight']}@{name}:heads", Concat(parts))


def _flat(graph: ModelGraph, weight: fx.Node | None) -> fx.Node | None:
    if weight is None or weight.meta["val"].ndim == 1:
        return weight
    recipe = Reshape(graph.recipe(weight), (weight.meta["val"].numel(),))
    return graph.add_weight(f"{weight.meta['weight']}:flat", recipe)


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
    projections: dict[str, Projection],
) -> dict[str, fx.Node]:
    weights: dict[str, fx.Node | None] = {"sinks": sinks}
    if rotation is not None:
        weights["rope_cos"] = constant(graph, "rope_cos", rotation.cos)
        weights["rope_sin"] = constant(graph, "rope_sin", rotation.sin)
    if alibi is not None:
        weights["alibi_slopes"] = constant(graph, "alibi_slopes", torch.tensor(alibi, dtype=torch.float32))
    for x, projection in projections.items():
        weights |= {f"{x}_norm_weight": projection.norm_weight, f"{x}_norm_bias": projection.norm_bias}
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
    try:
        order = evaluate(graph, current, given)
    except NoValue:
        raise Unreadable(f"the heads' outputs are combined with other activations (by {current.name})") from None
    if order.shape != (1, 1, width) or not torch.equal(order.flatten(), torch.arange(width)):
        raise Unreadable(f"the heads' outputs are not concatenated in order (by {current.name})")
    return current
