"""Programs whose rows do not depend on their neighbours: one order of summation for a row, however many there are.

The usual programs take another kernel for every range of tokens, and with it another order of summation, so that a
request's logits differ in the last bits with the size of the batch it happens to be in. Here every linear runs tiles
that divide its columns the same way in every range, its norm in a kernel of its own, never a library's GEMM; and
attention one kernel for prefill and decode, which takes the keys in blocks from the first one on.
"""

from __future__ import annotations

from dscompile.codegen.attention_kernels import attention_program
from dscompile.codegen.emit import KernelRequest
from dscompile.codegen.linear_kernels import (
    Draft,
    prepare_rows,
    prepared,
    reading_scratch,
    tile_launch,
    without_prologue,
)
from dscompile.codegen.memory import ITEM_SIZE
from dscompile.codegen.operands import KernelContext, Operands, ceil_div
from dscompile.codegen.tuned_table import TileConfig, num_sms
from dscompile.runtime.plan import Attention, Case, Launch, Linear, Program

# Tokens of a tile, and of a step up to which it is taken. Tiles of 64 weight rows and more use the same instruction,
# which adds 16 columns at a time in their order, at every number of tokens.
TILES = ((8, 8), (16, 16), (32, 32), (64, 64), (128, 0))
BLOCK_K = {4: 32, 2: 64}


def deterministic_program(
    spec: Linear | Attention, operands: Operands, context: KernelContext
) -> tuple[Program, tuple[KernelRequest, ...]]:
    """The program of a step, as `select.programs_for` returns it."""
    if isinstance(spec, Attention):
        program, requests = attention_program(spec, operands, context)
        cases = tuple(case for case in program.cases if case.decode is None)
        names = {launch.target for case in cases for launch in case.launches}
        return Program(cases), tuple(request for request in requests if request.name in names)
    return _linear_program(spec, operands, context)


def _linear_program(
    spec: Linear, operands: Operands, context: KernelContext
) -> tuple[Program, tuple[KernelRequest, ...]]:
    draft, cases, least = Draft(), list[Case](), 1
    inner, rows, prologue = without_prologue(spec), operands, list[Launch]()
    if inner != spec:
        prologue = [prepare_rows(spec, operands, draft)]
        rows = {**operands, "in.x": prepared(spec, operands["in.x"].dtype)}
    for block_t, last in TILES:
        launch = tile_launch(inner, rows, _tile(inner, rows, block_t, context), draft)
        cases.append(Case(least, last, (*prologue, reading_scratch(launch) if prologue else launch)))
        least = last + 1
    return draft.program(cases)


def _tile(spec: Linear, operands: Operands, block_t: int, context: KernelContext) -> TileConfig:
    """Tiles of all of a row's columns, as deep a pipeline as the shared memory holds."""
    itemsize = ITEM_SIZE[operands["w.weight"].dtype]
    block_k = BLOCK_K[itemsize]
    tall = ceil_div(spec.out_features, 128) >= min(num_sms(t) for t in context.targets)
    block_n = 128 if tall and itemsize == 2 else 64
    step = itemsize * block_k * (block_n + block_t)
    stages = max(2, min(8, int(0.7 * context.shared_budget) // step))
    num_warps = 8 if block_n * block_t >= 8192 else 4
    return TileConfig(block_n, block_t, block_k, num_warps, stages, prefetch=512)
