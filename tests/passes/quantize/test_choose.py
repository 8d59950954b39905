"""Which linears are quantized, and what fusion makes of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dscompile.passes.fuse.gate import fuse_gate
from dscompile.passes.fuse.linears import anchor_linears
from dscompile.passes.fuse.pack import pack_siblings
from dscompile.passes.fuse.regions import fused_linear
from dscompile.passes.fuse.residual import fuse_residual
from dscompile.passes.normalize.elementwise import canonical_arithmetic, name_functions
from dscompile.passes.normalize.linears import canonical_linears
from dscompile.passes.quantize.choose import choose_linears, quantized_linears
from dscompile.passes.rule import Log
from dscompile.runtime.plan import Quantization
from tests.passes.graphs import nodes, trace

SPEC = Quantization("token")


class Mlp(nn.Module):
    """head((silu(x gate) * (x up)) down + x side)"""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        for name, (k, n) in {"gate": (8, 24), "up": (8, 24), "down": (24, 8), "side": (8, 8), "head": (8, 11)}.items():
            setattr(self, name, nn.Linear(k, n, bias=False))

    def forward(self, tokens, positions):
        x = self.embed(tokens)
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x)) + self.side(x))


def _graph(**options):
    torch.manual_seed(0)
    graph, log = trace(Mlp()), Log()
    for one in (canonical_linears, name_functions, canonical_arithmetic, choose_linears(SPEC, **options)):
        one(graph, log)
    return graph, log


def _names(graph):
    return [n.args[1].meta["weight"].removesuffix(".weight") for n in quantized_linears(graph)]


def test_all_but_the_head():
    graph, log = _graph()
    assert _names(graph) == ["gate", "up", "down", "side"]
    assert [m.reason for m in log.near_misses] == ["the head stays as it is without --quant-lm-head"]


def test_the_head_on_request():
    assert _names(_graph(head=True)[0]) == ["gate", "up", "down", "side", "head"]


@pytest.mark.parametrize(
    ("keep", "rule", "reason"),
    [
        ("up.weight", fuse_gate, "are quantized differently"),
        ("side.weight", fuse_residual, "only some linears of the sum are quantized"),
    ],
)
def test_what_is_quantized_differently_is_not_packed(keep, rule, reason):
    graph, log = _graph(keep=(keep,))
    assert keep.removesuffix(".weight") not in _names(graph)
    anchor_linears(graph, log)
    rule(graph, log)
    assert any(reason in m.reason for m in log.near_misses)


def test_siblings_are_packed_by_kind():
    graph, log = _graph(keep=("gate.weight",))
    anchor_linears(graph, log)
    pack_siblings(graph, log)
    found = {n.args[2]["weight"].meta["weight"]: n.args[3].quantization for n in nodes(graph, fused_linear)}
    assert found["gate.weight"] is None and found["down.weight"] == SPEC
    assert found["up.weight|side.weight"] == SPEC
