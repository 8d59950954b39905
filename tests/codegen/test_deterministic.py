"""Deterministic programs: whatever the number of rows, a row's sums are taken in one order."""

from __future__ import annotations

import pytest

from benchmarks.kernel_shapes import ATTENTIONS, LINEARS, attention_operands, linear_operands
from dscompile.codegen.aot import compile_kernels
from dscompile.codegen.operands import KernelContext
from dscompile.codegen.select import programs_for
from dscompile.runtime.errors import UserError
from dscompile.runtime.kernels import choose_case
from dscompile.runtime.plan import KVGroup, Moe, Router

TARGET = "sm_90"
GROUPS = (KVGroup(1, 8, 128, 128, "bfloat16"),)


def context(deterministic: bool = True) -> KernelContext:
    return KernelContext((TARGET,), 16, 4096, 64, 2048, GROUPS, deterministic=deterministic)


@pytest.mark.parametrize(("model", "region"), [(m, r) for m, (_, linears) in LINEARS.items() for r in linears])
def test_every_number_of_rows_divides_the_columns_alike(model, region):
    dtype, linears = LINEARS[model]
    spec = linears[region]
    program, requests = programs_for(spec, linear_operands(spec, dtype), context())
    by_name = {request.name: request for request in requests}
    constants = []
    for count in (1, 2, 8, 9, 33, 64, 65, 129, 2048):
        case = choose_case(program, count, decode=count == 1)
        assert case is not None and all(launch.kind == "kernel" for launch in case.launches)
        *prologue, tile = (by_name[launch.target] for launch in case.launches)
        assert tile.template == "linear_tile" and [p.template for p in prologue] in ([], ["row_norm"])
        numbers = tile.constexprs
        constants.append((numbers["BN"], numbers["BK"], numbers["SPLITS"], tuple(p.name for p in prologue)))
        assert numbers["SPLITS"] == 1 and int(numbers["BN"]) >= 64
    assert len(set(constants)) == 1


def test_attention_takes_one_kernel_for_prefill_and_decode():
    dtype, spec = ATTENTIONS["llama3-8b"]
    operands = attention_operands(spec, dtype, 4096)
    program, requests = programs_for(spec, operands, context())
    assert [request.template for request in requests] == ["attention_append", "attention_ring"]
    assert all(choose_case(program, n, decode) == program.cases[0] for n in (1, 70) for decode in (True, False))
    usual, _ = programs_for(spec, operands, context(deterministic=False))
    assert len(usual.cases) > 1


def test_kernels_compile(tmp_path):
    dtype, linears = LINEARS["llama3-8b"]
    requests = {r.name: r for s in linears.values() for r in programs_for(s, linear_operands(s, dtype), context())[1]}
    tallest = [r for r in requests.values() if r.constexprs.get("BT", 0) in (64, 128)]
    for kernel in compile_kernels(tallest, (TARGET,), tmp_path, processes=2).values():
        assert kernel.cubins[TARGET].spills == 0


def test_experts_are_refused():
    spec = Moe(24, 16, Router(8, 2, "softmax", True), "silu")
    with pytest.raises(UserError, match="no deterministic kernels"):
        programs_for(spec, linear_operands(LINEARS["llama3-8b"][1]["head"], "bfloat16"), context())
