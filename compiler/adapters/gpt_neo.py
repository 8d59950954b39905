"""GPT-Neo does not scale its scores, and every other layer sees a window."""

from __future__ import annotations

from torch import Tensor, nn

from dscompile.compiler.adapters import rebind
from dscompile.compiler.attention import attend


def adapt(model: nn.Module) -> None:
    rebind(model, "GPTNeoSelfAttention", "_attn", _scores)


def _scores(self: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    window = self.config.window_size if self.attention_type == "local" else 0
    return attend(self, query, key, value, 1.0, window=window).transpose(1, 2), None
