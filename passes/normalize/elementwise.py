"""Elementwise functions of one value, recognised by their values; sums and products of two."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import depends_on_tokens, evaluate
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log

aten = torch.ops.aten
ELEMENTWISE = {
    getattr(getattr(aten, name), overload)
    for name, overload in [
        *((n, "Tensor") for n in ("add", "sub", "mul", "div", "rsub")),
        *((n, "Scalar") for n in ("add", "sub", "mul", "div", "rsub")),
        *((n, "default") for n in ("gelu", "silu", "relu", "tanh", "sigmoid", "erf", "exp", "neg", "square", "abs")),
        *((n, "default") for n in ("clamp", "clamp_min", "clamp_max", "hardtanh", "softplus", "mish", "leaky_relu")),
        ("pow", "Tensor_Scalar"),
    ]
}
TOLERANCE = 1e-6
"""Largest relative deviation from a named function: float32's resolution; BLOOM's sqrt(2/pi) has eight digits."""


def name_functions(graph: ModelGraph, log: Log) -> None:
    """f(x), however it is spelled  ->  activation(x, kind), softcap(x, cap) or scale(x, by)

    From each value, grow the set of nodes that are elementwise functions of it alone; the largest sub-graph with one
    exit whose values on a grid are those of a function we know is replaced by that function.
    """
    changed = True
    while changed:
        changed = False
        memo: dict[fx.Node, bool] = {}
        for node in list(graph.graph.nodes):
            if node.op == "call_function" and depends_on_tokens(graph, memo, node):
                changed |= _name_function_of(graph, node, log)
        graph.drop_dead()


def _name_function_of(graph: ModelGraph, x: fx.Node, log: Log) -> bool:
    cone = _cone(x)
    for exit_node in reversed(cone[1:]):
        inner = _between(x, exit_node)
        if any(set(n.users) - inner for n in inner - {x, exit_node}):
            continue
        grid = torch.cat([torch.linspace(-12, 12, 241, dtype=torch.float64), torch.tensor([-1e4, 1e4])])
        values = evaluate(graph, exit_node, {x: grid})
        found = _recognise(grid, values)
        if found is None:
            continue
        target, args = found
        if (target, args) == (vocabulary.scale, (1.0,)):
            exit_node.replace_all_uses_with(x)
            log.matched("f(x) -> x")
            return True
        with graph.graph.inserting_before(exit_node):
            new = graph.graph.call_function(target, (x, *args))
        new.meta = dict(exit_node.meta)
        exit_node.replace_all_uses_with(new)
        log.matched(f"f(x) -> {target.__name__}")
        return True
    return False


def _cone(x: fx.Node) -> list[fx.Node]:
    """x and the nodes that are elementwise functions of it and numbers, in order."""
    cone = [x]
    member = {x}
    node = x.next
    reach = {u for u in x.users}
    while reach and node.op != "output":
        if node in reach:
            reach.discard(node)
            of_x_alone = node.target in ELEMENTWISE and all(i in member for i in node.all_input_nodes)
            if of_x_alone and node.meta["val"].shape == x.meta["val"].shape:
                cone.append(node)
                member.add(node)
                reach |= set(node.users)
        node = node.next
    return cone


def _between(x: fx.Node, exit_node: fx.Node) -> set[fx.Node]:
    """The nodes on paths from x to exit_node, both included."""
    found, stack = {x, exit_node}, [exit_node]
    while stack:
        for i in stack.pop().all_input_nodes:
            if i not in found:
                found.add(i)
                stack.append(i)
    return found


def _recognise(grid: Tensor, values: Tensor) -> tuple | None:
    if not isinstance(values, Tensor) or values.shape != grid.shape or not torch.isfinite(values).all():
        return None
    for kind, function in vocabulary.ACTIVATIONS.items():
        if kind != "none" and _close(values, function(grid)):
            return vocabulary.activation, (kind,)
    slope = (values[-1] / grid[-1]).item()
    if slope and _close(values, grid * slope):
        return vocabulary.scale, (slope,)
    cap = values[-1].item()
    if cap > 0 and _close(values, cap * torch.tanh(grid / cap)):
        return vocabulary.softcap, (cap,)
    return None


def _close(values: Tensor, expected: Tensor) -> bool:
    return bool(((values - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1.0)).all())


def canonical_arithmetic(graph: ModelGraph, log: Log) -> None:
    """x + y and x * y of two activations of one shape  ->  add(x, y), mul(x, y); one number a row is repeated first"""
    targets = {aten.add.Tensor: vocabulary.add, aten.mul.Tensor: vocabulary.mul}
    memo: dict[fx.Node, bool] = {}
    for node in list(graph.graph.nodes):
        if node.target not in targets or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            continue
        if any(a.meta["val"].shape not in (node.meta["val"].shape, _one_a_row(node)) for a in node.args):
            continue
        if not all(a.target is vocabulary.position_embedding or depends_on_tokens(graph, memo, a) for a in node.args):
            continue
        with graph.graph.inserting_before(node):
            args = tuple(_repeated(graph, node, a) for a in node.args)
            new = graph.graph.call_function(targets[node.target], args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        memo[new] = True
        log.matched(f"x, y -> {targets[node.target].__name__}")
    graph.drop_dead()


def _one_a_row(node: fx.Node) -> torch.Size | None:
    """The shape of a number for each row of a node [1, T, N]."""
    shape = node.meta["val"].shape
    return torch.Size((*shape[:-1], 1)) if len(shape) == 3 else None


def _repeated(graph: ModelGraph, node: fx.Node, argument: fx.Node) -> fx.Node:
    """A number for each row repeated over the columns of `node`, which reads it; anything else as it is."""
    if argument.meta["val"].shape == node.meta["val"].shape:
        return argument
    new = graph.graph.call_function(vocabulary.repeat_columns, (argument, node.meta["val"].shape[-1]))
    new.meta = {**argument.meta, "val": node.meta["val"]}
    return new
