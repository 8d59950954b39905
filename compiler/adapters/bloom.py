"""BLOOM builds an alibi tensor from the attention mask and adds it in `baddbmm`."""

from __future__ import annotations

import math

from torch import Tensor, nn

from dscompile.compiler.adapters import rebind
from dscompile.compiler.attention import attend


def adapt(model: nn.Module) -> None:
    rebind(model, "BloomAttention", "forward", _attention)
    rebind(model, "BloomModel", "build_alibi_tensor", lambda self, mask, num_heads, dtype: None)


def alibi_slopes(num_heads: int) -> list[float]:
    """Press et al. 2022: a geometric sequence for the largest power of two, then every other one of the next."""
    power = 2 ** math.floor(math.log2(num_heads))
    base = 2.0 ** -(2.0 ** -(math.log2(power) - 3))
    between = 2.0 ** -(2.0 ** -(math.log2(2 * power) - 3))
    rest = min(power, num_heads - power)
    return [base**i for i in range(1, power + 1)] + [between**i for i in range(1, 1 + 2 * rest, 2)]


def _attention(self: nn.Module, hidden_states: Tensor, residual: Tensor, alibi: None, attention_mask: None, **_):
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    y = attend(self, q, k, v, self.inv_norm_factor, alibi=alibi_slopes(self.num_heads))
    return residual + self.dense(y.flatten(2)), None
