"""A router is known by what it computes: every spelling of a rule gives one rule, and what is no rule is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dscompile.passes import vocabulary
from dscompile.passes.normalize.elementwise import name_functions
from dscompile.passes.normalize.experts import canonical_experts
from dscompile.passes.normalize.linears import canonical_linears
from dscompile.passes.quantize.choose import choose_linears, quantized_linears
from dscompile.passes.reassociate.move_factor import move_factor
from dscompile.passes.rule import Log
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Quantization, Router
from tests.helpers import rms_ratio
from tests.passes.graphs import nodes, run, trace

E, K, F = 8, 12, 5


def softmax_then_choose(logits, correction):
    weights, index = logits.softmax(-1).topk(2, -1)
    return index, weights / weights.sum(-1, keepdim=True)


def choose_then_softmax(logits, correction):
    values, index = logits.topk(2, -1)
    return index, values.softmax(-1)


def scattered(logits, correction):
    scores = torch.full_like(logits, float("-inf"))
    values, index = logits.topk(2, -1)
    return index, scores.scatter(1, index, values).softmax(-1).gather(1, index)


def grouped(logits, correction):
    scores = logits.sigmoid()
    choice = scores + correction
    best = choice.view(-1, 4, 2).topk(2, -1)[0].sum(-1).topk(2, -1)[1]
    mask = torch.zeros(logits.shape[0], 4).scatter(1, best, 1.0).repeat_interleave(2, -1)
    index = choice.masked_fill(mask == 0, float("-inf")).topk(3, -1)[1]
    weights = scores.gather(1, index)
    return index, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)


def factored(logits, factors):
    weights, index = logits.softmax(-1).topk(2, -1)
    return index, weights / weights.sum(-1, keepdim=True) * factors[index]


def unknown(logits, correction):
    weights, index = logits.softmax(-1).topk(2, -1)
    return index, weights.sqrt()


class Layer(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        generator = torch.Generator().manual_seed(0)
        shapes = {"table": (32, K), "router": (E, K), "gate_up": (E, K, 2 * F), "down": (E, F, K), "correction": (E,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, tokens, positions):
        x = nn.functional.embedding(tokens, self.table)
        rows = x.view(-1, K)
        index, weights = self.rule(nn.functional.linear(rows, self.router), self.correction)
        y = torch.ops.dsc.moe(
            rows, index, weights, self.gate_up, self.down, None, None, "silu", 0.0, 0.0, True, True, False
        )
        return y.view(x.shape)


PLAIN = Router(E, 2, "softmax", True)
GROUPED = Router(E, 3, "sigmoid", True, 2.5, True, num_groups=4, top_groups=2, group_top=2)


@pytest.mark.parametrize(
    "rule,router",
    [
        (softmax_then_choose, PLAIN),
        (choose_then_softmax, PLAIN),
        (scattered, PLAIN),
        (grouped, GROUPED),
        (factored, PLAIN),
    ],
)
def test_spellings_of_a_rule_are_one(rule, router):
    module = Layer(rule).requires_grad_(False)
    graph = trace(module)
    tokens = torch.arange(7)[None] * 3
    expected = module(tokens, torch.arange(7)[None])
    canonical_linears(graph, Log())
    log = Log()
    canonical_experts(graph, log)
    (node,) = nodes(graph, vocabulary.moe)
    assert node.args[4].router == router
    assert log.matches == {"router, dsc::moe -> moe": 1}
    assert rms_ratio(run(graph, module, tokens), expected) < 1e-6


def test_an_unknown_rule_is_refused():
    graph = trace(Layer(unknown).requires_grad_(False))
    canonical_linears(graph, Log())
    with pytest.raises(UserError, match="unknown rule"):
        canonical_experts(graph, Log())


class Damped(Layer):
    """A router that reads half of what the experts read."""

    def forward(self, tokens, positions):
        x = nn.functional.embedding(tokens, self.table)
        index, weights = self.rule(nn.functional.linear(x * 0.5, self.router).view(-1, E), self.correction)
        rows = x.view(-1, K)
        y = torch.ops.dsc.moe(
            rows, index, weights, self.gate_up, self.down, None, None, "silu", 0.0, 0.0, True, True, False
        )
        return y.view(x.shape)


def test_a_router_whose_factor_moved_behind_it_is_not_quantized():
    graph, log = trace(Damped(softmax_then_choose).requires_grad_(False)), Log()
    for one in (canonical_linears, canonical_experts, name_functions, move_factor):
        one(graph, log)
    (scaled,) = nodes(graph, vocabulary.scale)
    assert scaled.args[0].target is vocabulary.linear
    choose_linears(Quantization("token"), head=True)(graph, log)
    assert not quantized_linears(graph)
