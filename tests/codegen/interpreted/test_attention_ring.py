"""Attention on Hopper's tensor cores against the float64 formula: order of copies and products, masks, ragged tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dscompile.codegen import attention_kernels
from dscompile.codegen.decode_ring_kernels import RingDecodeConfig, ring_decode_config
from dscompile.codegen.operands import KernelContext, Operand
from dscompile.codegen.prefill_kernels import PrefillConfig
from dscompile.runtime.plan import Attention, KVGroup, Norm
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


# No key but the new one, less than a block, a whole one, one more, and more blocks than a ring has.
DECODE = ((1, 1), (40, 1), (65, 1), (66, 1), (150, 1), (400, 1))
DECODED = [name for name, spec in SPECS.items() if spec.causal]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", DECODED)
def test_decode(name: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "ring_decode_config", lambda *_: RingDecodeConfig(stages))
    (kernel,) = check(SPECS[name], DECODE, torch.float16, 16, decode=True, pad=1)
    assert kernel.startswith("attention_decode_ring")


def chosen(spec: Attention, low: int, high: int, target: str = "sm_90", cache: str = "float16", **more: bool) -> int:
    """Blocks of the ring that the rule gives steps of so many sequences; 0 where attention_decode serves them."""
    group = KVGroup(1, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, cache)
    context = KernelContext((target,), 16, 4096, 128, 2048, (group,), **more)
    operands = {"in.q": Operand("float16", 4096, (0, 4096))}
    config = ring_decode_config(spec, operands, context, low, high)
    return config.stages if config else 0


def test_sequences_that_fill_the_gpu() -> None:
    """A program for each multiprocessor of 132, or two, and its part of the shared memory."""
    llama = Attention(32, 8, 128, 128, 0.09, 0, 0, rotary_dim=128)
    assert chosen(llama, 17, 32) == 3
    assert not chosen(llama, 9, 16) and not chosen(llama, 33, 64)
    wide, narrow = Attention(16, 16, 256, 256, 0.06, 0, 0), attention(16, 8)
    assert chosen(wide, 9, 16) == 1 and chosen(narrow, 17, 32) == 4


def test_what_the_ring_does_not_serve() -> None:
    llama = Attention(32, 8, 128, 128, 0.09, 0, 0)
    assert not chosen(llama, 17, 32, target="sm_80") and not chosen(llama, 17, 32, cache="int8")
    assert not chosen(llama, 17, 32, deterministic=True)
    norm = Norm("rms", 1e-5, weight=True)
    across = {"norm_across_heads": True, "q_norm": norm}
    for changed in (across, {"v_norm": norm}, {"causal": False}, {"appends": False}):
        assert not chosen(replace(llama, **changed), 17, 32)
    assert not chosen(replace(llama, head_dim=96), 17, 32)
