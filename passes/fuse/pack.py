"""x W1, x W2, ...: linears of one input are one packed linear whose output ranges keep their own epilogues."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear, replace_with_region
from dscompile.passes.graph import ModelGraph
from dscompile.passes.recipe import Concat, Zeros, shape_of
from dscompile.passes.rule import Log, Rule, apply_rule
from dscompile.runtime.plan import Segment


@dataclass(frozen=True)
class Match:
    members: tuple[fx.Node, ...]


def concat_weights(graph: ModelGraph, members: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """The weights of the packed linear: rows one after another, absent biases zero, what one of them learned."""
    weights = [n.args[2]["weight"] for n in members]
    name = "|".join(w.meta["weight"] for w in weights)
    packed = {"weight": graph.add_weight(name, Concat(tuple(graph.recipe(w) for w in weights)))}
    if any("bias" in n.args[2] for n in members):
        parts = tuple(
            graph.recipe(n.args[2]["bias"])
            if "bias" in n.args[2]
            else Zeros(shape_of(graph.recipe(n.args[2]["weight"]))[:1])
            for n in members
        )
        packed["bias"] = graph.add_weight(name + ":bias", Concat(parts))
    for node in members:
        packed |= {role: weight for role, weight in node.args[2].items() if role == "alpha"}
    return packed


def _pattern(graph: ModelGraph, node: fx.Node) -> Match | None:
    """Anchored at the first of several linears of one input."""
    if node.target is not fused_linear or len(node.args[0]) != 1:
        return None
    (x,) = node.args[0]
    members = tuple(u for u in x.users if u.target is fused_linear and u.args[0] == (x,))
    members = tuple(u for u in members if u.args[3].quantization == node.args[3].quantization)
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    members = tuple(sorted(members, key=order.__getitem__))
    return Match(members) if len(members) > 1 and members[0] is node else None


def _check(graph: ModelGraph, match: Match) -> str | None:
    for node in match.members:
        _, residuals, _, spec = node.args
        if residuals:
            return f"{node.name} adds a residual that is computed later"
        if spec.scale != 1.0 or spec.softcap or spec.norm or len(spec.segments) > 1:
            return f"{node.name} has an epilogue of its own that cannot be packed"
    if sum(node.args[3].has_alpha for node in match.members) > 1:
        return "more than one of them has an activation with learned numbers"
    return None


def _rewrite(graph: ModelGraph, match: Match) -> None:
    """Members with the bare product come first and share one segment; their readers take column ranges of it."""
    bare = [n for n in match.members if n.args[3].segments[0] == Segment(0, n.args[3].out_features)]
    members = [*bare, *(n for n in match.members if n not in bare)]
    segments = _packed_segments(bare, members)
    first, weights = match.members[0], concat_weights(graph, members)
    spec = dataclasses.replace(first.args[3], out_features=segments[-1].stop, segments=segments, bias="bias" in weights)
    users = [list(n.users) for n in members]
    args = (first.args[0], (), weights, spec)
    region = replace_with_region(graph, first, fused_linear, args, members, RULE.name)
    value = first.meta["val"]
    values = tuple(value.new_empty((*value.shape[:-1], s.width)) for s in segments)
    region.meta["val"] = values if len(segments) > 1 else values[0]
    region.meta["saved"] = (len(members) - 1) * spec.in_features
    for node, readers, part in zip(members, users, _parts(graph, region, bare, members), strict=True):
        for user in readers:
            user.replace_input_with(region if node is first else node, part)


def _packed_segments(bare: list[fx.Node], members: list[fx.Node]) -> tuple[Segment, ...]:
    segments, start = [], 0
    for group in ([bare] if bare else []) + [[n] for n in members[len(bare) :]]:
        stop = start + sum(n.args[3].out_features for n in group)
        segments.append(dataclasses.replace(group[0].args[3].segments[0], start=start, stop=stop))
        start = stop
    return tuple(segments)


def _parts(graph: ModelGraph, region: fx.Node, bare: list[fx.Node], members: list[fx.Node]) -> list[fx.Node]:
    """A node for each member's columns of the region's outputs."""
    spec = region.args[3]
    outputs = [region]
    after = region
    if len(spec.segments) > 1:
        outputs = []
        for i in range(len(spec.segments)):
            after = _call(graph, after, operator.getitem, (region, i), region.meta["val"][i], region)
            outputs.append(after)
    parts, start = [], 0
    for node in bare:
        width = node.args[3].out_features
        if len(bare) == 1:
            parts.append(outputs[0])
            break
        value = node.meta["val"].new_empty((*node.meta["val"].shape[:-1], width))
        after = _call(graph, after, vocabulary.columns, (outputs[0], start, start + width), value, node)
        parts.append(after)
        start += width
    return parts + outputs[1 if bare else 0 :]


def _call(graph: ModelGraph, after: fx.Node, target: object, args: tuple, value: object, like: fx.Node) -> fx.Node:
    with graph.graph.inserting_after(after):
        node = graph.graph.call_function(target, args)
    node.meta = {"val": value, "layer": like.meta.get("layer"), "nn_module_stack": like.meta.get("nn_module_stack")}
    return node


RULE = Rule("x [W1 | W2 | ...]", _pattern, _rewrite, _check)


def pack_siblings(graph: ModelGraph, log: Log) -> None:
    """Pack linears that read the same row."""
    apply_rule(RULE, graph, log)
