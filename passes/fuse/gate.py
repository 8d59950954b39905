"""act(x Wg) * (x Wu): two linears of one input, packed, with the product in the epilogue."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.pack import concat_weights
from dscompile.passes.fuse.regions import fused_linear, is_plain, other_users, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log, Rule, apply_rule
from dscompile.runtime.plan import Segment


@dataclass(frozen=True)
class Match:
    product: fx.Node
    activation: fx.Node
    gate: fx.Node
    up: fx.Node


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    if node.target is not vocabulary.mul:
        return None
    for activated, up in (node.args, node.args[::-1]):
        if activated.target is vocabulary.activation and is_plain(activated.args[0]) and is_plain(up):
            return Match(node, activated, activated.args[0], up)
    return None


def _check(graph: ModelGraph, match: Match) -> str | None:
    if match.gate.args[0] != match.up.args[0]:
        return f"{match.gate.name} and {match.up.name} read different inputs"
    for node, user in ((match.gate, match.activation), (match.up, match.product), (match.activation, match.product)):
        if others := other_users(node, user):
            return f"{node.name} is also read by {others}"
    if match.gate.args[3].quantization != match.up.args[3].quantization:
        return f"{match.gate.name} and {match.up.name} are quantized differently"
    if match.gate.args[3].out_features != match.up.args[3].out_features:
        return f"{match.gate.name} and {match.up.name} have different widths"
    return None


def _rewrite(graph: ModelGraph, match: Match) -> None:
    xs, _, _, spec = match.gate.args
    members = (match.gate, match.up)
    weights = concat_weights(graph, members)
    width = 2 * spec.out_features
    _, kind, *alpha = match.activation.args
    weights |= dict(zip(("alpha",), alpha, strict=False))
    segment = Segment(0, width, kind, gated=True)
    fused = dataclasses.replace(spec, out_features=width, segments=(segment,), bias="bias" in weights)
    took = [match.gate, match.up, match.activation, match.product]
    replace_with_region(graph, match.product, fused_linear, (xs, (), weights, fused), took, RULE.name)


RULE = Rule("act(x Wg) * (x Wu)", _pattern, _rewrite, _check)


def fuse_gate(graph: ModelGraph, log: Log) -> None:
    """Fuse gated activations."""
    apply_rule(RULE, graph, log)
