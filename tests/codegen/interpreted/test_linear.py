"""The linear kernels against the float64 formula: every prologue and epilogue, odd shapes, sliced operands."""

from __future__ import annotations

import pytest
import torch

from dscompile.runtime.plan import Linear, Norm, Segment
from tests.codegen import oracle
from tests.codegen.interpreted.harness import TOLERANCE, run, slice_of
from tests.helpers import rms_ratio

K, N = 200, 51
PLAIN = (Segment(0, N),)
GATED = (Segment(0, 2 * 27, "silu", gated=True),)
PACKED = (Segment(0, 33), Segment(33, 33 + 40, "gelu_tanh"), Segment(73, 73 + 2 * 9, "gelu", gated=True))

RMS, LAYER = Norm("rms", 1e-5), Norm("layer", 1e-5)
SPECS = {
    "plain": Linear(K, N, PLAIN),
    "bias": Linear(K, N, PLAIN, bias=True),
    "residuals": Linear(K, N, PLAIN, bias=True, residuals=2, scale=0.5),
    "softcap": Linear(K, N, PLAIN, softcap=3.0),
    "rms": Linear(K, N, PLAIN, norm=RMS),
    "layer": Linear(K, N, PLAIN, norm=LAYER, bias=True),
    "rms_weight": Linear(K, N, PLAIN, norm=Norm("rms", 1e-5, weight=True)),
    "layer_weight_bias": Linear(K, N, PLAIN, norm=Norm("layer", 1e-5, weight=True, bias=True)),
    "gated": Linear(K, 54, GATED, norm=RMS),
    "packed": Linear(K, 91, PACKED, norm=LAYER, bias=True),
    "learned": Linear(K, 84, (Segment(0, 33), Segment(33, 84, "xielu")), norm=RMS, bias=True),
    "learned_gate": Linear(K, 54, (Segment(0, 54, "xielu", gated=True),), residuals=1),
    "add_store": Linear(K, N, PLAIN, norm=RMS, add=True, store=True),
    "sandwich": Linear(K, 54, GATED, norm=RMS, post_norm=Norm("rms", 1e-6, weight=True), add=True, store=True),
    "sandwich_layer": Linear(
        K, N, PLAIN, norm=LAYER, post_norm=Norm("layer", 1e-6, weight=True, bias=True), add=True, store=True
    ),
    "post_only": Linear(K, N, PLAIN, norm=RMS, post_norm=Norm("layer", 1e-6), store=True),
}
ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_tanh", "gelu_quick", "tanh", "sigmoid", "softplus", "xielu")


def tensors_for(spec: Linear, rows: int, outputs: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random operands of a linear, activations as column slices of wider matrices, outputs poisoned."""
    t = {"in.x": slice_of(rows, spec.in_features, dtype), "w.weight": torch.randn(spec.out_features, spec.in_features)}
    t["w.weight"] = (t["w.weight"] / spec.in_features**0.5).to(dtype)
    if spec.add:
        t["in.add"] = slice_of(rows, spec.in_features, dtype)
    if spec.bias:
        t["w.bias"] = torch.randn(spec.out_features).to(dtype)
    if spec.has_alpha:
        t["w.alpha"] = torch.tensor([0.2, 1.9, 0.4, -0.01])
    for norm, prefix in ((spec.norm, ""), (spec.post_norm, "post_")):
        if norm and norm.weight:
            t[f"w.{prefix}norm_weight"] = (1 + 0.3 * torch.randn(spec.in_features)).to(dtype)
        if norm and norm.bias:
            t[f"w.{prefix}norm_bias"] = torch.randn(spec.in_features).to(dtype)
    if spec.norm and spec.norm.kind == "layer" and not spec.norm.weight:
        t["w.row_sum"] = t["w.weight"].double().sum(1).float()
    for i in range(spec.residuals):
        t[f"in.residual{i}"] = slice_of(rows, spec.segments[0].width, dtype)
    if spec.store:
        t["out.sum"] = slice_of(outputs, spec.in_features, dtype, float("nan"))
    for i, segment in enumerate(spec.segments):
        t[f"out.y{i}"] = slice_of(outputs, segment.width, torch.float32 if spec.rows == "R" else dtype, float("nan"))
    return t


def check(spec: Linear, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    tensors = tensors_for(spec, rows, rows, dtype)
    run(spec, tensors, {}, {"T": rows, "B": rows})
    for role, expected in oracle.linear(spec, tensors).items():
        assert rms_ratio(tensors[role], expected) <= TOLERANCE[dtype], role


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 3, 17, 150])
def test_linear(name: str, rows: int) -> None:
    check(SPECS[name], rows, torch.float32 if rows == 3 else torch.float16)


@pytest.mark.parametrize("options", [{"bias": True, "residuals": 1}, {"residuals": 1}, {"bias": True}])
def test_a_library_adds_bias_and_residual(options: dict) -> None:
    """Columns that it can store, unlike those of the other tests."""
    check(Linear(K, 56, (Segment(0, 56),), norm=RMS, **options), 150, torch.float16)


@pytest.mark.parametrize("bias", [False, True])
def test_a_library_computes_each_segment(bias: bool) -> None:
    segments = (Segment(0, 2048), Segment(2048, 4104, "gelu_tanh"))
    check(Linear(K, 4104, segments, bias=bias), 150, torch.float16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 9])
def test_activation(activation: str, rows: int) -> None:
    check(Linear(K, N, (Segment(0, N, activation),)), rows, torch.float32)  # type: ignore[arg-type]


HEADS = {
    "layer": Linear(K, N, PLAIN, norm=LAYER, softcap=5.0, rows="R"),
    "add": Linear(K, N, PLAIN, norm=RMS, add=True, rows="R"),
    "sandwich": Linear(
        K, N, PLAIN, norm=Norm("rms", 1e-5, weight=True), post_norm=Norm("rms", 1e-6, weight=True), add=True, rows="R"
    ),
    "sandwich_layer": Linear(K, N, PLAIN, norm=LAYER, post_norm=Norm("layer", 1e-6, True, True), add=True, rows="R"),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [1, 19, 3])
def test_head(name: str, rows: int) -> None:
    torch.manual_seed(0)
    spec = HEADS[name]
    tensors = tensors_for(spec, rows, rows, torch.float16)
    limit = TOLERANCE[torch.float16] if spec.add else 1e-5  # a sum is rounded for the tensor cores
    run(spec, tensors, {}, {"T": rows, "B": 1, "R": rows})
    assert rms_ratio(tensors["out.y0"], oracle.linear(spec, tensors)["out.y0"]) <= limit


@pytest.mark.parametrize("rows", [1, 5])
def test_layer_norm_of_rows_far_from_zero(rows: int) -> None:
    torch.manual_seed(1)
    spec = Linear(K, N, PLAIN, norm=LAYER, bias=True)
    tensors = tensors_for(spec, rows, rows, torch.float32)
    tensors["in.x"] += 300.0
    tensors["in.x"][:, 0] -= 900.0
    run(spec, tensors, {}, {"T": rows, "B": rows})
    assert rms_ratio(tensors["out.y0"], oracle.linear(spec, tensors)["out.y0"]) <= 1e-4


@pytest.mark.parametrize("name", ["plain", "packed", "rms", "sandwich"])
def test_programs_that_share_columns_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dscompile.codegen import linear_kernels, tuned_table

    split = tuned_table.TileConfig(block_n=16, block_t=8, block_k=32, splits=3)
    monkeypatch.setattr(linear_kernels, "tile_config", lambda *_: split)
    check(SPECS[name], 6, torch.float16)
