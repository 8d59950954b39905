"""Smoothing changes nothing but the rounding, and only where something can take the scale in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dscompile.passes.normalize.elementwise import canonical_arithmetic, name_functions
from dscompile.passes.normalize.linears import canonical_linears
from dscompile.passes.normalize.norms import canonical_norms
from dscompile.passes.quantize import int8
from dscompile.passes.quantize.calibrate import Trial, calibrate, smoothing_scale
from dscompile.passes.quantize.choose import choose_linears
from dscompile.passes.quantize.sites import find_sites
from dscompile.passes.quantize.smooth import RULE, choose_exponents, fold, smooth_linears
from dscompile.passes.rule import Log
from dscompile.runtime.errors import UserError
from tests.helpers import rms_ratio
from tests.passes.graphs import run, trace

K, WIDE, WINDOWS = 24, 36, [[1, 2, 3, 4, 5, 6], [7, 8, 9], [3, 1, 4, 1, 5, 9, 2, 6]]


class Block(nn.Module):
    """head(x + (silu(n gate) * (n up)) down + gelu(n fc) out), n = norm(x)"""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, K), nn.LayerNorm(K)
        sizes = {"gate": (K, WIDE), "up": (K, WIDE), "down": (WIDE, K), "fc": (K, WIDE), "out": (WIDE, K)}
        for name, (k, n) in sizes.items():
            setattr(self, name, nn.Linear(k, n))
        self.head = nn.Linear(K, 11)

    def forward(self, tokens, positions):
        x = self.embed(tokens)
        n = self.norm(x)
        gated = self.down(F.silu(self.gate(n)) * self.up(n))
        return self.head(x + gated + self.out(F.gelu(self.fc(n))))


def _block() -> Block:
    torch.manual_seed(0)
    module = Block()
    with torch.no_grad():
        module.norm.weight.copy_(torch.rand(K) + 0.5)
        module.norm.bias.normal_()
    return module


def _graph(module):
    graph, log = trace(module), Log()
    for one in (canonical_linears, canonical_norms, name_functions, canonical_arithmetic):
        one(graph, log)
    choose_linears(int8.SCHEME.spec)(graph, log)
    return graph


def _measure(module):
    state = module.state_dict()
    return lambda graph, sites: calibrate(graph, sites, WINDOWS, state.__getitem__, int8.SCHEME)


def _outliers(module: Block) -> Block:
    """Exact rescalings that put outliers into the norm and into up's rows."""
    with torch.no_grad():
        for vector in (module.norm.weight, module.norm.bias):
            vector[:2] *= 80
        for linear in (module.gate, module.up, module.fc):
            linear.weight[:, :2] /= 80
        module.up.weight[:3] *= 80
        module.up.bias[:3] *= 80
        module.down.weight[:, :3] /= 80
    return module


def test_sites_and_refusals():
    sites = find_sites(_graph(_block()))
    found = {"|".join(n.args[1].meta["weight"][:-7] for n in s.linears): s for s in sites}
    assert found["gate|up|fc"].producer is found["gate|up|fc"].x
    assert found["down"].producer.args[1].meta["weight"] == "up.weight"
    assert found["out"].producer is None
    assert "(activation) cannot take in a factor per channel" in found["out"].refusal


def test_folding_is_exact():
    module = _block()
    graph = _graph(module)
    for site in find_sites(graph):
        if site.producer is not None:
            fold(graph, site, torch.rand(int(site.channels_K.max()) + 1) * 10 + 0.1)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert rms_ratio(run(graph, module, tokens), module(tokens, None)) < 1e-5


@pytest.mark.parametrize("make", [_block, lambda: _outliers(_block())])
def test_smoothing_keeps_the_function(make):
    module = make()
    graph, log, errors = _graph(module), Log(), []
    smooth_linears(_measure(module), errors)(graph, log)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert rms_ratio(run(graph, module, tokens), module(tokens, None)) < 1e-5
    assert [m.rule for m in log.near_misses] == [RULE]
    assert [e.weight for e in errors] == ["gate.weight", "up.weight", "fc.weight", "down.weight", "out.weight"]
    assert all(20 < e.sqnr_db < 60 for e in errors)


def test_outliers_are_recovered_from():
    """Errors of each site: as bad as the outliers make them without smoothing, ordinary with it."""
    plain, module = _block(), _outliers(_block())
    graph, plain_graph = _graph(module), _graph(plain)
    ordinary = [t[0].error for t in _measure(plain)(plain_graph, find_sites(plain_graph))]
    for reference, tried in zip(ordinary[:2], _measure(module)(graph, find_sites(graph))[:2], strict=True):
        assert tried[0].error > 10 * reference
        assert min(t.error for t in tried) < 2 * reference


def test_channels_of_zeros():
    module = _block()
    with torch.no_grad():
        module.norm.weight[3] = module.norm.bias[3] = 0
        module.up.weight[5] = module.up.bias[5] = 0
        module.down.weight[:, 7] = 0
        module.gate.weight[4] = 0
    graph, errors = _graph(module), []
    smooth_linears(_measure(module), errors)(graph, Log())
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert rms_ratio(run(graph, module, tokens), module(tokens, None)) < 1e-5


def test_scales():
    x, w = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    scale = smoothing_scale(x, w, torch.arange(4), 0.5)
    assert torch.allclose(scale, torch.tensor([2**0.5, 0.5**0.5, 1.0, 1.0]))
    shared = smoothing_scale(x, w, torch.tensor([0, 1, 0, 1]), 0.5)
    assert shared.shape == (2,) and shared[1] / shared[0] == pytest.approx(1.5)
    assert torch.equal(smoothing_scale(x, w, torch.arange(4), 0.0), torch.ones(4))


def test_an_exponent_must_be_worth_it():
    sites = find_sites(_graph(_block()))[:1]
    trial = lambda exponent, error: Trial(exponent, torch.ones(1), error, (1.0,))  # noqa: E731
    assert list(choose_exponents(sites, [[trial(0.0, 1.0), trial(0.5, 0.99)]]).values()) == [0.0]
    assert list(choose_exponents(sites, [[trial(0.0, 1.0), trial(0.5, 0.9)]]).values()) == [0.5]


@pytest.mark.parametrize(
    ("name", "message"), [("up.weight", r"^up\.weight: holds NaN"), ("embed.weight", r"input of gate\.weight")]
)
def test_what_is_not_a_number_is_named(name, message):
    module = _block()
    with torch.no_grad():
        module.get_parameter(name)[2, 1] = float("nan")
    graph = _graph(module)
    with pytest.raises(UserError, match=message):
        _measure(module)(graph, find_sites(graph))
