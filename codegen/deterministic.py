"""Programs whose rows do not depend on their neighbours: one order of summation for a row, however many there are.

The usual programs take another kernel for every range of tokens, and with it another order of summation, so that a
request's logits differ in the last bits with the size of the batch it happens to be in. Here every linear runs tiles
that divide its columns the same way in every range, its norm in a kernel of its own, never a library's GEMM; and
attention one kernel for prefill and decode, which takes the keys in blocks from the first one on.
"""

from __future__ import annotations

from dataclasses import replace

from dscompile.codegen.attention_kernels import attention_program
from dscompile.codegen.emit import KernelRequest
from dscompile.codegen.linear_kernels import tile_request
from dscompile.codegen.operands import KernelContext, Operands, ceil_div
from dscompile.codegen.row_kernels import row_norm_launch
from dscompile.codegen.tuned_table import TileConfig, num_sms
from dscompile.runtime.plan import Attention, Case, Extent, Launch, Linear, Program, Scratch

# Tokens of a tile, and of a step up to which it is taken. Tiles of 64 weight rows and more use the same instruction,
# which adds 16 columns at a time in their order, at every number of tokens.
TILES = ((8, 8), (16, 16), (32, 32), (64, 64), (128, 0))
LOGIT_TILES = ((64, 0),)  # rows of logits are gathered, so their norm stays in the tile, where its sum depends on it
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
    launches: list[Launch] = []
    requests: list[KernelRequest] = []
    scratch: tuple[Scratch, ...] = ()
    inner = spec
    if spec.rows == "T" and (spec.norm or spec.post_norm or spec.add or spec.store):
        request, launch = row_norm_launch(spec, operands, spec.in_features)
        requests.append(request)
        launches.append(launch)
        scratch = (Scratch("rows", "T", _itemsize(operands) * spec.in_features),)
        inner = replace(spec, norm=None, post_norm=None, add=False, store=False)
        operands = {**operands, "in.x": replace(operands["in.x"], stride=spec.in_features, aligned=True)}
    cases, least = [], 1
    for block_t, last in TILES if spec.rows == "T" else LOGIT_TILES:
        request, arguments, tiles = tile_request(inner, operands, _tile(inner, operands, block_t, context))
        requests.append(request)
        args = tuple("scratch.rows" if arg == "in.x" and launches else arg for arg in arguments.args)
        grid = (Extent(1, spec.rows, block_t), Extent(tiles), Extent(1))
        cases.append(Case(least, last, (*launches, Launch("kernel", request.name, args, grid))))
        least = last + 1
    return Program(tuple(cases), scratch), tuple({request.name: request for request in requests}.values())


def _tile(spec: Linear, operands: Operands, block_t: int, context: KernelContext) -> TileConfig:
    """Tiles of all of a row's columns, as deep a pipeline as the shared memory holds."""
    itemsize = _itemsize(operands)
    block_k = BLOCK_K[itemsize]
    tall = ceil_div(spec.out_features, 128) >= min(num_sms(t) for t in context.targets)
    block_n = 128 if tall and itemsize == 2 else 64
    step = itemsize * block_k * (block_n + block_t)
    stages = max(2, min(8, int(0.7 * context.shared_budget) // step))
    num_warps = 8 if block_n * block_t >= 8192 else 4
    return TileConfig(block_n, block_t, block_k, num_warps, stages, prefetch=512)


def _itemsize(operands: Operands) -> int:
    return 4 if operands["w.weight"].dtype == "float32" else 2
