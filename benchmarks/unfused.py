"""The regions of a decoder layer as transformers runs them: one operator of torch after another."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.bloom.modeling_bloom import BloomBlock
from transformers.models.gptj.modeling_gptj import GPTJBlock
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_pairs
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb, repeat_kv


class _Layer:
    """Random inputs of one new token, and a cache of `context` tokens before it."""

    def __init__(self, layer: torch.nn.Module, heads: int, kv_heads: int, dim: int, context: int) -> None:
        like = next(layer.parameters())
        self.options = {"device": like.device, "dtype": like.dtype}
        self.layer, self.kv_heads = layer.eval(), kv_heads
        self.q = torch.randn(1, heads, 1, dim, **self.options)
        self.k, self.v = (torch.randn(1, kv_heads, 1, dim, **self.options) for _ in range(2))
        self.past_k, self.past_v = (torch.randn(1, kv_heads, context, dim, **self.options) for _ in range(2))
        self.mask = torch.zeros(1, 1, 1, context + 1, **self.options)
        self.x = torch.randn(1, 1, heads * dim, **self.options)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.past_k, k], -2), torch.cat([self.past_v, v], -2)


class Llama(_Layer):
    def __init__(self, config: PretrainedConfig, context: int) -> None:
        dim = config.hidden_size // config.num_attention_heads
        super().__init__(
            LlamaDecoderLayer(config, 0), config.num_attention_heads, config.num_key_value_heads, dim, context
        )
        self.cos, self.sin = (torch.randn(1, 1, dim, **self.options) for _ in range(2))
        self.gate = torch.randn(1, 1, config.intermediate_size, **self.options)

    def attn_in(self) -> object:
        x, attention = self.layer.input_layernorm(self.x), self.layer.self_attn
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    def attention(self) -> object:
        q, k = apply_rotary_pos_emb(self.q, self.k, self.cos, self.sin)
        k, v = self.append(k, self.v)
        k, v = (repeat_kv(t, q.shape[1] // self.kv_heads) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + self.mask
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v).transpose(1, 2).contiguous()

    def attn_out(self) -> object:
        return self.x + self.layer.self_attn.o_proj(self.q.reshape(1, 1, -1))

    def mlp_in(self) -> object:
        x, mlp = self.layer.post_attention_layernorm(self.x), self.layer.mlp
        return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)

    def mlp_out(self) -> object:
        return self.x + self.layer.mlp.down_proj(self.gate)


class Bloom(_Layer):
    def __init__(self, config: PretrainedConfig, context: int) -> None:
        heads = config.n_head
        super().__init__(BloomBlock(config, 0), heads, heads, config.hidden_size // heads, context)
        self.alibi = torch.randn(heads, 1, context + 1, **self.options)
        self.wide = torch.randn(1, 1, 4 * config.hidden_size, **self.options)

    def attn_in(self) -> object:
        return self.layer.self_attention.query_key_value(self.layer.input_layernorm(self.x))

    def attention(self) -> object:
        k, v = self.append(self.k, self.v)
        scores = self.alibi.baddbmm(self.q[0], k[0].transpose(-1, -2), beta=1.0, alpha=self.q.shape[-1] ** -0.5)
        scores = scores.view(1, len(self.alibi), 1, -1) + self.mask
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(self.q.dtype)
        return torch.bmm(weights[0], v[0]).transpose(0, 1).reshape(1, 1, -1)

    def attn_out(self) -> object:
        return self.x + self.layer.self_attention.dense(self.q.reshape(1, 1, -1))

    def mlp_in(self) -> object:
        mlp = self.layer.mlp
        return mlp.gelu_impl(mlp.dense_h_to_4h(self.layer.post_attention_layernorm(self.x)))

    def mlp_out(self) -> object:
        return self.x + self.layer.mlp.dense_4h_to_h(self.wide)


class Gptj(_Layer):
    """Attention and MLP read the same norm; it is run once, with attn_in."""

    def __init__(self, config: PretrainedConfig, context: int) -> None:
        heads, config._attn_implementation = config.n_head, "eager"
        super().__init__(GPTJBlock(config, 0), heads, heads, config.n_embd // heads, context)
        self.rotary = config.rotary_dim
        self.sin, self.cos = (torch.randn(1, 1, self.rotary // 2, **self.options) for _ in range(2))
        self.wide = torch.randn(1, 1, 4 * config.n_embd, **self.options)

    def attn_in(self) -> object:
        x, attention = self.layer.ln_1(self.x), self.layer.attn
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    def attention(self) -> object:
        q, k = (self._rotated(t.transpose(1, 2)).permute(0, 2, 1, 3) for t in (self.q, self.k))
        k, v = self.append(k, self.v)
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) / q.shape[-1] ** 0.5 + self.mask
        weights = torch.softmax(scores, -1).to(v.dtype)
        return torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()

    def _rotated(self, x: Tensor) -> Tensor:
        return torch.cat([rotate_pairs(x[..., : self.rotary], self.sin, self.cos), x[..., self.rotary :]], -1)

    def attn_out(self) -> object:
        return self.layer.attn.out_proj(self.q.reshape(1, 1, -1))

    def mlp_in(self) -> object:
        return self.layer.mlp.act(self.layer.mlp.fc_in(self.x))

    def mlp_out(self) -> object:
        return self.layer.mlp.fc_out(self.wide) + self.x + self.x


UNFUSED: dict[str, type[Llama] | type[Bloom] | type[Gptj]] = {"llama3-8b": Llama, "bloom-7b1": Bloom, "gptj-6b": Gptj}
