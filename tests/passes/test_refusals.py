"""Each predicate of each rule, broken one at a time, is named in a near miss with its node and the reason."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.test_fusion import D, H, Mlp, NormReadElsewhere, compiled

GATE, EPILOGUE, RESIDUAL, PACK = "act(x Wg) * (x Wu)", "f(x W + b)", "x W + b + r", "x [W1 | W2 | ...]"
PROLOGUE, EMBED = "norm(x) W", "norm((table[token] + positions) * scale)"
HEAD, SUM = "(x W)[rows] -> x[rows] W", "([norm](z) + r) -> norm(.) W"
FACTOR, FOLD, ROWS = "(c x) W -> c (x W)", "norm(x; g, b) W -> norm(x) (W g) + W b", "w[i] + t[.] -> (t + w[i])[.]"


class Model(Mlp):
    """The gated MLP of test_fusion, with more linears and tables for what breaks a predicate."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.square = nn.Linear(D, H), nn.Linear(D, D)
        self.positions, self.types = nn.Embedding(32, D), nn.Embedding(2, D)
        self.second = nn.LayerNorm(D, elementwise_affine=False)


class UpReadElsewhere(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        up = self.up(y)
        return x + self.down(F.silu(self.gate(y)) * up) + self.down(up)


class ActivationReadElsewhere(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        gate = F.silu(self.gate(y))
        return x + self.down(gate * self.up(y)) + self.down(gate)


class FunctionsInTheWrongOrder(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.down(F.gelu(3.0 * torch.tanh(self.up(y) / 3.0)))


class BranchReadElsewhere(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        branch = self.square(y)
        return x + branch + self.second(branch)


class BranchWithActivation(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + F.relu(self.square(y))


class BranchWithSoftcap(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 2.0 * torch.tanh(self.square(y) / 2.0)


class BranchesOfDifferentFactors(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.5 * self.square(y) + self.down(F.gelu(self.up(y)))


class SiblingWithResidual(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(x + self.square(y)) + self.down(F.gelu(self.up(y)))


class SiblingWithFactor(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.down(F.gelu(0.3 * self.other(y)) + F.gelu(self.up(y)))


class NormReadBySeveral(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.second(x)
        return z + self.down(F.gelu(self.up(z)))


class OneOfSeveralInputsIsNormalised(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.square(self.second(x)) + self.down(F.gelu(self.up(x)))


class EmbeddingReadElsewhere(Model):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.table(tokens)
        y = self.second(x)
        return self.head(x + y + self.down(F.gelu(self.up(y))))


class PositionsBehindTheNorm(Model):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.norm(self.table(tokens)) + self.positions(positions)
        return self.head(self.mlp(x, self.second(x)))


class HeadWithResidual(Model):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.table(tokens)
        return x + self.square(self.mlp(x, self.norm(x)))


class SumReadEarlier(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        total = x + self.norm(self.down(F.gelu(self.up(y))))
        early = self.second(total)
        return total + torch.sigmoid(early) * self.square(total)


class FactorReadElsewhere(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        z = 0.5 * y
        return z + self.down(F.gelu(self.up(z)))


class FactorBeforeABias(Model):
    def mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.square(0.5 * y)


class TypeBesideNoLookUp(Model):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.norm(self.table(tokens)) + self.types(torch.zeros_like(tokens))
        return self.head(self.mlp(x, self.second(x)))


class TypeInNoSum(Model):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.table(tokens) + self.norm(self.types(torch.zeros_like(tokens)))
        return self.head(self.mlp(x, self.second(x)))


class LookUpReadElsewhere(Model):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.types(torch.zeros_like(tokens)) + self.square(x)
        return self.head(self.mlp(x, self.second(x)))


@pytest.mark.parametrize(
    "module, rule, node, reason",
    [
        (UpReadElsewhere, GATE, "mul", r"fused_linear\w* is also read by fused_linear"),
        (ActivationReadElsewhere, GATE, "mul", r"activation\w* is also read by fused_linear"),
        (FunctionsInTheWrongOrder, EPILOGUE, "activation", "already has a function that comes after"),
        (BranchReadElsewhere, RESIDUAL, "add", r"fused_linear\w* is also read by another node"),
        (BranchWithActivation, RESIDUAL, "add", "already ends in another epilogue"),
        (BranchWithSoftcap, RESIDUAL, "add", "ends in a soft cap"),
        (BranchesOfDifferentFactors, RESIDUAL, "add", "different factors or widths"),
        (SiblingWithResidual, PACK, "fused_linear", "adds a residual that is computed later"),
        (SiblingWithFactor, PACK, "fused_linear", "an epilogue of its own that cannot be packed"),
        (NormReadBySeveral, PROLOGUE, "fused_linear", r"norm\w* is also read by"),
        (OneOfSeveralInputsIsNormalised, PROLOGUE, "fused_linear", "one of several concatenated inputs"),
        (EmbeddingReadElsewhere, EMBED, "norm", r"fused_embed\w* is also read by"),
        (PositionsBehindTheNorm, EMBED, "add", "does not fit the form"),
        (HeadWithResidual, HEAD, "fused_linear", "adds a residual, which has a row for every token"),
        (SumReadEarlier, SUM, "fused_linear", r"add\w* is read before fused_linear\w*, by norm"),
        (NormReadElsewhere, FOLD, "norm", "is also read by"),
        (FactorReadElsewhere, FACTOR, "scale", r"scale\w* is also read by add"),
        (FactorBeforeABias, FACTOR, "scale", r"linear\w* has a bias"),
        (TypeBesideNoLookUp, ROWS, "embedding", "is added to no look-up"),
        (TypeInNoSum, ROWS, "embedding", "is not one term of a sum"),
        (LookUpReadElsewhere, ROWS, "embedding", r"embedding\w* is also read elsewhere"),
    ],
)
def test_a_broken_predicate_is_named_with_its_node(module, rule, node, reason):
    _, misses = compiled(module())
    found = [m for m in misses if m.rule == rule and m.node.startswith(node)]
    assert any(re.search(reason, m.reason) for m in found), misses
