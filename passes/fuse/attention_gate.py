"""attention * g: the gate of the heads' outputs, a number for each head or each column, in the attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import other_users, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule


@dataclass(frozen=True)
class Match:
    product: fx.Node
    attention: fx.Node
    gate: fx.Node


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    if node.target is not vocabulary.mul:
        return None
    for attention, gate in (node.args, node.args[::-1]):
        if attention.target is vocabulary.attention:
            return Match(node, attention, gate)
    return None


def _check(graph: ModelGraph, match: Match) -> str | None:
    if others := other_users(match.attention, match.product):
        return f"{match.attention.name} is also read by {others}"
    if match.attention.args[5].gate != "none":
        return f"{match.attention.name} is already gated"
    return None


def _rewrite(graph: ModelGraph, match: Match) -> None:
    *operands, spec = match.attention.args
    gate, kind = match.gate, _kind(match)
    if kind == "head":
        gate = gate.args[0]
    args = (*operands, dataclasses.replace(spec, gate=kind), gate)
    replace_with_region(graph, match.product, vocabulary.attention, args, [match.attention, match.product], RULE.name)


def _kind(match: Match) -> Literal["head", "column"]:
    spec, gate = match.attention.args[5], match.gate
    return "head" if gate.target is vocabulary.repeat_columns and gate.args[1] == spec.v_head_dim else "column"


RULE = Rule("attend(q, k, v) * g", _pattern, _rewrite, _check)


def fuse_attention_gate(graph: ModelGraph, log: Log) -> None:
    """Fuse gates of the heads' outputs."""
    apply_rule(RULE, graph, log)
