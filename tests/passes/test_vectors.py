"""Vectors that are added to every row: biases that come behind their linear, and expanded parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dscompile.passes.fuse.regions import fused_linear
from tests.passes.graphs import nodes
from tests.passes.test_fusion import D, H, Mlp, compiled

aten = torch.ops.aten


class Vectors(Mlp):
    def __init__(self):
        super().__init__()
        self.bias, self.other = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(D))

    def mlp(self, x, y):
        return x + self.down(self.hidden(self.up(y)))


class Added(Vectors):
    def hidden(self, z):
        return F.gelu(z + self.bias)


class Expanded(Vectors):
    def hidden(self, z):
        return F.gelu(self.bias.expand_as(z) + z)


@pytest.mark.parametrize("module", [Added, Expanded])
def test_a_vector_behind_a_linear_is_its_bias(module):
    graph, _ = compiled(module())
    up, down, _ = nodes(graph, fused_linear)
    assert up.args[3].bias and up.args[3].segments[0].activation == "gelu"
    assert down.args[3].residuals == 1


class ReadElsewhere(Vectors):
    def hidden(self, z):
        return F.gelu(z + self.bias) * z


def test_a_product_that_is_read_without_the_vector_keeps_it_out():
    graph, _ = compiled(ReadElsewhere())
    assert len(nodes(graph, aten.add.Tensor)) == 1


class OnRows(Vectors):
    """Of rows that are no linear's the vector stays a term, without a row for each token."""

    def mlp(self, x, y):
        return y + self.down(F.gelu(self.up(x + self.other.expand(*x.shape))))


def test_an_expanded_vector_is_read_as_it_is():
    graph, _ = compiled(OnRows())
    assert not [n for n in graph.graph.nodes if n.target in (aten.expand.default, aten.expand_as.default)]
    (total,) = nodes(graph, aten.add.Tensor)
    assert total.args[1].meta["val"].shape == (D,)
