"""check_tokens refuses what mixes tokens, by name, and lets everything else pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dscompile.passes.check_tokens import check_tokens
from dscompile.runtime.errors import UserError

D = 8


class _Model(nn.Module):
    """An embedding followed by a function of its rows x [1, T, D]."""

    def __init__(self, function):
        super().__init__()
        self.table = nn.Embedding(16, D)
        self.conv = nn.Conv1d(D, D, 3, padding=2)
        self.function = function

    def forward(self, tokens, positions):
        torch._check(tokens.shape[1] == positions.shape[1])
        return self.function(self, self.table(tokens), positions)


def _check(function):
    example = torch.zeros(1, 13, dtype=torch.int64)
    length = {1: torch.export.Dim.AUTO}
    program = torch.export.export(
        _Model(function), (example, example.clone()), dynamic_shapes=(length, length), strict=False
    )
    module = program.run_decompositions({}).graph_module
    inputs = {"tokens", "positions"}
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name not in inputs:
            node.meta["weight"] = node.name
    check_tokens(module)


MIXING = {
    "cumsum": ("cumsum", lambda m, x, p: x.cumsum(1)),
    "conv": ("conv1d", lambda m, x, p: m.conv(x.transpose(1, 2))[..., : x.shape[1]]),
    "roll": ("roll", lambda m, x, p: torch.roll(x, 1, 1)),
    "flip": ("flip", lambda m, x, p: x.flip(1)),
    "mean": ("mean", lambda m, x, p: x - x.mean(1, keepdim=True)),
    "mean of all": ("mean", lambda m, x, p: x - x.mean()),
    "last": ("select", lambda m, x, p: x + x[:, -1].unsqueeze(1)),
    "shift": ("slice", lambda m, x, p: torch.cat([x[:, 1:], x[:, :1]], 1)),
    "softmax": ("softmax", lambda m, x, p: x.softmax(1)),
    "scores": ("matmul", lambda m, x, p: (x @ x.transpose(1, 2)).sum(-1)),
    "gram": ("matmul", lambda m, x, p: x @ (x.transpose(1, 2) @ x)),
    "outer": ("add", lambda m, x, p: (x[:, :, None] + x[:, None]).sum(2)),
    "scramble": ("view", lambda m, x, p: x.reshape(1, D, -1).transpose(1, 2)),
    "arange": ("arange", lambda m, x, p: x + torch.arange(x.shape[1])[None, :, None]),
    "sort": ("sort", lambda m, x, p: x.sort(1).values),
    "norm": ("layer_norm", lambda m, x, p: nn.functional.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2)),
    "pad": ("pad", lambda m, x, p: nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]),
    "gather": ("index", lambda m, x, p: x[0, p[0]][None]),
}
SEPARATE = {
    "linear": lambda m, x, p: x @ torch.ones(D, D),
    "norm": lambda m, x, p: nn.functional.layer_norm(x, (D,)) * torch.rsqrt(x.square().mean(-1, keepdim=True)),
    "heads": lambda m, x, p: x.view(1, -1, 2, 4).transpose(1, 2).transpose(1, 2).reshape(1, -1, D),
    "rows": lambda m, x, p: (x.view(-1, D) @ torch.ones(D, D)).view(1, -1, D),
    "merged": lambda m, x, p: x.reshape(-1, 4).softmax(-1).view(1, -1, D),
    "batched": lambda m, x, p: (x.transpose(0, 1) @ torch.ones(1, D, D).expand(x.shape[1], D, D)).transpose(0, 1),
    "table": lambda m, x, p: x + m.table.weight[p % 16],
    "split": lambda m, x, p: torch.cat(x.chunk(2, -1), -1) * x[..., :1],
    "topk": lambda m, x, p: x * x.topk(2, -1).values.sum(-1, keepdim=True),
    "ones": lambda m, x, p: x * torch.ones(x.shape[1])[None, :, None],
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_mixing_operators_are_named(name):
    operator, function = MIXING[name]
    with pytest.raises(UserError, match=rf"operator aten\.\w*{operator}\w*\..* mixes tokens"):
        _check(function)


@pytest.mark.parametrize("name", SEPARATE)
def test_operators_on_single_tokens_pass(name):
    _check(SEPARATE[name])
