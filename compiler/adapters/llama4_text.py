"""Llama 4 numbers the tokens of a step for its temperature, hides its chunks in masks and runs every expert."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from dscompile.compiler.adapters import rebind
from dscompile.compiler.attention import attend, positions
from dscompile.compiler.experts import experts


def adapt(model: nn.Module) -> None:
    rebind(model, "Llama4TextAttention", "forward", _attention)
    rebind(model, "Llama4TextMoe", "forward", _moe)
    rebind(model, "Llama4TextExperts", "_apply_gate", _gate)
    for module in model.modules():
        if type(module).__name__ == "Llama4TextExperts":
            vars(module)["is_transposed"] = True


def _attention(self: nn.Module, hidden_states: Tensor, position_embeddings: Tensor, **_) -> tuple[Tensor, None]:
    q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
    # transformers normalises after the rotation, which leaves the norm of a head as it is.
    if hasattr(self, "qk_norm"):
        q, k = self.qk_norm(q), self.qk_norm(k)
    if self.use_rope:
        q, k = sys.modules[type(self).__module__].apply_rotary_emb(q, k, position_embeddings)
    elif self.attn_temperature_tuning:
        tens = torch.floor((positions().float() + 1.0) / self.floor_scale)
        q = q * (torch.log1p(tens) * self.attn_scale + 1.0)[:, :, None, None]
    chunked = self.config.layer_types[self.layer_idx] == "chunked_attention"
    chunk = self.config.attention_chunk_size if chunked else 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return self.o_proj(attend(self, q, k, v, self.scaling, chunk=chunk).flatten(2)), None


def _moe(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    rows = hidden_states.reshape(-1, self.hidden_dim)
    logits = nn.functional.linear(rows, self.router.weight)
    values, index = torch.topk(logits, self.top_k, dim=-1)
    routed = experts(self.experts, rows, index, values.sigmoid(), scale_input=True)
    return self.shared_expert(rows) + routed, logits


def _gate(self: nn.Module, product: Tensor) -> Tensor:
    gate, up = product.chunk(2, dim=-1)
    return up * self.act_fn(gate)
