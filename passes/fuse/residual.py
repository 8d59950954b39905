"""x1 W1 + x2 W2 + ... + r: a sum's linears become one, concatenated along K, and its other terms residuals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.recipe import Add, ConcatColumns
from dscompile.passes.rule import Log, Rule, apply_rule


@dataclass(frozen=True)
class Match:
    total: fx.Node
    inner: tuple[fx.Node, ...]
    linears: tuple[fx.Node, ...]
    residuals: tuple[fx.Node, ...]


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    """The topmost of nested sums, flattened through sums that nothing else reads."""
    if node.target is not vocabulary.add:
        return None
    if len(node.users) == 1 and next(iter(node.users)).target is vocabulary.add:
        return None
    inner, terms = [], list(node.args)
    while nested := next((t for t in terms if t.target is vocabulary.add and len(t.users) == 1), None):
        inner.append(nested)
        at = terms.index(nested)
        terms[at : at + 1] = nested.args
    linears = tuple(t for t in terms if t.target is fused_linear)
    if not linears:
        return None
    usable = tuple(t for t in linears if _refusal(t) is None)
    return Match(node, tuple(inner), usable or linears, tuple(t for t in terms if t not in (usable or linears)))


def _refusal(linear: fx.Node) -> str | None:
    _, residuals, _, spec = linear.args
    if len(linear.users) != 1:
        return f"{linear.name} is also read by another node"
    if residuals or len(spec.segments) > 1 or spec.segments[0].gated or spec.segments[0].activation != "none":
        return f"{linear.name} already ends in another epilogue"
    return f"{linear.name} ends in a soft cap" if spec.softcap else None


def _check(graph: ModelGraph, match: Match) -> str | None:
    for linear in match.linears:
        if reason := _refusal(linear):
            return reason
    if len({(n.args[3].scale, n.args[3].out_features) for n in match.linears}) > 1:
        return "the linears of the sum have different factors or widths"
    if len({n.args[3].quantization for n in match.linears}) > 1:
        return "only some linears of the sum are quantized"
    return None


def _rewrite(graph: ModelGraph, match: Match) -> None:
    xs = tuple(x for n in match.linears for x in n.args[0])
    spec = match.linears[0].args[3]
    spec = dataclasses.replace(
        spec,
        in_features=sum(n.args[3].in_features for n in match.linears),
        bias=any(n.args[3].bias for n in match.linears),
        residuals=len(match.residuals),
    )
    args = (xs, match.residuals, _summed_weights(graph, match.linears), spec)
    took = [*match.linears, *match.inner, match.total]
    rule = CONCATENATED if len(match.linears) > 1 else RULE.name
    replace_with_region(graph, match.total, fused_linear, args, took, rule)


def _summed_weights(graph: ModelGraph, linears: tuple[fx.Node, ...]) -> dict[str, fx.Node]:
    if len(linears) == 1:
        return linears[0].args[2]
    parts = [n.args[2]["weight"] for n in linears]
    name = "+".join(p.meta["weight"] for p in parts)
    weights = {"weight": graph.add_weight(name, ConcatColumns(tuple(graph.recipe(p) for p in parts)))}
    biases = [n.args[2]["bias"] for n in linears if "bias" in n.args[2]]
    if biases:
        recipe = graph.recipe(biases[0])
        for bias in biases[1:]:
            recipe = Add(recipe, graph.recipe(bias))
        weights["bias"] = graph.add_weight("+".join(b.meta["weight"] for b in biases) + ":sum", recipe)
    return weights


CONCATENATED = "[x1 | x2] [W1 | W2] + r"
RULE = Rule("x W + b + r", _pattern, _rewrite, _check)


def fuse_residual(graph: ModelGraph, log: Log) -> None:
    """Fuse sums into the linears they add."""
    apply_rule(RULE, graph, log)
