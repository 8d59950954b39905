"""Runs the program of one spec in Triton's interpreter on random tensors and compares it with the oracle."""

from __future__ import annotations

from typing import Any

import torch

from dscompile.codegen.jit import JitRunner
from dscompile.codegen.operands import KernelContext, Operand
from dscompile.codegen.select import programs_for
from dscompile.runtime.kernels import choose_case
from dscompile.runtime.plan import KVGroup

NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.bool: "bool",
}
POISON = 0xFF  # every byte of a NaN
TOLERANCE = {torch.float16: 1e-3, torch.float32: 2e-6}


def context(
    targets: tuple[str, ...] = ("sm_90",), page_size: int = 16, groups: tuple[KVGroup, ...] = ()
) -> KernelContext:
    return KernelContext(
        targets, page_size=page_size, max_seq_len=512, max_batch=16, max_step_tokens=256, kv_groups=groups
    )


def operands(tensors: dict[str, torch.Tensor]) -> dict[str, Operand]:
    """Describe tensors as the lowering describes buffers and weights."""
    return {
        role: Operand(NAMES[t.dtype], t.stride(0) if t.dim() > 1 else 1, tuple(t.shape), t.data_ptr() % 16 == 0)
        for role, t in tensors.items()
    }


def slice_of(rows: int, cols: int, dtype: torch.dtype, fill: float | None = None) -> torch.Tensor:
    """A [rows, cols] range of columns of a wider matrix, random or filled; a kernel must not touch the rest."""
    wide = torch.full((rows, cols + 24), float("nan"), dtype=dtype)
    wide[:, 8 : 8 + cols] = torch.randn(rows, cols) if fill is None else fill
    return wide[:, 8 : 8 + cols]


def run(
    spec: Any, tensors: dict[str, torch.Tensor], step: dict[str, torch.Tensor], sizes: dict[str, int], **how: Any
) -> list[str]:
    """Run the case of the spec's program that fits `sizes`; outputs in `tensors` are written in place, twice.

    The second run proves that counters in scratch memory are left as they were found; other scratch is poisoned again.
    how: decode, count (rows that choose the case, T by default), longest (tokens of the longest sequence), context,
         extra (further arguments by name)
    returns: the names of what it launched
    """
    surroundings = how.get("context") or context()
    program, requests = programs_for(spec, operands(tensors), surroundings)
    case = choose_case(program, how.get("count", sizes["T"]), how.get("decode", False), how.get("longest", 0))
    assert case is not None
    runner = JitRunner(requests, tensors["in.x"].device.type if "in.x" in tensors else "cpu")
    scratch = runner.scratch(program, sizes)

    def bind(arg: str) -> Any:
        kind, _, name = arg.partition(".")
        if kind == "scratch":
            return scratch[name]
        if kind == "step":
            return step[name]
        if arg in sizes:
            return sizes[arg]
        return how.get("extra", {})[arg] if arg in how.get("extra", {}) else tensors[arg]

    for _ in range(2):
        for role, tensor in tensors.items():
            if role.startswith("out."):
                tensor.fill_(float("nan"))
        for s in program.scratch:
            if not s.zeroed:
                scratch[s.name].fill_(POISON)
        runner.run(case, bind, sizes)
    return [launch.target for launch in case.launches]
