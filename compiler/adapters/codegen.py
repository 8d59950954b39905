"""CodeGen computes its scores in `CodeGenAttention._attn`, as GPT-J does."""

from __future__ import annotations

from torch import nn

from dscompile.compiler.adapters import rebind
from dscompile.compiler.adapters.gptj import scores


def adapt(model: nn.Module) -> None:
    rebind(model, "CodeGenAttention", "_attn", scores)
