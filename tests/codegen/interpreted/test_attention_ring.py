"""Attention on Hopper's tensor cores against the float64 formula: order of copies and products, masks, ragged tiles."""

from __future__ import annotations

import pytest
import torch

from dscompile.codegen import attention_kernels
from dscompile.codegen.prefill_kernels import PrefillConfig
from dscompile.runtime.plan import Attention, Norm
from tests.codegen.interpreted import gluon
from tests.codegen.interpreted.test_attention import check

gluon.install()


def attention(heads: int = 4, kv: int = 2, **options) -> Attention:
    return Attention(heads, kv, 64, 64, scale=0.125, group=0, index=1, **options)


SPECS = {
    "gqa": attention(rotary_dim=64),
    "mqa": attention(7, 1, rotary_dim=32),
    "alibi": attention(4, 4, alibi=True),
    "window": attention(window=21),
    "chunk": attention(chunk=40, rotary_dim=64),
    "softcap_sinks": attention(softcap=2.0, sinks=True),
    "head_norms": attention(
        rotary_dim=64, q_norm=Norm("rms", 1e-5, weight=True), k_norm=Norm("layer", 1e-5, weight=True, bias=True)
    ),
    "own_norms": attention(
        rotary_dim=32, norm_by_head=True, q_norm=Norm("layer", 1e-5, weight=True), k_norm=Norm("rms", 1e-5, weight=True)
    ),
    "weights_after_rotation": attention(
        rotary_dim=64, weigh_rotated=True, **dict.fromkeys(("q_norm", "k_norm"), Norm("rms", 1e-5, weight=True))
    ),
    "gated_heads": attention(gate="head"),
    "gated_columns": attention(7, 1, gate="column"),
    "encoder": attention(causal=False),
    "two_sided_window": attention(causal=False, window=19),
}
RAGGED = ((5, 5), (70, 1), (33, 30), (1, 1), (150, 70))


KERNELS = {
    "ring": PrefillConfig(64, 64, 4, programs=1, template="attention_ring"),
    "long": PrefillConfig(128, 32, 4, programs=1, stages=3, template="attention_long"),
}
CONFIGS = {
    "all_heads_at_once": PrefillConfig(128, 32, 8, programs=1000, template="attention_ring"),
    "some_heads": PrefillConfig(64, 16, 4, programs=7, template="attention_ring"),
    "two_blocks": PrefillConfig(128, 16, 4, programs=7, stages=2, template="attention_long"),
}


def ragged(spec: Attention, config: PrefillConfig, sequences: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "prefill_configs", lambda *_: ((1, 0, 0, config),))
    if not spec.causal:
        sequences = tuple((new, new) for _, new in sequences)
    check(spec, sequences, torch.float16, 16, decode=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SPECS)
def test_ragged(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged(SPECS[name], KERNELS[kernel], RAGGED, monkeypatch)


@pytest.mark.parametrize("config", CONFIGS)
def test_order_of_programs(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged(attention(6, 3), CONFIGS[config], RAGGED[1:], monkeypatch)
