"""Gates of an attention's output: however heads are spelled, a gate becomes part of the attention."""

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

HEADS, DIM, WIDTH, VOCAB = 4, 6, 24, 32
RULE = "attend(q, k, v) * g"


class Gated(nn.Module):
    """Attention whose output `gated` multiplies by something, then a linear, a residual and the head."""

    per_head = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate = nn.Linear(WIDTH, HEADS if self.per_head else WIDTH)

    def forward(self, tokens, positions):
        x = self.table(tokens)
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = torch.ops.dsc.attention(q, k, v, positions, 0, 0.5)
        return self.head(x + self.gated(y, self.gate(x)))

    def gated(self, y, gate):
        return self.out(y.flatten(2) * torch.sigmoid(gate))


class GatedAsHeads(Gated):
    def gated(self, y, gate):
        return self.out((torch.sigmoid(gate.unflatten(-1, (HEADS, DIM))) * y).flatten(2))


class GatedTwiceAsHeads(Gated):
    def gated(self, y, gate):
        return self.out((y * (F.softplus(gate.unflatten(-1, (HEADS, DIM))) * 0.5)).reshape(*y.shape[:2], -1))


class GatedByHead(Gated):
    per_head = True

    def gated(self, y, gate):
        return self.out((y * F.softplus(gate).unsqueeze(-1)).view(*y.shape[:2], -1))


def compiled(module):
    graph = trace(module)
    records = run_pipeline(graph, PIPELINE)
    tokens = torch.randint(VOCAB, (1, 9))
    assert rms_ratio(run(graph, module, tokens), module(tokens, torch.arange(9)[None])) < 2e-6
    return graph, [m for record in records for m in record.log.near_misses if m.rule == RULE]


@pytest.mark.parametrize(
    "module, gate, activation",
    [
        (Gated, "column", "sigmoid"),
        (GatedAsHeads, "column", "sigmoid"),
        (GatedTwiceAsHeads, "column", "softplus"),
        (GatedByHead, "head", "softplus"),
    ],
)
def test_a_gate_is_read_by_the_attention(module, gate, activation):
    graph, misses = compiled(module())
    (attention,) = nodes(graph, vocabulary.attention)
    assert attention.args[5].gate == gate and not misses
    assert not nodes(graph, vocabulary.mul)
    assert activation in {s.activation for n in nodes(graph, fused_linear) for s in n.args[3].segments}


class ReadElsewhere(Gated):
    def gated(self, y, gate):
        return self.out(y.flatten(2) * gate) + self.out(y.flatten(2))


class GatedTwice(Gated):
    def gated(self, y, gate):
        return self.out(y.flatten(2) * torch.sigmoid(gate) * torch.tanh(gate))


@pytest.mark.parametrize("module, reason", [(ReadElsewhere, "is also read by"), (GatedTwice, "is already gated")])
def test_what_cannot_be_gated_is_named(module, reason):
    _, misses = compiled(module())
    assert any(reason in m.reason for m in misses), misses


def test_a_number_for_each_head_of_no_attention_is_repeated():
    class Module(GatedByHead):
        def gated(self, y, gate):
            return self.out((self.q(y.flatten(2)).unflatten(-1, (HEADS, DIM)) * gate.unsqueeze(-1)).flatten(2))

    graph, _ = compiled(Module())
    assert nodes(graph, vocabulary.repeat_columns) and nodes(graph, vocabulary.mul)
