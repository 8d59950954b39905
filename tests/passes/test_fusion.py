"""Fusion rules: the regions they build, the numerics they keep, the reasons they give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dscompile.passes import vocabulary
from dscompile.passes.fuse.regions import fused_linear
from dscompile.passes.pipeline import PIPELINE
from dscompile.passes.runner import run_pipeline
from tests.helpers import rms_ratio
from tests.passes.graphs import nodes, run, trace

D, H, V = 32, 48, 64


class Mlp(nn.Module):
    """norm, two-branch MLP, residual, head; tests change one thing at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, D)
        self.norm = nn.LayerNorm(D)
        self.gate, self.up = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.down, self.head = nn.Linear(H, D), nn.Linear(D, V, bias=False)
        for p in self.norm.parameters():
            p.data = torch.randn(D)

    def forward(self, tokens, positions):
        x = self.table(tokens)
        y = self.norm(x)
        return self.head(self.mlp(x, y))

    def mlp(self, x, y):
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def compiled(module):
    graph = trace(module)
    records = run_pipeline(graph, PIPELINE)
    tokens = torch.randint(V, (1, 9))
    expected = module(tokens, torch.arange(9)[None])
    assert rms_ratio(run(graph, module, tokens), expected) < 2e-6
    misses = [m for record in records for m in record.log.near_misses]
    return graph, misses


def test_a_gated_mlp_is_two_regions():
    graph, misses = compiled(Mlp())
    up, down, head = nodes(graph, fused_linear)
    assert up.args[3].segments[0].gated and up.args[3].norm.kind == "layer"
    assert not up.args[3].norm.weight, "the norm's weight is folded into the linear"
    assert down.args[3].residuals == 1
    assert head.args[3].rows == "R"
    assert not misses


def test_the_head_computes_the_sum_of_a_norm_and_a_residual():
    graph, misses = compiled(Sandwich())
    *_, head = nodes(graph, fused_linear)
    assert head.args[3].rows == "R" and head.args[3].add and head.args[3].post_norm.kind == "layer"
    assert not nodes(graph, vocabulary.add)
    assert not [m for m in misses if "r)" in m.rule]


def test_a_factor_moves_behind_the_linears_that_read_it():
    class Scaled(Mlp):
        def mlp(self, x, y):
            return x + self.down(F.silu(self.gate(0.3 * y)) * self.up(y))

    graph, misses = compiled(Scaled())
    assert not nodes(graph, vocabulary.scale) and {n.args[3].scale for n in nodes(graph, fused_linear)} == {1.0, 0.3}
    assert not [m for m in misses if m.rule == "(c x) W -> c (x W)"]


class GateReadElsewhere(Mlp):
    def mlp(self, x, y):
        gate = self.gate(y)
        return x + self.down(F.silu(gate) * self.up(y)) + self.down(gate)


class DifferentInputs(Mlp):
    def mlp(self, x, y):
        return x + self.down(F.silu(self.gate(y)) * self.up(x))


class NormReadElsewhere(Mlp):
    def mlp(self, x, y):
        return y + self.down(F.silu(self.gate(y)) * self.up(y))


class TiedHead(Mlp):
    def __init__(self):
        super().__init__()
        self.head.weight = self.table.weight

    def forward(self, tokens, positions):
        x = self.table(tokens)
        return F.linear(self.norm(self.mlp(x, x)), self.table.weight)


class ActivationReadElsewhere(Mlp):
    def mlp(self, x, y):
        hidden = self.gate(y)
        return x + self.down(F.gelu(hidden)) + self.down(hidden)


class Sandwich(Mlp):
    """A norm after the branch, whose sum with the residual the head reads for few of its rows."""

    def mlp(self, x, y):
        return x + self.norm(self.down(F.silu(self.gate(y)) * self.up(y)))

    def forward(self, tokens, positions):
        x = self.table(tokens)
        return self.head(self.mlp(x, self.norm(x)))


@pytest.mark.parametrize(
    "module, rule, reason",
    [
        (GateReadElsewhere, "act(x Wg) * (x Wu)", "is also read by"),
        (DifferentInputs, "act(x Wg) * (x Wu)", "read different inputs"),
        (NormReadElsewhere, "norm(x; g, b) W -> norm(x) (W g) + W b", "is also read by add"),
        (TiedHead, "norm(x; g, b) W -> norm(x) (W g) + W b", "is tied to"),
        (ActivationReadElsewhere, "f(x W + b)", "is also read by"),
    ],
)
def test_a_broken_predicate_is_named(module, rule, reason):
    _, misses = compiled(module())
    found = [m for m in misses if m.rule == rule]
    assert found, f"no refusal of {rule} in {misses}"
    assert any(reason in m.reason for m in found), found


class Parallel(Mlp):
    """Two branches from one norm, summed with the residual."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, D)

    def mlp(self, x, y):
        return self.out(torch.sigmoid(self.up.weight.new_ones(()) * y)) + self.down(F.gelu(self.up(y))) + x


@pytest.mark.parametrize("axis", [2, -2])
def test_rows_of_a_view_are_linears_of_their_own(axis):
    class Module(Mlp):
        def __init__(self):
            super().__init__()
            self.both = nn.Linear(D, 2 * H)

        def mlp(self, x, y):
            both = self.both(y).unflatten(-1, (2, H))
            return x + self.down(F.silu(both.select(axis, 0)) * both.select(axis, -1))

    graph, misses = compiled(Module())
    assert nodes(graph, fused_linear)[0].args[3].segments[0].gated and not misses


def test_branches_that_are_summed_are_one_linear_concatenated_along_k():
    graph, _ = compiled(Parallel())
    sums = [n for n in nodes(graph, fused_linear) if len(n.args[0]) == 2]
    assert len(sums) == 1 and sums[0].args[3].in_features == D + H
    assert sums[0].args[3].bias and sums[0].args[3].residuals == 1


@pytest.mark.parametrize(
    "function, kind",
    [
        (lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))), "gelu_tanh"),
        (lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0)))), "gelu_tanh"),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4142135623730951)), "gelu"),
        (lambda x: x * torch.sigmoid(1.702 * x), "gelu_quick"),
        (lambda x: torch.square(F.relu(x)), "relu2"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    ],
)
def test_activations_are_recognised_by_value(function, kind):
    class Module(Mlp):
        def mlp(self, x, y):
            return x + self.down(function(self.up(y)))

    graph, _ = compiled(Module())
    assert nodes(graph, fused_linear)[0].args[3].segments[0].activation == kind


def test_an_unknown_function_is_not_taken_for_a_known_one():
    class Module(Mlp):
        def mlp(self, x, y):
            return x + self.down(self.up(y) * torch.sigmoid(1.6 * self.up(y)))

    graph, _ = compiled(Module())
    assert all(s.activation == "none" for n in nodes(graph, fused_linear) for s in n.args[3].segments)
