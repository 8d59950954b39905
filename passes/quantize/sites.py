"""Where a scale per channel can go: x W^T = (x / s) (W s)^T, if what makes x can divide by s exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.quantize.choose import quantized_linears


@dataclass(frozen=True)
class Site:
    """Quantized linears that read one input x [.., K].

    producer:   the norm or linear that can divide x by a scale, or None, and then `refusal` says why
    channels_K: the producer's channel that each of x's comes from (several heads can share one of values)
    """

    x: fx.Node
    linears: tuple[fx.Node, ...]
    producer: fx.Node | None = None
    channels_K: Tensor | None = None
    refusal: str = ""

    @property
    def layer_class(self) -> str:
        """The same for the sites of equal place in all layers."""
        return "|".join(re.sub(r"\d+", "*", n.args[1].meta["weight"]) for n in self.linears)


def find_sites(graph: ModelGraph) -> list[Site]:
    """The inputs of all quantized linears, in order."""
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for linear in quantized_linears(graph):
        by_input.setdefault(linear.args[0], []).append(linear)
    return [_site(x, tuple(linears)) for x, linears in by_input.items()]


def _site(x: fx.Node, linears: tuple[fx.Node, ...]) -> Site:
    producer, channels, refusal = _producer(x)
    others = [u.name for u in x.users if u not in linears]
    tied = [n.name for n in linears if len(n.args[1].users) > 1]
    if others:
        refusal = f"{x.name} is also read by {', '.join(others)}"
    elif tied:
        refusal = f"the weight of {tied[0]} is tied"
    elif producer is not None and producer.target is vocabulary.linear and len(producer.args[1].users) > 1:
        refusal = f"the weight of {producer.name} is tied"
    return Site(x, linears, refusal=refusal) if refusal else Site(x, linears, producer, channels)


def _producer(x: fx.Node) -> tuple[fx.Node | None, Tensor | None, str]:
    """(producer, channels, "") of an input, or why there is none."""
    if x.target is vocabulary.norm:
        return x, torch.arange(x.meta["val"].shape[-1]), ""
    if x.target is vocabulary.attention:
        values, spec = x.args[2], x.args[5]
        if spec.v_norm is not None or x.args[1] is values:
            return None, None, f"the values of {x.name} are normalised, or its keys too"
        channel = torch.arange(spec.num_heads * spec.v_head_dim)
        head = channel // spec.v_head_dim // (spec.num_heads // spec.num_kv_heads)
        channel = head * spec.v_head_dim + channel % spec.v_head_dim
        return (
            (values, channel, "")
            if _is_private_linear(values)
            else (None, None, f"{values.name} is no linear of its own")
        )
    if x.target is vocabulary.mul:
        factors = [a for a in x.args if _is_private_linear(a)]
        if factors:
            return factors[0], torch.arange(x.meta["val"].shape[-1]), ""
    kind = getattr(x.target, "__name__", str(x.target))
    return None, None, f"{x.name} ({kind}) cannot take in a factor per channel"


def _is_private_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is vocabulary.linear and len(node.users) == 1
