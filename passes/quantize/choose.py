"""Chooses the linears that are quantized: all but the head, routers, experts and what is told to stay."""

from __future__ import annotations

from collections.abc import Callable, Container

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule
from dscompile.runtime.plan import Quantization

QUANTIZATION = "quantization"
"""The key of a linear node's meta that holds its plan.Quantization."""


def choose_linears(
    quantization: Quantization, head: bool = False, keep: Container[str] = ()
) -> Callable[[ModelGraph, Log], None]:
    """Return the pass. head: take the head too; keep: names of weights whose linears stay as they are."""

    def check(graph: ModelGraph, node: fx.Node) -> str | None:
        if node.target is vocabulary.moe:
            return "experts stay as they are in this version"
        if node is _head(graph) and not head:
            return "the head stays as it is without --quant-lm-head"
        if _makes_logits_of_experts(node):
            return "a router's logits decide which experts run"
        if node.args[1].meta["weight"] in keep:
            return "kept as it is to meet the accuracy budget"
        return None

    def rewrite(graph: ModelGraph, node: fx.Node) -> None:
        node.meta[QUANTIZATION] = quantization

    kinds = {vocabulary.linear, vocabulary.moe}
    rule = Rule("x W -> x int8(W)", lambda graph, n: n if n.target in kinds else None, rewrite, check)

    def choose(graph: ModelGraph, log: Log) -> None:
        apply_rule(rule, graph, log)

    choose.__name__ = "choose_linears"
    return choose


def _makes_logits_of_experts(node: fx.Node) -> bool:
    """Whether a mixture of experts reads a node as logits: a factor or soft cap may stand between."""
    between = (vocabulary.scale, vocabulary.softcap)
    return any(
        u.args[1] is node if u.target is vocabulary.moe else u.target in between and _makes_logits_of_experts(u)
        for u in node.users
    )


def _head(graph: ModelGraph) -> fx.Node:
    """The linear that makes the logits: a factor or soft cap may follow it."""
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    node = output.args[0]
    while node.target is not vocabulary.linear and node.op == "call_function":
        node = node.args[0]
    return node


def quantized_linears(graph: ModelGraph) -> list[fx.Node]:
    """The chosen linears, in order."""
    return [n for n in graph.graph.nodes if QUANTIZATION in n.meta]
