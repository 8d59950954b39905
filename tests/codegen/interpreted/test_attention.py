"""The attention kernels against the float64 formula, over a shuffled paged cache with ragged sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dscompile.codegen import attention_kernels
from dscompile.codegen.attention_kernels import DecodeConfig
from dscompile.codegen.select import programs_for
from dscompile.codegen.single_kernels import SingleConfig
from dscompile.runtime.kernels import choose_case, context_bounds
from dscompile.runtime.plan import Attention, KVGroup, Norm
from tests.codegen import oracle
from tests.codegen.interpreted import gluon
from tests.codegen.interpreted.harness import TOLERANCE, context, operands, run, slice_of
from tests.helpers import rms_ratio

gluon.install()

LAYERS, LAYER = 3, 1


def attention(heads: int = 4, kv: int = 2, d: int = 16, dv: int = 0, **options) -> Attention:
    return Attention(heads, kv, d, dv or d, scale=d**-0.5, group=0, index=LAYER, **options)


SPECS = {
    "gqa": attention(rotary_dim=16),
    "mha": attention(3, 3, 16, rotary_dim=8),
    "alibi": attention(4, 4, 16, alibi=True),
    "mqa": attention(7, 1, 24, rotary_dim=24),
    "window": attention(window=21),
    "chunk": attention(chunk=40, rotary_dim=16),
    "softcap_sinks": attention(softcap=2.0, sinks=True),
    "head_norms": attention(
        rotary_dim=16, q_norm=Norm("rms", 1e-5, weight=True), k_norm=Norm("layer", 1e-5, weight=True, bias=True)
    ),
    "row_norms": attention(
        rotary_dim=8,
        norm_across_heads=True,
        q_norm=Norm("rms", 1e-5, weight=True),
        k_norm=Norm("layer", 1e-5, weight=True),
    ),
    "own_norms": attention(
        rotary_dim=8,
        norm_by_head=True,
        q_norm=Norm("layer", 1e-5, weight=True, bias=True),
        k_norm=Norm("rms", 1e-5, weight=True),
    ),
    "weights_after_rotation": attention(
        d=24, rotary_dim=16, weigh_rotated=True, **dict.fromkeys(("q_norm", "k_norm"), Norm("rms", 1e-5, weight=True))
    ),
    "own_weights_after_rotation": attention(
        rotary_dim=16,
        norm_by_head=True,
        weigh_rotated=True,
        **dict.fromkeys(("q_norm", "k_norm"), Norm("rms", 1e-5, weight=True)),
    ),
    "gated_heads": attention(4, 2, 24, 10, gate="head", sinks=True),
    "gated_columns": attention(7, 1, 24, 10, gate="column", rotary_dim=8),
    "narrow_values": attention(4, 2, 24, 10, rotary_dim=12),
    "value_norms": attention(
        rotary_dim=16, q_norm=Norm("rms", 1e-5), k_norm=Norm("rms", 1e-5, weight=True), v_norm=Norm("rms", 1e-5)
    ),
    "reads": attention(rotary_dim=16, q_norm=Norm("rms", 1e-5, weight=True), appends=False),
    "reads_window": attention(7, 1, 24, 10, window=21, appends=False),
    "narrow_value_norms": attention(4, 2, 24, 10, v_norm=Norm("layer", 1e-5, weight=True, bias=True)),
    "encoder": attention(causal=False),
    "two_sided_window": attention(causal=False, window=9),
}
RAGGED = ((5, 5), (70, 1), (33, 30), (1, 1), (90, 17))
DECODE = ((1, 1), (70, 1), (17, 1), (33, 1), (150, 1))


def weights(spec: Attention) -> dict[str, torch.Tensor]:
    t: dict[str, torch.Tensor] = {}
    if spec.rotary_dim:
        angle = torch.arange(1024)[:, None] * 10000.0 ** -(torch.arange(spec.rotary_dim // 2) / 8)
        t |= {"w.rope_cos": angle.cos(), "w.rope_sin": angle.sin()}
    if spec.alibi:
        t["w.alibi_slopes"] = torch.rand(spec.num_heads)
    if spec.sinks:
        t["w.sinks"] = torch.randn(spec.num_heads)
    for x, norm, heads in (("q", spec.q_norm, spec.num_heads), ("k", spec.k_norm, spec.num_kv_heads)):
        width = spec.head_dim * (heads if spec.norm_across_heads or spec.norm_by_head else 1)
        if norm and norm.weight:
            t[f"w.{x}_norm_weight"] = 1 + 0.3 * torch.randn(width)
        if norm and norm.bias:
            t[f"w.{x}_norm_bias"] = torch.randn(width)
    if spec.v_norm and spec.v_norm.weight:
        t["w.v_norm_weight"], t["w.v_norm_bias"] = 1 + 0.3 * torch.randn(spec.v_head_dim), torch.randn(spec.v_head_dim)
    return t


class Cache:
    """A paged pool as the plan lays it out, filled with history; blocks behind a window are not there.

    dtype int8: q in it, and scales behind it.
    """

    def __init__(self, spec: Attention, sequences: tuple, page: int, dtype: torch.dtype) -> None:
        self.spec, self.page, self.dtype = spec, page, dtype
        self.per_sequence = [math.ceil(length / page) for length, _ in sequences]
        self.k_size = spec.num_kv_heads * page * spec.head_dim
        self.size = self.k_size + spec.num_kv_heads * page * spec.v_head_dim
        block = self.size + (8 * spec.num_kv_heads * page if dtype == torch.int8 else 0)
        order = torch.randperm(sum(self.per_sequence)) + 1
        self.tables = torch.zeros(len(sequences), max(self.per_sequence) + 2, dtype=torch.int32)
        for b, ids in enumerate(order.split(self.per_sequence)):
            self.tables[b, : len(ids)] = ids
        poison = 0x7F if dtype == torch.int8 else float("nan")  # scales of 3e38
        self.pool = torch.full((len(order) + 1, LAYERS, block), poison, dtype=dtype)

    def slot(self, b: int, position: int) -> int:
        return int(self.tables[b, position // self.page]) * self.page + position % self.page

    def views(self, slot: int) -> list[torch.Tensor]:
        """K [Hkv, D] and V [Hkv, Dv] of one slot, and of an int8 cache their scales [Hkv]."""
        s, layer = self.spec, self.pool[slot // self.page, LAYER]
        parts = [layer[: self.k_size], layer[self.k_size : self.size]]
        if self.dtype == torch.int8:
            parts += layer[self.size :].view(torch.float32).chunk(2)
        return [part.view(s.num_kv_heads, self.page, -1)[:, slot % self.page].squeeze(-1) for part in parts]

    def write(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill a slot at random; returns what attention reads there, in float64."""
        views = self.views(slot)
        if self.dtype != torch.int8:
            for view in views:
                view.copy_(torch.randn(view.shape))
        else:
            for q, scale in zip(views[:2], views[2:], strict=True):
                q.copy_(torch.randint(-127, 128, q.shape))
                scale.copy_(torch.rand(scale.shape) / 64 + 1e-3)
        return self.read(slot)

    def read(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v, *scales = self.views(slot)
        if scales:
            k, v = (x.double() * scale.double()[:, None] for x, scale in zip((k, v), scales, strict=True))
        return k.double(), v.double()

    def kernel_argument(self) -> torch.Tensor:
        layer = self.pool[0, LAYER]
        return layer.view(torch.int16) if self.dtype == torch.int8 else layer


def as_int8(x: torch.Tensor) -> torch.Tensor:
    """Heads [.., D] rounded to 255 values each."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, 0.0)


def check(
    spec: Attention,
    sequences: tuple,
    dtype: torch.dtype,
    page: int,
    decode: bool,
    pad: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> list[str]:
    """Returns the names of the kernels that ran."""
    torch.manual_seed(0)
    count = sum(new for _, new in sequences) + pad
    sizes = {"q": spec.num_heads * spec.head_dim, "k": spec.num_kv_heads * spec.head_dim}
    sizes["v"] = spec.num_kv_heads * spec.v_head_dim
    tensors = {f"in.{x}": slice_of(count, width, dtype) for x, width in sizes.items()} | weights(spec)
    if spec.gate != "none":
        tensors["in.gate"] = slice_of(count, spec.num_heads * (spec.v_head_dim if spec.gate == "column" else 1), dtype)
    tensors["out.y"] = slice_of(count, spec.num_heads * spec.v_head_dim, dtype, float("nan"))
    kv_dtype = kv_dtype or dtype
    cache = Cache(spec, sequences, page, kv_dtype)
    positions = torch.cat([torch.arange(length - new, length) for length, new in sequences])
    double = {k: v.double() for k, v in tensors.items()}
    real = count - pad
    q = oracle.heads(spec, {k: v[:real] if k[:3] == "in." else v for k, v in double.items()}, "q", positions)
    k = oracle.heads(spec, {k: v[:real] if k[:3] == "in." else v for k, v in double.items()}, "k", positions)
    v = oracle.heads(spec, {k: v[:real] if k[:3] == "in." else v for k, v in double.items()}, "v", positions)
    if kv_dtype == torch.int8:
        k, v = as_int8(k), as_int8(v)
    if not spec.appends:
        k, v = (
            torch.empty(real, spec.num_kv_heads, width, dtype=torch.float64)
            for width in (spec.head_dim, spec.v_head_dim)
        )
        at = 0
        for b, (length, new) in enumerate(sequences):
            for p in range(length - new, length):
                k[at], v[at] = cache.write(cache.slot(b, p))
                at += 1
        for role in ("in.k", "in.v"):
            del tensors[role]
    slots, expected, at = [], [], 0
    for b, (length, new) in enumerate(sequences):
        keys, values = [], []
        for p in range(length - new):
            old_k, old_v = cache.write(cache.slot(b, p))
            keys.append(old_k)
            values.append(old_v)
        slots += [cache.slot(b, p) for p in range(length - new, length)]
        keys = torch.stack([*keys, *k[at : at + new]])
        values = torch.stack([*values, *v[at : at + new]])
        y = oracle.attend(spec, double, q[at : at + new], keys, values)
        if spec.gate != "none":
            gate = double["in.gate"][at : at + new].reshape(new, spec.num_heads, -1)
            y = (y.reshape(new, spec.num_heads, -1) * gate).reshape(y.shape)
        expected.append(y)
        at += new
    starts = torch.tensor([0, *torch.tensor([n for _, n in sequences]).cumsum(0)] + [count] * (pad > 0) * pad)
    if spec.window and decode:
        for b, (length, _) in enumerate(sequences):
            cache.tables[b, : max(0, length - spec.window) // page] = -(10**6)
    step = {
        "positions": torch.cat([positions, torch.zeros(pad, dtype=torch.long)]).int(),
        "seq_starts": starts.int(),
        "context_lens": torch.tensor([length for length, _ in sequences] + [0] * pad).int(),
        "block_table": torch.cat([cache.tables, torch.zeros(pad, cache.tables.shape[1], dtype=torch.int32)]),
        "slots": torch.tensor(slots + [-1] * pad).int(),
    }
    name = str(kv_dtype).removeprefix("torch.")
    group = KVGroup(LAYERS, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, name, spec.window, spec.chunk)
    names = run(
        spec,
        tensors,
        step,
        {"T": count, "B": len(sequences) + pad, "blocks": cache.tables.shape[1]},
        decode=decode,
        longest=max(length for length, _ in sequences),
        context=context(page_size=page, groups=(group,)),
        extra={"kv": cache.kernel_argument()},
    )
    assert rms_ratio(tensors["out.y"][:real], torch.cat(expected)) <= TOLERANCE[dtype]
    written = [cache.read(s) for s in slots]
    # Rounding to integers turns a last bit, here and there, into one step of 127.
    limit = 2 * TOLERANCE[torch.float16] if kv_dtype == torch.int8 else TOLERANCE[dtype]
    assert rms_ratio(torch.stack([w[0] for w in written]), k) <= limit
    assert rms_ratio(torch.stack([w[1] for w in written]), v) <= limit
    others = cache.pool[:, [0, 2]]
    untouched = others == 0x7F if kv_dtype == torch.int8 else others.isnan()
    assert untouched.all(), "another layer was written"
    return names


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_decode(name: str, dtype: torch.dtype) -> None:
    check(SPECS[name], DECODE, dtype, 16, decode=True)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_ragged(name: str, dtype: torch.dtype) -> None:
    check(SPECS[name], RAGGED, dtype, 16, decode=False)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(("name", "dtype"), [*((n, torch.float16) for n in SPECS), ("mha", torch.float32)], ids=str)
def test_int8_cache(name: str, dtype: torch.dtype, decode: bool) -> None:
    check(SPECS[name], DECODE if decode else RAGGED, dtype, 16, decode, kv_dtype=torch.int8)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("name", ["gqa", "window", "mha"])
def test_large_pages(name: str, decode: bool) -> None:
    check(SPECS[name], DECODE if decode else RAGGED, torch.float16, 64, decode)
    check(SPECS[name], DECODE if decode else RAGGED, torch.float16, 64, decode, kv_dtype=torch.int8)


# A query head a program, in Gluon.
SINGLE = ("gqa", "mha", "alibi", "mqa", "narrow_values")


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("config", [SingleConfig(1, 1, 4), SingleConfig(1, 2, 4), SingleConfig(2, 3, 8)], ids=str)
def test_one_sequence_by_query_heads(name: str, config: SingleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key but the new one, less than a part, a whole one, one more, and as many as the parts hold."""
    monkeypatch.setattr(attention_kernels, "single_configs", lambda *_: [config])
    most = 256 * config.splits + 1
    for length in (1, 33, 257, 258, most):
        if length <= most:
            (kernel,) = check(SPECS[name], ((length, 1),), torch.float16, 16, decode=True)
            assert kernel.startswith("attention_single")


def test_the_kernel_of_short_contexts_is_another() -> None:
    """One part of the keys, several, and more than those hold; heads of 256 in parts of their columns."""
    few = {"grouped": [513], "wide": [], "many": [129]}
    for name, spec in (
        ("grouped", attention(32, 8, 128, rotary_dim=128)),
        ("wide", attention(16, 16, 256, rotary_dim=64)),
        ("many", attention(32, 32, 128, alibi=True)),
    ):
        group = KVGroup(LAYERS, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, "float16")
        tensors = {f"in.{x}": slice_of(1, 4096, torch.float16) for x in "qkv"} | weights(spec)
        tensors["out.y"] = slice_of(1, 4096, torch.float16)
        program, _ = programs_for(spec, operands(tensors), replace(context(groups=(group,)), max_seq_len=8192))
        assert context_bounds([program], 1) == [257, 513]
        found = [choose_case(program, 1, True, n).launches[0] for n in (1, 257, 258, 513, 514, 0)]
        assert [launch.target.split("_")[1] for launch in found] == ["single"] * 4 + ["decode"] * 2
        assert found[0] == found[1] != found[2] == found[3]
        assert context_bounds([program], 8) == few[name] and not context_bounds([program], 64)
        found = [choose_case(program, 8, True, n).launches[0] for n in (100, 10000)]
        assert (found[0] == found[1]) == (not few[name])


@pytest.mark.parametrize("name", ["gqa", "mha", "window"])
@pytest.mark.parametrize("config", [DecodeConfig(2, 32, 1, 8), DecodeConfig(2, 16, 1, 4)], ids=str)
def test_short_contexts_of_few_sequences(name: str, config: DecodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key but the new one, as many as the parts hold, and those that the bound lets through."""
    monkeypatch.setattr(attention_kernels, "short_config", lambda *_: config)
    most = config.splits * config.keys + 1
    check(SPECS[name], ((1, 1), (most, 1), (most - 1, 1), (config.keys + 1, 1)), torch.float16, 16, decode=True)


def test_one_sequence_is_cut_into_parts() -> None:
    check(SPECS["gqa"], ((500, 1),), torch.float32, 16, decode=True)
    check(SPECS["gqa"], ((500, 1),), torch.float32, 16, decode=True, kv_dtype=torch.int8)


@pytest.mark.parametrize(
    "name", ["gqa", "mqa", "softcap_sinks", "narrow_values", "gated_heads", "gated_columns", "many_columns"]
)
@pytest.mark.parametrize("keys,splits,num_warps", [(16, 9, 1), (32, 4, 4)])
def test_parts_are_joined(name: str, keys: int, splits: int, num_warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parts as splits, fewer, and one; read all at once, and of many columns in turns."""
    config = DecodeConfig(splits, keys, 1, num_warps)
    monkeypatch.setattr(attention_kernels, "decode_config", lambda *_: config)
    spec = SPECS.get(name) or attention(8, 1, 128, sinks=True)
    check(spec, ((500, 1), (70, 1), (3, 1)), torch.float16, 16, decode=True)


def test_padding_rows_write_nothing_and_disturb_nothing() -> None:
    check(SPECS["gqa"], DECODE[:3], torch.float32, 16, decode=True, pad=2)
    check(SPECS["gqa"], DECODE[:3], torch.float32, 16, decode=True, pad=2, kv_dtype=torch.int8)
