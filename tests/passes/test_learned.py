"""Activations with learned numbers are recognised by their values, whichever weights hold those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscompile.passes.fuse.regions import fused_linear
from tests.passes.graphs import nodes
from tests.passes.test_fusion import Mlp, compiled


class Learned(Mlp):
    """The MLP of test_fusion with weights of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.tensor(1.7))

    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(y)))


class Xielu(Learned):
    def act(self, z: Tensor) -> Tensor:
        p, n = F.softplus(self.a), 0.5 + F.softplus(self.b)
        below = (torch.expm1(torch.minimum(z, torch.full_like(self.a, -1e-6))) - z) * n + 0.5 * z
        return torch.where(z > 0, p * z * z + 0.5 * z, below)


class XieluOtherwise(Learned):
    def act(self, z: Tensor) -> Tensor:
        negative = z.clamp(max=0)
        return z / 2 + self.b * F.relu(z).pow(2) + self.a * (negative.exp() - 1 - negative)


class XieluGate(Xielu):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(y)) * self.up(y))


class LearnedBeta(Learned):
    def act(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, self.a * z * z + self.b * z, 0.7 * (torch.expm1(z.clamp(max=0)) - z) + self.b * z)


class TwoBetas(Learned):
    def act(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, self.a * z * z + 0.4 * z, self.b * (torch.expm1(z.clamp(max=0)) - z) + 0.5 * z)


class Products(Learned):
    """alpha_p is the product of two weights."""

    def act(self, z: Tensor) -> Tensor:
        negative = z.clamp(max=0)
        return z / 2 + (z * self.a).relu() * (z * self.b).relu() + self.b * (negative.exp() - 1 - negative)


class Slope(Learned):
    def act(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, self.a * z)


@pytest.mark.parametrize(
    "module, alpha",
    [
        (Xielu, ("a", "b", "0.5", "-1e-06")),
        (XieluOtherwise, ("b", "a", "0.5", "0.0")),
        (XieluGate, ("a", "b", "0.5", "-1e-06")),
        (LearnedBeta, ("a", "0.7", "b", "0.0")),
    ],
)
def test_xielu_is_part_of_the_linear_it_reads(module, alpha):
    graph, _ = compiled(module())
    up = nodes(graph, fused_linear)[0]
    assert [s.activation for s in up.args[3].segments] == ["xielu"]
    names = [part.split(":")[0] for part in up.args[2]["alpha"].meta["weight"].split("|")]
    assert tuple(names) == alpha


@pytest.mark.parametrize("module", [TwoBetas, Products, Slope])
def test_what_is_not_xielu_is_not_taken_for_it(module):
    graph, _ = compiled(module())
    assert all(s.activation == "none" for n in nodes(graph, fused_linear) for s in n.args[3].segments)
