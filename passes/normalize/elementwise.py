"""Elementwise functions of one value, recognised by their values; sums and products of two."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import depends_on, depends_on_tokens, evaluate, unknown_weights
from dscompile.passes.graph import ModelGraph
from dscompile.passes.normalize.learned import recognise_learned
from dscompile.passes.pointwise import is_pointwise
from dscompile.passes.rule import Log

aten = torch.ops.aten
TOLERANCE = 1e-6
"""Largest relative deviation from a named function: float32's resolution; BLOOM's sqrt(2/pi) has eight digits."""


def name_functions(graph: ModelGraph, log: Log) -> None:
    """f(x), however it is spelled  ->  activation(x, kind[, learned numbers]), softcap(x, cap) or scale(x, by)

    From each value, grow the set of nodes that are elementwise functions of it and of single numbers; the largest
    sub-graph with one exit whose values on a grid are those of a function we know is replaced by that function.
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
    if not isinstance(x.meta["val"], Tensor) or not x.meta["val"].is_floating_point():
        return False
    cone = _cone(graph, x)
    for exit_node in reversed(cone[1:]):
        inner = _between(x, exit_node, set(cone))
        if any(set(n.users) - inner for n in inner - {x, exit_node}):
            continue
        found = _function_of(graph, exit_node, x)
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


def _function_of(graph: ModelGraph, exit_node: fx.Node, x: fx.Node) -> tuple | None:
    """(vocabulary's function, its arguments after x) that a node is of x, or None."""
    grid = torch.cat([torch.linspace(-12, 12, 241, dtype=torch.float64), torch.tensor([-1e4, 1e4])])
    if learned := unknown_weights(graph, exit_node, x):
        return recognise_learned(graph, learned, grid, lambda given: evaluate(graph, exit_node, {x: grid, **given}))
    return _recognise(grid, evaluate(graph, exit_node, {x: grid}))


def _cone(graph: ModelGraph, x: fx.Node) -> list[fx.Node]:
    """x and the nodes that are elementwise functions of it and single numbers, in order."""
    cone = [x]
    inputs: dict[fx.Node, bool] = {}
    member = {x}
    node = x.next
    reach = {u for u in x.users}
    while reach and node.op != "output":
        if node in reach:
            reach.discard(node)
            of_x_alone = is_pointwise(node.target) and all(
                i in member or _is_single(graph, i, inputs) for i in node.all_input_nodes
            )
            if of_x_alone and node.meta["val"].shape == x.meta["val"].shape:
                cone.append(node)
                member.add(node)
                reach |= set(node.users)
        node = node.next
    return cone


def _is_single(graph: ModelGraph, node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether a node is one number that neither tokens nor positions change."""
    value = node.meta.get("val")
    single = isinstance(value, Tensor) and all(isinstance(s, int) and s == 1 for s in value.shape)
    return single and not depends_on(node, {graph.tokens, graph.positions}, memo)


def _between(x: fx.Node, exit_node: fx.Node, cone: set[fx.Node]) -> set[fx.Node]:
    """The nodes of a cone on paths from x to exit_node, both included."""
    found, stack = {x, exit_node}, [exit_node]
    while stack:
        for i in stack.pop().all_input_nodes:
            if i in cone and i not in found:
                found.add(i)
                stack.append(i)
    return found


def _recognise(grid: Tensor, values: Tensor) -> tuple | None:
    if not isinstance(values, Tensor) or values.shape != grid.shape or not values.is_floating_point():
        return None
    if not torch.isfinite(values).all():
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
