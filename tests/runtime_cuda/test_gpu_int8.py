"""The int8 linears on a GPU, at sizes that fill tiles: exact sums of integers, and the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dscompile.runtime.plan import Linear, Norm, Quantization, Segment
from tests.codegen import oracle
from tests.codegen.interpreted.harness import context, run
from tests.helpers import rms_ratio

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("target")]

ROWS = (1, 8, 70, 300)
K, N = 4096, 1536
GATED = Linear(K, 2 * N, (Segment(0, 2 * N, "silu", gated=True),), norm=Norm("rms", 1e-5))
PACKED = Linear(K, 2 * N, (Segment(0, 1000), Segment(1000, 2 * N, "gelu_tanh")), norm=Norm("layer", 1e-5), bias=True)
LONG = Linear(14336, N, (Segment(0, N),), residuals=1)


def operands(spec: Linear, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    n, k = spec.out_features, spec.in_features
    tensors = {
        "in.x": (torch.randn(rows, k, device="cuda") + 0.5).to(dtype),
        "w.weight": torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8),
        "w.weight_scale": (0.5 + torch.rand(n, device="cuda")) / (73 * k**0.5),
    }
    if spec.bias:
        tensors["w.bias"] = torch.randn(n, device="cuda").to(dtype)
    for i in range(spec.residuals):
        tensors[f"in.residual{i}"] = torch.randn(rows, spec.segments[0].width, device="cuda").to(dtype)
    for i, segment in enumerate(spec.segments):
        tensors[f"out.y{i}"] = torch.full((rows, segment.width), float("nan"), device="cuda", dtype=dtype)
    return tensors


def launch(spec: Linear, tensors: dict[str, torch.Tensor], rows: int) -> None:
    major, minor = torch.cuda.get_device_capability()
    run(spec, tensors, {}, {"T": rows, "B": rows, "R": rows}, context=context((f"sm_{major}{minor}",)))


def test_integers_are_added_up_exactly():
    torch.manual_seed(0)
    spec = Linear(LONG.in_features, N, (Segment(0, N),), quantization=Quantization("token"))
    for rows in ROWS:
        tensors = operands(spec, rows, torch.float32)
        integers = torch.randint(-127, 128, (rows, spec.in_features), device="cuda")
        integers[:, 7] = 127  # the step of each row is one
        tensors["in.x"].copy_(integers)
        tensors["w.weight_scale"].fill_(1.0)
        launch(spec, tensors, rows)
        # float64 holds every sum exactly; the kernels' output is float32.
        wanted = (integers.double() @ tensors["w.weight"].double().T).float()
        assert torch.equal(tensors["out.y0"], wanted), f"{rows} rows"


CASES = {
    "gated": (GATED, "token", torch.float16),
    "packed": (PACKED, "token", torch.bfloat16),
    "long": (LONG, "token", torch.float16),
    "long, bfloat16": (LONG, "token", torch.bfloat16),
    "long, static": (LONG, "tensor", torch.float16),
    "gated, weights alone": (GATED, "none", torch.float16),
    "long, weights alone": (LONG, "none", torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name, summary):
    plain, how, dtype = CASES[name]
    torch.manual_seed(1)
    spec = replace(plain, quantization=Quantization(how))
    limit = {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    worst = 0.0
    for rows in ROWS:
        tensors = operands(spec, rows, dtype)
        if how == "tensor":
            tensors["w.input_scale"] = torch.tensor([0.02], device="cuda")  # some numbers are beyond 127 steps
        launch(spec, tensors, rows)
        for role, expected in oracle.linear(spec, tensors).items():
            worst = max(worst, rms_ratio(tensors[role], expected))
    summary(f"int8 linear, {name}, {dtype}: RMS ratio to float64 at most {worst:.2e}")
    assert worst <= limit
