"""Undo detours through matrices: some models fold the batch into the tokens for a few operators."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_RESHAPES = (_aten.reshape.default, _aten.view.default)
_EXAMPLE_TOKENS = 13
_ROWWISE = (_aten.linear.default, _aten.layer_norm.default, _aten.rms_norm.default, _aten.gelu.default)


def restore_batch(graph: fx.Graph) -> None:
    """Let operators on rows [T, X] that were [1, T, X] before work on [1, T, X], so that activations have one shape.

    Where a detour holds an operator that is not known to treat the two alike, the detour stays.
    """
    batched: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        source = node.args[0] if node.args else None
        if node.target in _RESHAPES and source in batched and _same(node, batched[source]):
            node.replace_all_uses_with(batched[source])
        elif node.target in _RESHAPES and isinstance(source, fx.Node) and _drops_batch(source, node):
            batched[node] = source
        elif node.target is torch.ops.dsc.moe.default:
            with graph.inserting_after(node):
                batched[node] = graph.call_function(_aten.unsqueeze.default, (node, 0))
            batched[node].meta = {**node.meta, "val": node.meta["val"].unsqueeze(0)}
        elif any(n in batched for n in node.all_input_nodes) and _is_rowwise(node, batched):
            copy = _on_batched(graph, node, batched)
            if copy is not None:
                batched[node] = copy
    graph.eliminate_dead_code()


def _same(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta["val"].shape, other.meta["val"].shape
    return len(a) == len(b) and all(bool(x == y) for x, y in zip(a, b, strict=True))


def _drops_batch(source: fx.Node, node: fx.Node) -> bool:
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return len(before) == 3 and len(after) == 2 and bool(before[0] == 1) and bool(before[1] == after[0])


def _is_rowwise(node: fx.Node, batched: dict[fx.Node, fx.Node]) -> bool:
    """Whether every input is a matrix with a batched twin, or a weight."""
    known = all(n in batched or n.op == "placeholder" for n in node.all_input_nodes)
    return known and (node.target in _ROWWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()))


def _on_batched(graph: fx.Graph, node: fx.Node, batched: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A copy of a node on the twins of its inputs; None if its result is not [1, ...] of the node's."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _example(batched.get(n, n)))
    assert callable(node.target), "only call_function nodes come here"
    if node.target(*args, **kwargs).shape != (1, *_example(node).shape):
        return None
    with graph.inserting_after(node):
        copy = graph.node_copy(node, lambda n: batched.get(n, n))
    copy.meta = {**node.meta, "val": node.meta["val"].unsqueeze(0)}
    return copy


def _example(node: fx.Node) -> Tensor:
    """A tensor without data like a node's. Its number of tokens is not symbolic: torch 2.11 multiplies no such ones."""
    value = node.meta["val"]
    shape = [s if isinstance(s, int) else _EXAMPLE_TOKENS for s in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")
