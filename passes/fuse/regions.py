"""Fused operators: graph nodes that become plan steps, and the record of what each took in.

A region node calls one of the functions below, or `vocabulary.attention`. Its meta holds
  "took":  the nodes of the normalised graph it covers, [(name, op, shape), ...], in order;
  "rules": the rules that built it;  "saved": columns of intermediate rows that no longer go through memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.show import shape
from dscompile.runtime.plan import Embed, Linear


def fused_linear(
    xs: tuple[Tensor, ...],
    residuals: tuple[Tensor, ...],
    weights: dict[str, Tensor],
    spec: Linear,
    addend: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """See `plan.Linear`; xs lie side by side along K, addend is its `add`.

    Returns the segments' outputs and then the stored sum: one tensor if it is alone, else a tuple.
    """
    x = torch.cat(xs, -1) if len(xs) > 1 else xs[0]
    if spec.post_norm is not None:
        x = vocabulary.norm(x, weights.get("post_norm_weight"), weights.get("post_norm_bias"), spec.post_norm)
    x = x if addend is None else x + addend
    total = x
    if spec.norm is not None:
        x = vocabulary.norm(x, weights.get("norm_weight"), weights.get("norm_bias"), spec.norm)
    product = vocabulary.linear(x, weights["weight"], weights.get("bias"))
    outputs = []
    for segment in spec.segments:
        p = product[..., segment.start : segment.stop]
        alpha = weights["alpha"] if segment.activation == "xielu" else None
        if segment.gated:
            gate, up = p.chunk(2, -1)
            y = vocabulary.activation(gate, segment.activation, alpha) * up
        else:
            y = vocabulary.activation(p, segment.activation, alpha)
        y = vocabulary.softcap(y, spec.softcap) if spec.softcap else y
        outputs.append(y * spec.scale)
    for residual in residuals:
        outputs[0] = outputs[0] + residual
    outputs += [total] if spec.store else []
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def fused_embed(tokens: Tensor, positions: Tensor, weights: dict[str, Tensor], spec: Embed) -> Tensor:
    """See `plan.Embed`."""
    found = [vocabulary.embedding(tokens, weights["table"])] if spec.table else []
    if spec.position_offset is not None:
        found.append(vocabulary.position_embedding(positions, weights["positions_table"], spec.position_offset))
    y = sum(found[1:], found[0]) * spec.scale
    if spec.norm is not None:
        y = vocabulary.norm(y, weights.get("norm_weight"), weights.get("norm_bias"), spec.norm)
    return y


def replace_with_region(
    graph: ModelGraph, node: fx.Node, target: object, args: tuple, took: list[fx.Node], rule: str
) -> fx.Node:
    """Put a region in the place of `node`; `took` are the nodes it covers, of which regions bring their own record."""
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(target, args)
    anchors = [n for n in took if n.meta.get("took")]
    new.meta = {**node.meta, **(anchors[0].meta if anchors else {}), "val": node.meta["val"]}
    new.meta["took"] = [entry for n in took for entry in (n.meta.get("took") or [entry_of(n)])]
    rules = [r for n in took for r in n.meta.get("rules", ())]
    new.meta["rules"] = list(dict.fromkeys([*rules, rule]))
    interior = sum(n.meta["val"].shape[-1] for n in took if n is not node and isinstance(n.meta["val"], Tensor))
    new.meta["saved"] = sum(n.meta.get("saved", 0) for n in took) + interior
    node.replace_all_uses_with(new)
    return new


def entry_of(node: fx.Node) -> tuple[str, str, str]:
    """(name, op, shape) of a node, for the report."""
    return node.name, getattr(node.target, "__name__", str(node.target)), shape(node)


def is_plain(node: object) -> bool:
    """Whether a node is a linear region that nothing but its product has been fused to."""
    if not isinstance(node, fx.Node) or node.target is not fused_linear:
        return False
    _, residuals, _, spec = node.args[:4]
    (first, *more) = spec.segments
    return (
        not (residuals or more or first.gated or spec.softcap)
        and first.activation == "none"
        and spec.scale == 1.0
        and spec.norm is None
    )


def other_users(node: fx.Node, user: fx.Node) -> str:
    """The names of a node's users besides one, for a refusal."""
    return ", ".join(u.name for u in node.users if u is not user)
