"""The head computes logits only for the rows that are asked for."""

from __future__ import annotations

import dataclasses

from torch import fx

from dscompile.passes.fuse.regions import fused_linear
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule


def _pattern(graph: ModelGraph, node: fx.Node) -> fx.Node | None:
    is_head = node.target is fused_linear and not graph.is_encoder and any(u.op == "output" for u in node.users)
    return node if is_head and node.args[3].rows == "T" else None


def _check(graph: ModelGraph, node: fx.Node) -> str | None:
    return f"{node.name} adds a residual, which has a row for every token" if node.args[1] else None


def _rewrite(graph: ModelGraph, node: fx.Node) -> None:
    xs, residuals, weights, spec = node.args
    node.args = (xs, residuals, weights, dataclasses.replace(spec, rows="R"))
    node.meta["rules"] = [*node.meta["rules"], RULE.name]


RULE = Rule("(x W)[rows] -> x[rows] W", _pattern, _rewrite, _check)


def gather_head_rows(graph: ModelGraph, log: Log) -> None:
    """Move the choice of logit rows in front of the final norm and head."""
    apply_rule(RULE, graph, log)
