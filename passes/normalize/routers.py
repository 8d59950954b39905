"""Which rule a router follows, found by evaluating it on random logits and comparing with every rule we know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dscompile.passes import vocabulary
from dscompile.passes.evaluate import depends_on_tokens, evaluate
from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.recipe import Constant
from dscompile.runtime.errors import UserError
from dscompile.runtime.ops_moe import route
from dscompile.runtime.plan import Router

NUM_PROBES = 96
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reading:
    """The linear that makes a router's logits, its rule, the weight [E] added to the scores, and the weight [E] that
    multiplies what each expert returns, if there is one."""

    logits: fx.Node
    router: Router
    correction: fx.Node | None = None
    factors: fx.Node | None = None


def read_router(graph: ModelGraph, index: fx.Node, weights: fx.Node, activations: dict[fx.Node, bool]) -> Reading:
    """What a router does to choose index and weights [T, k].

    activations: which nodes depend on tokens, as far as known. Raises UserError for a rule that is none of ours.
    """
    logits, others = _boundary(graph, (index, weights), activations)
    num_experts = logits.meta["val"].shape[-1]
    if len(others) > 1 or any(w.meta["val"].numel() != num_experts for w in others):
        raise UserError(f"the router {logits.name} uses weights that are not understood; report the architecture")
    generator = torch.Generator().manual_seed(0)
    probe = 2 * torch.randn(1, NUM_PROBES, num_experts, generator=generator)
    own = 0.1 * torch.randn(num_experts, generator=generator) if others else None
    tokens = torch.zeros(1, NUM_PROBES, dtype=torch.long)
    given = {graph.tokens: tokens, graph.positions: tokens, logits: probe}
    given |= {w: own.view(w.meta["val"].shape) for w in others}
    chosen, shares = (evaluate(graph, n, given).reshape(NUM_PROBES, -1) for n in (index, weights))
    if (router := _fit(probe[0], own, chosen, shares)) is not None:
        return Reading(logits, router, correction=others[0] if others else None)
    if own is not None and (router := _fit(probe[0], None, chosen, shares / own[chosen])) is not None:
        return Reading(logits, router, factors=others[0])
    raise UserError(f"the router {logits.name} chooses experts by an unknown rule; report the architecture")


def _boundary(
    graph: ModelGraph, nodes: tuple[fx.Node, ...], activations: dict[fx.Node, bool]
) -> tuple[fx.Node, list[fx.Node]]:
    """The linear whose product decides, and the checkpoint's weights that take part."""
    linears, others, stack, seen = [], [], list(nodes), set(nodes)
    while stack:
        node = stack.pop()
        if node.target is vocabulary.linear:
            linears.append(node)
            continue
        if is_weight(node) and not isinstance(graph.recipe(node), Constant):
            others.append(node)
        for i in node.all_input_nodes:
            if i not in seen and (is_weight(i) or depends_on_tokens(graph, activations, i)):
                seen.add(i)
                stack.append(i)
    if len(linears) != 1:
        raise UserError(f"a router depends on {len(linears)} linears; report the architecture")
    return linears[0], others


def _fit(logits: Tensor, correction: Tensor | None, index: Tensor, weights: Tensor) -> Router | None:
    index, order = index.sort(-1)
    weights = weights.gather(-1, order)
    for router in _candidates(logits.shape[-1], index.shape[-1], correction is not None):
        chosen, expected = route(logits, correction, router)
        chosen, order = chosen.sort(-1)
        if not torch.equal(chosen, index):
            continue
        expected = expected.gather(-1, order)
        scale = (weights / expected).median().item()
        if scale and bool(((weights - scale * expected).abs() <= TOLERANCE * abs(scale)).all()):
            rounded = float(f"{scale:.5g}")
            return Router(**{**vars(router), "scale": rounded if abs(rounded - scale) < TOLERANCE * scale else scale})
    return None


def _candidates(num_experts: int, top_k: int, correction: bool) -> Iterator[Router]:
    """The rules we know, plain ones first. softmax over the chosen logits alone is softmax, normalised."""
    for groups, top_groups, group_top in _groupings(num_experts, top_k):
        for score in ("softmax", "sigmoid", "none"):
            for normalize in (True, False):
                yield Router(
                    num_experts,
                    top_k,
                    score,
                    normalize,
                    correction=correction,
                    num_groups=groups,
                    top_groups=top_groups,
                    group_top=group_top,
                )


def _groupings(num_experts: int, top_k: int) -> Iterator[tuple[int, int, int]]:
    yield 1, 1, 1
    for groups in range(2, num_experts + 1):
        size = num_experts // groups
        if num_experts % groups == 0:
            for top_groups in range(1, groups):
                if top_groups * size >= top_k:
                    yield from ((groups, top_groups, best) for best in (1, 2) if best <= size)
