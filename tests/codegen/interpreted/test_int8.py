"""The linear kernels of int8 weights, and of int8 rows, against the formula: every prologue and epilogue, odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dscompile.codegen import int8_kernels, linear_kernels
from dscompile.codegen.select import programs_for
from dscompile.codegen.tuned_table import BulkConfig, Int8RowConfig, TileConfig
from dscompile.runtime.plan import Linear, Norm, Quantization, Segment
from tests.codegen import oracle
from tests.codegen.interpreted.harness import context, operands, run
from tests.codegen.interpreted.test_linear import HEADS, SPECS, K, N, tensors_for
from tests.helpers import rms_ratio

HOW = {how: Quantization(how) for how in ("token", "tensor", "none")}
TOKEN, WEIGHT = HOW["token"], HOW["none"]
TOLERANCE = {torch.float16: 1e-3, torch.float32: 1e-5}


def quantized(spec: Linear, how: Quantization, rows: int, outputs: int, dtype: torch.dtype) -> tuple[Linear, dict]:
    """The spec in int8 and operands for it."""
    spec = replace(spec, quantization=how)
    tensors = tensors_for(spec, rows, outputs, dtype)
    tensors.pop("w.row_sum", None)
    tensors["w.weight"] = torch.randint(-127, 128, (spec.out_features, spec.in_features), dtype=torch.int8)
    tensors["w.weight_scale"] = (0.5 + torch.rand(spec.out_features)) / (73 * spec.in_features**0.5)
    if how.activations == "tensor":
        tensors["w.input_scale"] = torch.tensor([0.02])  # a quarter of what is normalised is beyond 127 steps
    return spec, tensors


def check(spec: Linear, how: Quantization, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    spec, tensors = quantized(spec, how, rows, rows, dtype)
    run(spec, tensors, {}, {"T": rows, "B": rows, "R": rows})
    for role, expected in oracle.linear(spec, tensors).items():
        assert rms_ratio(tensors[role], expected) <= TOLERANCE[dtype], role


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "rows,how", [(1, "token"), (17, "token"), (1, "tensor"), (3, "tensor"), (1, "none"), (3, "none")]
)
def test_linear(name: str, rows: int, how: str) -> None:
    check(SPECS[name], HOW[how], rows, torch.float32 if rows == 3 else torch.float16)


@pytest.mark.parametrize("name", ["sandwich_layer", "rms_weight", "layer_weight_bias", "packed"])
def test_a_row_in_several_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Int8RowConfig(block_n=4, block_k=16, num_warps=4, prefetch=2)
    monkeypatch.setattr(int8_kernels, "int8_row_config", lambda *_: small)
    check(SPECS[name], TOKEN, 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_row_that_is_rounded_as_it_is_is_read_in_fours(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pieces and a last one that is not, with the largest magnitude in any place and of any sign."""
    small = Int8RowConfig(block_n=4, block_k=16, num_warps=4, prefetch=2)
    monkeypatch.setattr(int8_kernels, "int8_row_config", lambda *_: small)
    spec, tensors = quantized(Linear(148, 24, (Segment(0, 24),)), TOKEN, 1, 1, dtype)
    _, requests = programs_for(spec, operands(tensors), context())
    assert any(request.structure.get("halves") for request in requests)
    for place in (0, 1, 62, 63, 64, 130, 147):
        tensors["in.x"].copy_(torch.randn(1, 148))
        tensors["in.x"][0, place] = 9.0 * (-1) ** place
        run(spec, tensors, {}, {"T": 1, "B": 1, "R": 1})
        for role, expected in oracle.linear(spec, tensors).items():
            assert rms_ratio(tensors[role], expected) <= (1e-3 if dtype == torch.float16 else 8e-3), (place, role)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_programs_that_share_columns_add_up(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = TileConfig(block_n=16, block_t=8, block_k=32, splits=3)
    monkeypatch.setattr(linear_kernels, "tile_config", lambda *_: split)
    check(SPECS[name], HOW[how], 6, torch.float16)


@pytest.mark.parametrize("how", ["token", "none"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [1, 19])
def test_head(name: str, rows: int, how: str) -> None:
    torch.manual_seed(0)
    spec, tensors = quantized(HEADS[name], HOW[how], rows, rows, torch.float16)
    run(spec, tensors, {}, {"T": rows, "B": 1, "R": rows})
    limit = 1e-5 if how != "none" else 1e-3  # tensor cores read normalised rows in float16
    assert rms_ratio(tensors["out.y0"], oracle.linear(spec, tensors)["out.y0"]) <= limit


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_integers_are_added_up_exactly(rows: int) -> None:
    torch.manual_seed(rows)
    spec, tensors = quantized(Linear(K, N, (Segment(0, N),)), TOKEN, rows, rows, torch.float32)
    integers = torch.randint(-127, 128, (rows, K))
    integers[:, 7] = 127  # the step of each row is one
    tensors["in.x"].copy_(integers)
    tensors["w.weight_scale"].fill_(1.0)
    run(spec, tensors, {}, {"T": rows, "B": rows, "R": rows})
    assert torch.equal(tensors["out.y0"].long(), integers @ tensors["w.weight"].long().T)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_zeros_give_zeros_and_nan_gives_nan(rows: int) -> None:
    torch.manual_seed(0)
    spec, tensors = quantized(Linear(K, N, (Segment(0, N),)), TOKEN, rows, rows, torch.float16)
    tensors["in.x"].zero_()
    run(spec, tensors, {}, {"T": rows, "B": rows, "R": rows})
    assert not tensors["out.y0"].any()
    tensors["in.x"][-1, 3] = float("nan")
    run(spec, tensors, {}, {"T": rows, "B": rows, "R": rows})
    assert tensors["out.y0"][-1].isnan().all()


@pytest.mark.parametrize("rows", [1, 5])
def test_columns_that_make_no_whole_words(rows: int) -> None:
    check(Linear(53, N, (Segment(0, N),)), TOKEN, rows, torch.float32)


WIDE = {
    "plain": Linear(80, 96, (Segment(0, 96),), residuals=1),
    "bias": Linear(64, 40, (Segment(0, 40, "gelu_tanh"),), bias=True),
    "packed": Linear(80, 100, (Segment(0, 64), Segment(64, 80), Segment(80, 100, "silu")), bias=True),
    "gated": Linear(80, 92, (Segment(0, 92, "silu", gated=True),)),
    "learned": Linear(64, 40, (Segment(0, 40, "xielu"),)),
    "learned_packed": Linear(80, 100, (Segment(0, 64), Segment(64, 100, "xielu")), bias=True),
    "norm": Linear(48, 80, (Segment(0, 80),), norm=Norm("rms", 1e-6)),
}


@pytest.mark.parametrize("how", ["token", "tensor"])
@pytest.mark.parametrize("name", WIDE)
def test_blocks_that_the_copy_engine_brings(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, columns and tokens that fill no block, several groups of blocks of tokens, tiles in several segments."""
    small = BulkConfig(block_n=16, block_t=16, block_k=32, group=4)
    monkeypatch.setattr(int8_kernels, "bulk_config", lambda *_: small)
    rows = 135
    spec, tensors = quantized(WIDE[name], HOW[how], rows, rows, torch.float16)
    _, requests = programs_for(spec, operands(tensors), context())
    assert "linear_int8_bulk" in {r.template for r in requests}
    check(WIDE[name], HOW[how], rows, torch.float16)
