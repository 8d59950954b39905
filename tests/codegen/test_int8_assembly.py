"""The assembly with which a row of int8 is read in fours, executed here: Triton's interpreter takes another branch."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dscompile.codegen.emit import render
from dscompile.codegen.int8_kernels import int8_row_request
from dscompile.codegen.tuned_table import Int8RowConfig
from dscompile.runtime.plan import Linear, Quantization, Segment
from tests.codegen.interpreted.harness import context, operands

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
MAGIC = 0x4B400000  # 1.5 * 2^23
CANONICAL_NAN = 0x7FFF


def assembly(dtype: torch.dtype) -> list[list[str]]:
    """The instructions of `larger` and of `packed_halves`."""
    spec = Linear(64, 8, (Segment(0, 8),), quantization=Quantization("token"))
    tensors = {
        "in.x": torch.zeros(1, 64, dtype=dtype),
        "w.weight": torch.zeros(8, 64, dtype=torch.int8),
        "w.weight_scale": torch.ones(8),
        "out.y0": torch.zeros(1, 8, dtype=dtype),
    }
    request, *_ = int8_row_request(spec, operands(tensors), Int8RowConfig(8, 16), context(("sm_90",)))
    blocks = re.findall(r'inline_asm_elementwise\(\s*"""(.*?)"""', render(request), re.S)
    found = [[line.strip() for line in block.strip().strip("{}").split(";") if line.strip()] for block in blocks]
    return [block for block in found if any("b64" in line for line in block)]


def halves(x: np.ndarray) -> np.ndarray:
    """[n] uint32 -> [n, 2] uint16, low first."""
    return np.stack([x & 0xFFFF, x >> 16], -1).astype(np.uint16)


def as_float(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(bits.astype(np.int16)).view(dtype).double().numpy()


def execute(lines: list[str], dtype: torch.dtype, **registers: np.ndarray) -> np.ndarray:
    """What the assembly leaves in $0. registers: $1 and $2 as r1 and r2; 32- and 16-bit ones are held as uint32."""
    r = {f"${name[1:]}": value for name, value in registers.items()}
    for line in lines:
        op, _, rest = line.partition(" ")
        if op == ".reg":
            continue
        first, second, *more = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        names = [name.strip() for name in (first if first[0] == "{" else second).strip("{}").split(",")]
        match op:
            case "mov.b64" if first[0] == "{":
                for i, name in enumerate(names):
                    r[name] = (r[second] >> np.uint64(32 * i)).astype(np.uint32)
            case "mov.b64":
                r[first] = r[names[0]].astype(np.uint64) | r[names[1]].astype(np.uint64) << np.uint64(32)
            case "mov.b32" if first[0] == "{":
                for i, name in enumerate(names):
                    r[name] = halves(r[second])[:, i].astype(np.uint32)
            case "mov.b32":
                r[first] = r[second]
            case "shl.b32":
                r[first] = r[second] << np.uint32(int(more[0]))
            case "and.b32":
                r[first] = r[second] & np.uint32(int(more[0], 16))
            case "cvt.f32.f16":
                r[first] = as_float(r[second], torch.float16).astype(np.float32).view(np.uint32)
            case "abs.f16x2" | "abs.bf16x2":
                r[first] = r[second] & np.uint32(0x7FFF7FFF)
            case "max.NaN.f16x2" | "max.NaN.bf16x2":
                a, b = halves(r[second]), halves(r[more[0]])
                x, y = as_float(a, dtype), as_float(b, dtype)
                most = np.where(np.isnan(x) | np.isnan(y), CANONICAL_NAN, np.where(x >= y, a, b)).astype(np.uint32)
                r[first] = most[:, 0] | most[:, 1] << np.uint32(16)
            case "fma.rn.f32":
                assert more[1] == f"0f{MAGIC:08X}"
                # Between 2^23 and 2^24 a step of float32 is one, so that rounding is rounding to integers.
                exact = r[second].view(np.float32).astype(float) * r[more[0]].astype(float)
                r[first] = (12582912.0 + np.rint(exact)).astype(np.float32).view(np.uint32)
            case "prmt.b32":
                both = [(r[n] >> np.uint32(8 * i)) & np.uint32(0xFF) for n in (second, more[0]) for i in range(4)]
                chosen = [both[int(more[1], 16) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4)]
                r[first] = chosen[0] | chosen[1] | chosen[2] | chosen[3]
            case _:
                raise AssertionError(f"unknown instruction {line!r}")
    return r["$0"]


@pytest.mark.parametrize("kind", DTYPES)
def test_fours_are_rounded_to_the_nearest_int8(kind: str) -> None:
    torch.manual_seed(0)
    _, packing = assembly(DTYPES[kind])
    x = torch.randn(4096, 4).to(DTYPES[kind])
    x[0], x[1, 2], x[2, 0] = 0.0, -0.0, x.abs().max()
    x[3] = -x.abs().max()
    inverse = np.full(len(x), np.float32(127 / float(x.abs().max())), np.float32)
    words = execute(packing, DTYPES[kind], r1=x.view(torch.int64)[:, 0].numpy().view(np.uint64), r2=inverse)
    wanted = np.rint(x.double().numpy() * inverse[:, None].astype(float)).astype(np.int8)
    np.testing.assert_array_equal(words.view(np.int8).reshape(-1, 4), wanted)
    assert wanted.max() == 127 and wanted.min() == -127


@pytest.mark.parametrize("kind", DTYPES)
def test_the_largest_magnitude_of_each_place_is_kept_and_so_is_nan(kind: str) -> None:
    torch.manual_seed(1)
    largest, _ = assembly(DTYPES[kind])
    a, b = (torch.randn(512, 4).to(DTYPES[kind]) for _ in range(2))
    a[0, 1], b[1, 3], a[2, 0], b[3, 2] = float("nan"), float("nan"), float("-inf"), float("inf")
    words = execute(
        largest,
        DTYPES[kind],
        **{n: t.view(torch.int64)[:, 0].numpy().view(np.uint64) for n, t in (("r1", a), ("r2", b))},
    )
    found = as_float(words.view(np.uint16).reshape(-1, 4), DTYPES[kind])
    np.testing.assert_array_equal(found, np.maximum(a.double().abs().numpy(), b.double().abs().numpy()))
    assert np.isnan(found).sum() == 2 and np.isinf(found).sum() == 2
