"""Kernels that work on rows alone: the embedding and the stand-alone norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.operands import Arguments, Operands, ceil_div, next_power_of_2
from dscompile.runtime.plan import Case, Embed, Extent, Launch, Linear, Program, RowNorm

KEPT_COLUMNS, KEPT_ROWS = 256, 32  # a turn of a program moves


def embed_program(spec: Embed, operands: Operands) -> tuple[Program, tuple[KernelRequest, ...]]:
    """One program a token gathers, adds positions, scales and normalises."""
    width = operands["w.table" if spec.table else "w.positions_table"].shape[1]
    arguments = Arguments(operands)
    arguments.bind(*["step.tokens", "w.table"] * spec.table)
    positions = spec.position_offset is not None
    if positions:
        arguments.bind("step.positions", "w.positions_table")
    norm = spec.norm
    if norm and norm.weight:
        arguments.bind("w.norm_weight")
    if norm and norm.bias:
        arguments.bind("w.norm_bias")
    arguments.bind("out.y")
    numbers: dict[str, float] = {
        "D": width,
        "BLOCK": next_power_of_2(width),
        "Y_STRIDE": operands["out.y"].stride,
        "SCALE": spec.scale,
    }
    if spec.position_offset is not None:
        numbers["OFFSET"] = spec.position_offset
    if norm:
        numbers["EPS"] = norm.eps
    structure = {
        "positions": positions if spec.table else "alone",
        "norm": norm.kind if norm else "",
        "norm_weight": bool(norm and norm.weight),
        "norm_bias": bool(norm and norm.bias),
    }
    request = kernel_request(
        "embed", numbers, arguments.params, structure=structure, num_warps=_warps(width), num_stages=1
    )
    launch = Launch("kernel", request.name, arguments.args, (Extent(1, "T"),))
    return Program((Case(1, 0, (launch,)),)), (request,)


def row_norm_program(spec: RowNorm, operands: Operands, width: int) -> tuple[Program, tuple[KernelRequest, ...]]:
    """One program a row, or a row's group."""
    request, launch = row_norm_launch(spec, operands, width // spec.groups, out="out.y")
    return Program((Case(1, 0, (launch,)),)), (request,)


def row_norm_launch(
    spec: RowNorm | Linear, operands: Operands, width: int, out: str = "scratch.rows", quantized: str = ""
) -> tuple[KernelRequest, Launch]:
    """y = norm(post_norm(x) + add), also storing the sum: a RowNorm, or the prologue of a linear on its own.

    quantized: "token" or "tensor" where rows are rounded to int8 (plan.Quantization); scratch.scales [rows] float32
               then takes the scale of each row, if w.input_scale does not hold that of all
    """
    post = spec.post_norm if isinstance(spec, Linear) else None
    store = isinstance(spec, Linear) and spec.store
    arguments = Arguments(operands)
    arguments.bind("in.x")
    numbers: dict[str, float] = {"K": width, "BLOCK": next_power_of_2(width), "X_STRIDE": operands["in.x"].stride}
    if spec.add:
        arguments.bind("in.add")
        numbers["ADD_STRIDE"] = operands["in.add"].stride
    for norm, prefix, eps in ((post, "post_", "POST_EPS"), (spec.norm, "", "EPS")):
        if norm:
            numbers[eps] = norm.eps
            arguments.bind(*[f"w.{prefix}norm_weight"] * norm.weight, *[f"w.{prefix}norm_bias"] * norm.bias)
    if store:
        arguments.bind("out.sum")
        numbers["SUM_STRIDE"] = operands["out.sum"].stride
    rows = spec.rows if isinstance(spec, Linear) else "T"
    if quantized == "tensor":
        arguments.bind("w.input_scale")
    elif quantized:
        arguments.bind_memory("scratch.scales", "float32")
    if out.startswith("scratch."):
        arguments.bind_memory(out, "int8" if quantized else operands["in.x"].dtype)
        numbers["Y_STRIDE"] = width
    else:
        arguments.bind(out)
        numbers["Y_STRIDE"] = operands[out].stride
    params = tuple(replace(p, name="y_ptr") if p.name == "rows_ptr" else p for p in arguments.params)
    norms = [
        (n.kind if n else "", prefix, eps, bool(n and n.weight), bool(n and n.bias))
        for n, prefix, eps in ((post, "post_", "POST_EPS"), (spec.norm, "", "EPS"))
    ]
    structure: dict[str, Any] = {"norms": norms, "add": spec.add, "store": store}
    if quantized:
        structure["quantized"] = quantized
    groups = spec.groups if isinstance(spec, RowNorm) else 1
    if groups > 1:
        structure["groups"] = True
    request = kernel_request("row_norm", numbers, params, structure=structure, num_warps=_warps(width), num_stages=1)
    return request, Launch("kernel", request.name, arguments.args, (Extent(1, rows), *[Extent(groups)] * (groups > 1)))


def keep_rows_program(operands: Operands) -> tuple[Program, tuple[KernelRequest, ...]]:
    """A launch for each matrix: few columns of all rows a program."""
    launches, requests = [], []
    for role, operand in operands.items():
        arguments = Arguments(operands)
        arguments.bind(role, "step.logit_rows", "R")
        x, *others = arguments.params
        numbers = {"WIDTH": operand.shape[-1], "STRIDE": operand.stride, "COLUMNS": KEPT_COLUMNS, "ROWS": KEPT_ROWS}
        params = (replace(x, name="x_ptr"), *others)
        requests.append(kernel_request("keep_rows", numbers, params, num_warps=8, num_stages=1))
        grid = (Extent(ceil_div(operand.shape[-1], KEPT_COLUMNS)),)
        launches.append(Launch("kernel", requests[-1].name, arguments.args, grid))
    return Program((Case(1, 0, tuple(launches)),)), tuple(requests)


def _warps(width: int) -> int:
    return 4 if width <= 4096 else 8
