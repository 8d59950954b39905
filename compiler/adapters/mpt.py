"""MPT hard-codes alibi attention, and converts to booleans a mask that tracing does not have."""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from dscompile.compiler.adapters import rebind
from dscompile.compiler.attention import attend


def adapt(model: nn.Module) -> None:
    rebind(model, "MptAttention", "forward", _attention)
    rebind(model, "MptModel", "forward", _decoder)


def alibi_slopes(num_heads: int, alibi_bias_max: int = 8) -> list[float]:
    """Slopes of the next power of two, the odd ones first, as MPT interleaves them."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** -(i * alibi_bias_max / power) for i in range(1, power + 1)]
    return slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads]


def _decoder(self: nn.Module, input_ids: Tensor, **_) -> BaseModelOutputWithPastAndCrossAttentions:
    hidden_states = self.wte(input_ids)
    for block in self.blocks:
        hidden_states, _ = block(hidden_states, position_bias=None, attention_mask=None)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm_f(hidden_states))


def _attention(self: nn.Module, hidden_states: Tensor, **_) -> tuple[Tensor, None]:
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    y = attend(self, q, k, v, self.softmax_scale, alibi=alibi_slopes(self.n_heads))
    return self.out_proj(y.flatten(2)), None
