"""What no region took is spelled out in operators that torch can execute one by one."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import depends_on, evaluate, has_value
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.lower.fallback import ACTIVATIONS
from dscompile.passes.normalize.assemble import constant
from dscompile.passes.normalize.cleanup import fold_weight_arithmetic
from dscompile.passes.pointwise import is_pointwise
from dscompile.passes.rule import Log

_EXAMPLE = (1, 2, 4)


def spell_out(graph: ModelGraph, log: Log) -> None:
    """f(x)  ->  torch's operators, where f is none of them;  c  ->  a weight, where c is computed of constants"""
    inputs: dict[fx.Node, bool] = {}
    for node in list(graph.graph.nodes):
        if node.target is vocabulary.softcap or (
            node.target is vocabulary.activation and node.args[1] not in ACTIVATIONS
        ):
            _spell(graph, node)
            log.matched("f(x) -> operators")
        elif is_pointwise(node.target):
            for operand in node.all_input_nodes:
                if _is_constant(graph, operand, inputs):
                    node.replace_input_with(operand, constant(graph, "numbers", evaluate(graph, operand, {}).float()))
    fold_weight_arithmetic(graph, log)


def _is_constant(graph: ModelGraph, node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether a node is a tensor of numbers that neither tokens nor the checkpoint change, and no weight yet."""
    value = node.meta.get("val")
    numbers = isinstance(value, Tensor) and value.is_floating_point() and not is_weight(node)
    return numbers and not depends_on(node, {graph.tokens, graph.positions}, memo) and has_value(graph, node)


def _spell(graph: ModelGraph, node: fx.Node) -> None:
    """Put the operators that a function of the vocabulary calls in the place of its node."""
    x, parameter, *alpha = node.args
    examples = [torch.empty(_EXAMPLE), *(torch.empty(w.meta["val"].shape) for w in alpha)]
    traced = make_fx(lambda y, *learned: node.target(y, parameter, *learned))(*examples)
    values = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), (x, *alpha), strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "output":
            node.replace_all_uses_with(values[inner.args[0]])
        elif inner.op == "call_function":
            values[inner] = _copy(graph, node, inner, values)


def _copy(graph: ModelGraph, node: fx.Node, inner: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), values.__getitem__)
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(inner.target, args, kwargs)
    value = inner.meta["val"]
    shape = node.meta["val"].shape if value.shape == _EXAMPLE else value.shape
    new.meta = {**node.meta, "val": node.meta["val"].new_empty(shape, dtype=value.dtype)}
    return new
