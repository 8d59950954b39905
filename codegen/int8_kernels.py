"""Kernels of a linear whose products are of integers: one row rounded where it is read, many rows ahead of tiles."""

from __future__ import annotations

from dataclasses import replace

from dscompile.codegen.bulk_kernels import bulk_request, takes_bulk
from dscompile.codegen.emit import DESCRIPTOR_BYTES, KernelRequest, kernel_request
from dscompile.codegen.linear_kernels import (
    TILE_RANGES,
    Draft,
    choose_config,
    prepared,
    reading_scratch,
    tile_launch,
    without_prologue,
)
from dscompile.codegen.linear_structure import arguments_of, numbers_of, structure_of
from dscompile.codegen.operands import Arguments, KernelContext, Operand, Operands, ceil_div, next_power_of_2
from dscompile.codegen.row_kernels import row_norm_launch
from dscompile.codegen.targets import capability
from dscompile.codegen.tuned_table import BULK_TOKENS, BulkConfig, Int8RowConfig, bulk_config, int8_row_config
from dscompile.runtime.plan import Case, Extent, Launch, Linear, Program, Quantization

RANGES = (*TILE_RANGES, (TILE_RANGES[-1][1] + 1, BULK_TOKENS))


def int8_linear_program(
    spec: Linear, operands: Operands, context: KernelContext
) -> tuple[Program, tuple[KernelRequest, ...]]:
    """Choose the kernels of a linear of int8 rows and weights for every range of its rows."""
    draft, first = Draft(), 1
    cases: list[Case] = []
    if has_words(operands):
        cases.append(Case(1, 1, (_row_launch(spec, operands, context, draft),)))
        first = 2
    prepare = _quantize_rows(spec, operands, draft)
    inner, rows = without_prologue(spec), {**operands, "in.x": prepared(spec, "int8")}
    for _, high in RANGES:
        last = high == RANGES[-1][1]
        config = choose_config(inner, rows, high, context)
        bulk = bulk_config(inner, context)
        if last and takes_bulk(inner, rows, context, bulk):
            launch = _bulk_launch(inner, rows, context, bulk, draft)
        else:
            launch = tile_launch(inner, rows, replace(config, splits=1) if last else config, draft)
        cases.append(Case(first, 0 if last else high, (prepare, reading_scratch(launch))))
        first = high + 1
    return draft.program(cases)


# ---------------------------------------------------------------- one row


def has_words(operands: Operands) -> bool:
    """Whether four neighbours of a weight's row can be read as one word."""
    weight = operands["w.weight"]
    return weight.aligned and weight.shape[1] % 4 == 0 and weight.stride % 4 == 0


def _halves(spec: Linear, x: Operand, context: KernelContext) -> str:
    """The type of a row that is rounded as it is, where four of its numbers can be read as one."""
    changed = spec.norm or spec.post_norm or spec.add or spec.store
    static = spec.quantization is not None and spec.quantization.activations == "tensor"
    paired = min(capability(t) for t in context.targets) >= 80
    whole = x.aligned and x.stride % 4 == 0
    return (
        {"float16": "f16", "bfloat16": "bf16"}.get(x.dtype, "") if whole and paired and not (changed or static) else ""
    )


def int8_row_request(
    spec: Linear, operands: Operands, config: Int8RowConfig, context: KernelContext
) -> tuple[KernelRequest, Arguments, int]:
    """The kernel for one row of x, its arguments and its number of programs."""
    words = spec.in_features // 4
    block_k = min(config.block_k, next_power_of_2(words))
    chunks = ceil_div(words, block_k)
    structure = structure_of(spec, operands, config.block_n, two_pass=True)
    structure |= {"tail_k": words % block_k != 0, "chunks": chunks, "prefetch": min(config.prefetch, chunks)}
    structure["halves"] = _halves(spec, operands["in.x"], context)
    numbers = numbers_of(spec, operands) | {"BN": config.block_n, "BK": block_k}
    arguments = arguments_of(spec, operands, folded_norm=False)
    if spec.quantization and spec.quantization.activations == "tensor":
        arguments.bind("w.input_scale")
    request = kernel_request(
        "linear_int8_row", numbers, arguments.params, structure=structure, num_warps=config.num_warps, num_stages=1
    )
    return request, arguments, structure["segments"][-1]["end"]


def _row_launch(spec: Linear, operands: Operands, context: KernelContext, draft: Draft) -> Launch:
    request, arguments, programs = int8_row_request(spec, operands, int8_row_config(spec, context), context)
    draft.requests.append(request)
    return Launch("kernel", request.name, arguments.args, (Extent(programs),))


# ---------------------------------------------------------------- many rows


def quantize_request(spec: Linear, operands: Operands) -> tuple[KernelRequest, Launch]:
    """A linear's prologue and the rounding of its rows, into scratch.rows and scratch.scales."""
    assert spec.quantization is not None
    return row_norm_launch(spec, operands, spec.in_features, quantized=spec.quantization.activations)


def _bulk_launch(spec: Linear, operands: Operands, context: KernelContext, config: BulkConfig, draft: Draft) -> Launch:
    request, arguments, programs = bulk_request(spec, operands, config, context)
    draft.requests.append(request)
    draft.reserve("descriptors", "1", programs * request.descriptors * DESCRIPTOR_BYTES)
    return Launch("kernel", request.name, arguments.args, (Extent(programs),), descriptors="scratch.descriptors")


def _quantize_rows(spec: Linear, operands: Operands, draft: Draft) -> Launch:
    request, launch = quantize_request(spec, operands)
    draft.requests.append(request)
    draft.reserve("rows", spec.rows, spec.in_features)
    if spec.quantization == Quantization("token"):
        draft.reserve("scales", spec.rows, 4)
    return launch
