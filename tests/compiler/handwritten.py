"""A decoder that nobody named: its attention is written out, with masks spelled in the ways that people spell them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dscompile.compiler.quiet import quiet

MAX_LEN = 64
WINDOW, CHUNK, CAP = 5, 6, 2.0


class HandwrittenConfig(PretrainedConfig):
    model_type = "handwritten"

    def __init__(self, spelling: str = "tril_buffer", num_kv_heads: int = 4, **rest) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_heads = 96, 48, 2, 4
        self.max_position_embeddings = MAX_LEN
        self.spelling, self.num_kv_heads = spelling, num_kv_heads
        super().__init__(**rest)


def _triangle(scores: Tensor) -> Tensor:
    n = scores.shape[-1]
    return torch.ones(n, n, dtype=torch.bool, device=scores.device).tril()


def _keys(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-1], device=scores.device)


def _distance(scores: Tensor) -> Tensor:
    return _keys(scores)[None, :] - _keys(scores)[:, None]


def _hide(scores: Tensor, seen: Tensor, by: float = -math.inf) -> Tensor:
    return scores.masked_fill(~seen, by)


def _slopes(scores: Tensor) -> Tensor:
    return (2.0 ** -torch.arange(1, scores.shape[1] + 1, device=scores.device))[:, None, None]


def _blocks(scores: Tensor) -> Tensor:
    block = _keys(scores) // CHUNK
    return block[None, :] == block[:, None]


# What becomes of the scores before the softmax.
SPELLINGS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "tril_buffer": lambda m, s: s.masked_fill(m.bias[:, :, : s.shape[-2], : s.shape[-1]] == 0, -math.inf),
    "triu_added": lambda m, s: s + torch.full_like(s[0, 0], -math.inf).triu(1),
    "minus_ten_thousand": lambda m, s: s + (1.0 - _triangle(s).to(s.dtype)) * -10000.0,
    "where": lambda m, s: torch.where(_triangle(s), s, torch.tensor(torch.finfo(s.dtype).min, device=s.device)),
    "cumulative": lambda m, s: _hide(s, torch.ones_like(_distance(s)).cumsum(0) > _keys(s)),
    "window": lambda m, s: _hide(s, _triangle(s) & ~_triangle(s).tril(-WINDOW)),
    "chunks": lambda m, s: _hide(s, _triangle(s) & _blocks(s)),
    "alibi": lambda m, s: _hide(s + _slopes(s) * _distance(s), _triangle(s)),
    "alibi_of_keys": lambda m, s: _hide(s + _slopes(s) * _keys(s), _triangle(s)),
    "alibi_of_numbers": lambda m, s: _hide(
        s + torch.tensor([0.5, 0.25, 0.2, 0.1], device=s.device)[:, None, None] * _distance(s), _triangle(s)
    ),
    "softcap": lambda m, s: _hide(CAP * torch.tanh(s / CAP), _triangle(s)),
    "stabilised": lambda m, s: (t := _hide(s, _triangle(s), -1e9)) - t.amax(-1, keepdim=True),
    # And what dscompile does not have.
    "prefix": lambda m, s: _hide(s, _triangle(s) | (_keys(s) < 3)),
    "dilated": lambda m, s: _hide(s, _triangle(s) & (_distance(s) % 2 == 0)),
    "late_gap": lambda m, s: _hide(s, _triangle(s) & (_distance(s) != -50)),
    "by_head": lambda m, s: _hide(
        s, _triangle(s) & (_distance(s) > -torch.arange(9, 13, device=s.device)[:, None, None])
    ),
    "quadratic": lambda m, s: _hide(s - 0.01 * _distance(s) ** 2, _triangle(s)),
    "temperatures": lambda m, s: _hide(s * torch.arange(1, 5, device=s.device)[:, None, None], _triangle(s)),
    "learned": lambda m, s: _hide(s + m.learned[_distance(s).clamp(-7, 0) + 7].permute(2, 0, 1), _triangle(s)),
    "squared": lambda m, s: _hide(s * s.abs(), _triangle(s)),
    "normalised": lambda m, s: _hide(s - s.mean(-1, keepdim=True) * s, _triangle(s)),
}
TORCHS = ("sdpa_causal", "sdpa_mask", "sdpa_grouped", "sdpa_flat")
# Other spellings of the two products.
PRODUCTS = ("einsum", "einsum_of_rows", "transposed")
REFUSED = ("prefix", "dilated", "late_gap", "by_head", "quadratic", "temperatures", "learned", "squared", "normalised")
UNDERSTOOD = [*(name for name in SPELLINGS if name not in REFUSED), *TORCHS, *PRODUCTS]


class HandwrittenAttention(nn.Module):
    def __init__(self, config: HandwrittenConfig) -> None:
        super().__init__()
        self.spelling, self.heads, self.kv_heads = config.spelling, config.num_heads, config.num_kv_heads
        width = config.hidden_size // self.heads
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * width)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        if self.spelling == "tril_buffer":
            self.register_buffer("bias", torch.ones(MAX_LEN, MAX_LEN).tril()[None, None])
        if self.spelling == "learned":
            self.learned = nn.Parameter(torch.zeros(8, self.heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, self.heads + 2 * self.kv_heads, -1).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.spelling in TORCHS:
            y = self._torchs(q, k, v)
        elif self.spelling in PRODUCTS:
            y = self._products(q, k, v)
        else:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            y = SPELLINGS[self.spelling](self, scores).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))

    def _products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spelling == "einsum_of_rows":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4.0
            return torch.einsum("bhij,bjhd->bhid", _hide(scores, _triangle(scores)).softmax(-1), v)
        scores = torch.einsum("bhid, bhjd -> bhij", q, k) if self.spelling == "einsum" else q @ k.mT
        weights = _hide(scores / 4.0, _triangle(scores)).softmax(-1)
        return torch.einsum("bhij,bhjd->bihd", weights, v).transpose(1, 2) if self.spelling == "einsum" else weights @ v

    def _torchs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spelling == "sdpa_mask":
            return F.scaled_dot_product_attention(q, k, v, _triangle(q @ k.transpose(-1, -2)), scale=0.3)
        if self.spelling == "sdpa_flat":
            return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), is_causal=True)[None]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.spelling == "sdpa_grouped")


class HandwrittenLayer(nn.Module):
    def __init__(self, config: HandwrittenConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attn = HandwrittenAttention(config)
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class HandwrittenForCausalLM(PreTrainedModel):
    """Counts its own positions and takes no position_ids, as small models do."""

    config_class = HandwrittenConfig
    base_model_prefix = "model"

    def __init__(self, config: HandwrittenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(MAX_LEN, config.hidden_size)
        self.h = nn.ModuleList(HandwrittenLayer(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False, return_dict: bool = True) -> CausalLMOutput:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(positions)
        for layer in self.h:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(self.ln_f(x)))


transformers.AutoConfig.register("handwritten", HandwrittenConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(HandwrittenConfig, HandwrittenForCausalLM, exist_ok=True)


def save_handwritten(directory: Path, spelling: str, num_kv_heads: int = 4) -> HandwrittenForCausalLM:
    """Write a random model as transformers would."""
    torch.manual_seed(0)
    model = HandwrittenForCausalLM(HandwrittenConfig(spelling, num_kv_heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    with quiet():
        model.save_pretrained(directory)
    return model
