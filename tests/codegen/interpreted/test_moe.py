"""The kernels of mixtures of experts against the float64 formula: every router and gate, one token and many."""

from __future__ import annotations

import pytest
import torch

from dscompile.runtime.plan import Moe, Router
from tests.codegen import oracle
from tests.codegen.interpreted.harness import TOLERANCE, run, slice_of
from tests.helpers import rms_ratio

K, F, E = 72, 45, 6
SPECS = {
    "mixtral": Moe(K, F, Router(E, 2, "softmax", True), "silu", residuals=1),
    "qwen": Moe(K, F, Router(E, 3, "softmax", False), "silu"),
    "clamped": Moe(K, F, Router(E, 2, "softmax", True), "gelu_quick", limit=0.8, shift=1.0, bias=True, residuals=2),
    "scaled_input": Moe(K, F, Router(E, 1, "sigmoid", False), "silu", scale_input=True, bias=True),
    "factored_residual": Moe(K, F, Router(E, 2, "softmax", False), "silu", residuals=2, factor=True),
    "groups": Moe(K, F, Router(E, 3, "sigmoid", True, 2.5, True, num_groups=3, top_groups=2, group_top=2), "gelu"),
    "best_group": Moe(K, F, Router(E, 2, "softmax", False, 16.0, num_groups=2, top_groups=1), "silu", residuals=1),
}


def tensors_for(spec: Moe, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    experts = spec.router.num_experts
    t = {
        "in.x": slice_of(rows, K, dtype),
        "in.logits": slice_of(rows, experts, dtype),
        "w.gate_up": (torch.randn(experts, 2 * F, K) / K**0.5).to(dtype),
        "w.down": (torch.randn(experts, K, F) / F**0.5).to(dtype),
        "out.y": slice_of(rows, K, dtype, float("nan")),
    }
    if spec.bias:
        t |= {"w.gate_up_bias": torch.randn(experts, 2 * F).to(dtype), "w.down_bias": torch.randn(experts, K).to(dtype)}
    if spec.router.correction:
        t["w.correction"] = 0.3 * torch.randn(experts)
    t |= {"in.factor": slice_of(rows, 1, dtype)} if spec.factor else {}
    return t | {f"in.residual{i}": slice_of(rows, K, dtype) for i in range(spec.residuals)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 3, 37, 150])
def test_moe(name: str, rows: int) -> None:
    torch.manual_seed(rows)
    dtype = torch.float32 if rows == 3 else torch.float16
    tensors = tensors_for(SPECS[name], rows, dtype)
    run(SPECS[name], tensors, {}, {"T": rows, "B": rows})
    assert rms_ratio(tensors["out.y"], oracle.moe(SPECS[name], tensors)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 20])
def test_experts_that_no_token_chose_are_not_read(rows: int) -> None:
    torch.manual_seed(0)
    spec = SPECS["mixtral"]
    tensors = tensors_for(spec, rows, torch.float16)
    tensors["in.logits"][:] = tensors["in.logits"][:1].clone()
    expected = oracle.moe(spec, tensors)
    hit = tensors["in.logits"][0].topk(2).indices.tolist()
    for e in set(range(E)) - set(hit):
        tensors["w.gate_up"][e] = tensors["w.down"][e] = float("nan")
    run(spec, tensors, {}, {"T": rows, "B": rows})
    assert rms_ratio(tensors["out.y"], expected) <= TOLERANCE[torch.float16]
