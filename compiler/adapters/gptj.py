"""GPT-J computes its scores in `GPTJAttention._attn`, after the rotation."""

from __future__ import annotations

from torch import Tensor, nn

from dscompile.compiler.adapters import rebind
from dscompile.compiler.attention import attend


def adapt(model: nn.Module) -> None:
    rebind(model, "GPTJAttention", "_attn", scores)


def scores(self: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    return attend(self, query, key, value, 1.0 / self.scale_attn).transpose(1, 2), None
