"""Falcon hard-codes three layouts of packed heads, alibi for the oldest models, and its linears."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from dscompile.compiler.adapters import rebind
from dscompile.compiler.adapters.bloom import alibi_slopes
from dscompile.compiler.attention import attend

# Eager attention of transformers adds alibi twice, once of it unscaled.
REFERENCE_ATTENTION = "sdpa"


def adapt(model: nn.Module) -> None:
    rebind(model, "FalconAttention", "forward", _attention)
    rebind(model, "FalconLinear", "forward", nn.Linear.forward)
    # transformers rounds the slopes to bfloat16. Tensors made while tracing have no values, so it is done here.
    rounded = torch.tensor(alibi_slopes(model.config.num_attention_heads)).bfloat16().tolist()
    for module in model.modules():
        if type(module).__name__ == "FalconAttention":
            module.slopes = [slope * module.inv_norm_factor for slope in rounded]


def _attention(
    self: nn.Module,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_,
) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in _split_heads(self, self.query_key_value(hidden_states)))
    if alibi is None:
        rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
        q, k = rotate(q, k, *position_embeddings)
    slopes = None if alibi is None else self.slopes
    return self.dense(attend(self, q, k, v, self.inv_norm_factor, alibi=slopes).flatten(2)), None


def _split_heads(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, T, packed] -> q, k, v [1, T, heads, head_dim], with the true number of key and value heads."""
    if self.new_decoder_architecture:
        x = x.unflatten(-1, (self.num_kv_heads, self.num_heads // self.num_kv_heads + 2, self.head_dim))
        return x[..., :-2, :].flatten(2, 3), x[..., -2, :], x[..., -1, :]
    if self.multi_query:
        return x.unflatten(-1, (self.num_heads + 2, self.head_dim)).split([self.num_heads, 1, 1], dim=2)
    return x.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(3)
