"""Rules: a pattern that finds candidates, a check that may refuse with a reason, a rewrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from dscompile.passes.graph import ModelGraph


@dataclass(frozen=True)
class Rule:
    """One rewriting, named by its equation.

    pattern: the match anchored at a node, or None if the node is no candidate.
    check:   why a candidate is refused, in words, or None.
    rewrite: replaces the match in the graph.
    """

    name: str
    pattern: Callable[[ModelGraph, fx.Node], Any]
    rewrite: Callable[[ModelGraph, Any], None]
    check: Callable[[ModelGraph, Any], str | None] = lambda graph, match: None


@dataclass(frozen=True)
class NearMiss:
    """A candidate that a rule refused."""

    rule: str
    node: str
    reason: str
    layer: int | None = None


@dataclass
class Log:
    """What the rules did: matches counted by rule name, and refusals."""

    matches: dict[str, int] = field(default_factory=dict)
    near_misses: list[NearMiss] = field(default_factory=list)

    def matched(self, rule: str) -> None:
        self.matches[rule] = self.matches.get(rule, 0) + 1

    def refused(self, rule: str, node: fx.Node, reason: str) -> None:
        miss = NearMiss(rule, node.name, reason, node.meta.get("layer"))
        if miss not in self.near_misses:
            self.near_misses.append(miss)


def apply_rule(rule: Rule, graph: ModelGraph, log: Log) -> int:
    """Offer every node to a rule, in order; return how many matches were rewritten."""
    count = 0
    for node in list(graph.graph.nodes):
        if node.graph is not graph.graph or node not in graph.graph.nodes:
            continue
        match = rule.pattern(graph, node)
        if match is None:
            continue
        reason = rule.check(graph, match)
        if reason is not None:
            log.refused(rule.name, node, reason)
            continue
        rule.rewrite(graph, match)
        log.matched(rule.name)
        count += 1
    graph.drop_dead()
    return count
