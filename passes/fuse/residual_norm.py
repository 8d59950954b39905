"""h = r + [norm](z), read by a linear through its norm or directly: the sum moves into the linear's prologue.

Where no linear can add the residual in its epilogue, because a norm stands between (sandwich norms, norms after the
branch), the linear that reads h computes it, and stores it if something else reads it too.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule


@dataclass(frozen=True)
class Match:
    linear: fx.Node
    total: fx.Node
    branch: fx.Node
    residual: fx.Node


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    """A linear that reads a sum, one of whose terms is a norm that nothing else reads."""
    if node.target is not fused_linear or len(node.args[0]) != 1:
        return None
    (total,) = node.args[0]
    if total.target is not vocabulary.add:
        return None
    for branch, residual in (total.args, total.args[::-1]):
        if branch.target is vocabulary.norm and len(branch.users) == 1:
            return Match(node, total, branch, residual)
    return None


def _check(graph: ModelGraph, match: Match) -> str | None:
    if match.linear.args[3].add:
        return f"{match.linear.name} already adds a row to its input"
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    early = [u.name for u in match.total.users if order[u] < order[match.linear]]
    return f"{match.total.name} is read before {match.linear.name}, by {', '.join(early)}" if early else None


def _rewrite(graph: ModelGraph, match: Match) -> None:
    _, residuals, weights, spec = match.linear.args
    z, weight, bias, norm = match.branch.args
    readers = [u for u in match.total.users if u is not match.linear]
    roles = {r: w for r, w in (("post_norm_weight", weight), ("post_norm_bias", bias)) if w is not None}
    spec = dataclasses.replace(spec, post_norm=norm, add=True, store=bool(readers))
    args = ((z,), residuals, weights | roles, spec, match.residual)
    took = [match.branch, match.total, match.linear]
    values = match.linear.meta["val"]
    region = replace_with_region(graph, match.linear, fused_linear, args, took, RULE.name)
    region.meta |= {key: match.linear.meta.get(key) for key in ("layer", "nn_module_stack")}
    if readers:
        _return_sum(graph, region, values, match.total, readers)


def _return_sum(graph: ModelGraph, region: fx.Node, values: object, total: fx.Node, readers: list[fx.Node]) -> None:
    """Make the stored sum one more output of a region, read by the sum's other readers."""
    several = isinstance(values, tuple)
    outputs = list(values) if several else [values]
    region.meta["val"] = (*outputs, total.meta["val"])
    with graph.graph.inserting_after(region):
        stored = graph.graph.call_function(operator.getitem, (region, len(outputs)))
        first = None if several else graph.graph.call_function(operator.getitem, (region, 0))
    for node, value in ((first, outputs[0]), (stored, total.meta["val"])):
        if node is not None:
            node.meta = {"val": value, "layer": region.meta.get("layer")}
    if first is not None:
        for user in [u for u in region.users if u not in (first, stored)]:
            user.replace_input_with(region, first)
    for reader in readers:
        reader.replace_input_with(total, stored)


RULE = Rule("([norm](z) + r) -> norm(.) W", _pattern, _rewrite, _check)


def fuse_residual_norm(graph: ModelGraph, log: Log) -> None:
    """Fuse sums of a norm and a residual into the linears that read them."""
    apply_rule(RULE, graph, log)
