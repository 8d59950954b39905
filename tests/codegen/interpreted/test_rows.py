"""The embedding and the stand-alone norm against the float64 formula."""

from __future__ import annotations

import pytest
import torch

from dscompile.codegen.jit import JitRunner
from dscompile.codegen.row_kernels import KEPT_COLUMNS, KEPT_ROWS
from dscompile.codegen.select import programs_for
from dscompile.runtime.plan import Embed, KeepRows, Norm, RowNorm
from tests.codegen import oracle
from tests.codegen.interpreted.harness import TOLERANCE, context, operands, run, slice_of
from tests.helpers import rms_ratio

D, V, ROWS = 77, 50, 5
NORMS = {
    "none": None,
    "rms": Norm("rms", 1e-5),
    "layer": Norm("layer", 1e-5, weight=True, bias=True),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_embed(norm: str, offset: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = Embed(scale=1.5, position_offset=offset, norm=NORMS[norm])
    tensors = {"w.table": torch.randn(V, D).to(dtype), "out.y": slice_of(ROWS, D, dtype, float("nan"))}
    if offset is not None:
        tensors["w.positions_table"] = torch.randn(40, D).to(dtype)
    if spec.norm and spec.norm.weight:
        tensors |= {"w.norm_weight": torch.randn(D).to(dtype), "w.norm_bias": torch.randn(D).to(dtype)}
    step = {"tokens": torch.randint(0, V, (ROWS,)).int(), "positions": torch.randint(0, 30, (ROWS,)).int()}
    run(spec, tensors, step, {"T": ROWS, "B": 1})
    expected = oracle.embed(spec, tensors, step["tokens"], step["positions"])
    assert rms_ratio(tensors["out.y"], expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_positions_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = Embed(table=False, position_offset=2)
    tensors = {"w.positions_table": torch.randn(40, D).to(dtype), "out.y": slice_of(ROWS, D, dtype, float("nan"))}
    step = {"tokens": torch.zeros(ROWS).int(), "positions": torch.randint(0, 30, (ROWS,)).int()}
    run(spec, tensors, step, {"T": ROWS, "B": 1})
    assert torch.equal(tensors["out.y"], tensors["w.positions_table"][step["positions"].long() + 2])


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("add", "groups"), [(True, 1), (False, 1), (True, 7), (False, 11)])
def test_row_norm(norm: str, add: bool, groups: int) -> None:
    torch.manual_seed(0)
    spec = RowNorm(NORMS[norm], add=add, groups=groups)  # type: ignore[arg-type]
    tensors = {"in.x": slice_of(ROWS, D, torch.float32), "out.y": slice_of(ROWS, D, torch.float32, float("nan"))}
    if add:
        tensors["in.add"] = slice_of(ROWS, D, torch.float32)
    if spec.norm.weight:
        tensors |= {"w.norm_weight": torch.randn(D // groups), "w.norm_bias": torch.randn(D // groups)}
    run(spec, tensors, {}, {"T": ROWS, "B": 1})
    t = {k: v.double() for k, v in tensors.items()}
    v = (t["in.x"] + (t["in.add"] if add else 0)).reshape(ROWS, groups, -1)
    expected = oracle.norm(spec.norm, v, t.get("w.norm_weight"), t.get("w.norm_bias")).flatten(1)
    assert rms_ratio(tensors["out.y"], expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kept", [1, 30, KEPT_ROWS + 1, 2 * KEPT_ROWS + 5])
def test_keep_rows(kept: int) -> None:
    """Rows move in place, through more than one turn of a program; those at the front lie where others are moved to."""
    torch.manual_seed(0)
    rows, generator = 2 * KEPT_ROWS + 11, torch.Generator().manual_seed(kept)
    tensors = {
        "in.x0": slice_of(rows, KEPT_COLUMNS + 9, torch.float16),
        "in.x1": slice_of(rows, D, torch.float16),
        "in.x2": torch.rand(rows, D) < 0.5,
    }
    chosen = torch.randperm(rows, generator=generator)[:kept].sort().values
    expected = {role: x[chosen].clone() for role, x in tensors.items()}
    program, requests = programs_for(KeepRows(), operands(tensors), context())
    values = tensors | {"step.logit_rows": chosen.int(), "R": kept}
    JitRunner(requests).run(program.cases[0], values.__getitem__, {"T": rows, "B": 1, "R": kept})
    for role, x in tensors.items():
        assert torch.equal(x[:kept], expected[role])
        if x.dtype.is_floating_point:
            assert x._base[:, :8].isnan().all() and x._base[:, -16:].isnan().all()
