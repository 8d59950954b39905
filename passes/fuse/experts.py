"""moe(x) + r, moe(x) + f r: a sum's other term, and its factor of a row, in the epilogue of the mixture it adds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import other_users, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule


@dataclass(frozen=True)
class Match:
    total: fx.Node
    experts: fx.Node
    residual: fx.Node
    factored: tuple[fx.Node, fx.Node, fx.Node] | None
    """What the residual is a product of, with a number for each row that is repeated, and that number."""


def _anchor(graph: ModelGraph, node: fx.Node) -> None:
    node.meta["rules"] = [ANCHOR.name]


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    if node.target is not vocabulary.add:
        return None
    for experts, residual in (node.args, node.args[::-1]):
        if experts.target is vocabulary.moe:
            taken = experts.args[4].factor
            return Match(node, experts, residual, None if taken else _factored(residual))
    return None


def _factored(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    if product.target is not vocabulary.mul or len(product.users) > 1:
        return None
    for x, repeated in (product.args, product.args[::-1]):
        if repeated.target is vocabulary.repeat_columns and repeated.args[0].meta["val"].shape[-1] == 1:
            return x, repeated, repeated.args[0]
    return None


def _check(graph: ModelGraph, match: Match) -> str | None:
    others = other_users(match.experts, match.total)
    return f"{match.experts.name} is also read by {others}" if others else None


def _rewrite(graph: ModelGraph, match: Match) -> None:
    x, logits, residuals, weights, spec, *factor = match.experts.args
    spec = dataclasses.replace(spec, residuals=len(residuals) + 1)
    if match.factored:
        residual, repeated, number = match.factored
        args = (x, logits, (residual, *residuals), weights, dataclasses.replace(spec, factor=True), number)
        took = [match.experts, repeated, match.residual, match.total]
    else:
        args = (x, logits, (*residuals, match.residual), weights, spec, *factor)
        took = [match.experts, match.total]
    replace_with_region(graph, match.total, vocabulary.moe, args, took, RULE.name)


def _is_new(graph: ModelGraph, node: fx.Node) -> fx.Node | None:
    return node if node.target is vocabulary.moe and "rules" not in node.meta else None


ANCHOR = Rule("sum of w_e expert_e(x)", _is_new, _anchor)
RULE = Rule("moe(x) + r", _pattern, _rewrite, _check)


def fuse_experts(graph: ModelGraph, log: Log) -> None:
    """Fuse residuals into mixtures of experts."""
    apply_rule(ANCHOR, graph, log)
    apply_rule(RULE, graph, log)
