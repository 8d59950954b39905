"""What surrounds a library's GEMM: the products that do an epilogue themselves, and the kernel that does it else."""

from __future__ import annotations

from dataclasses import replace

from dscompile.codegen.emit import KernelRequest, kernel_request
from dscompile.codegen.memory import ITEM_SIZE
from dscompile.codegen.operands import Arguments, Operands, ceil_div, next_power_of_2
from dscompile.runtime.plan import Extent, Launch, Linear, Segment
from dscompile.runtime.products import PRODUCTS, Product

LEAST_ROWS = 2048  # a product of fewer weight rows does not occupy the multiprocessors


def whole_products(spec: Linear, operands: Operands) -> list[Product]:
    """The library's products that do all of the segments' epilogues; none where it knows no such products."""
    if spec.softcap or spec.scale != 1.0 or spec.residuals > 1 or any(s.gated for s in spec.segments):
        return []
    if len(spec.segments) > 1 and any(s.width < LEAST_ROWS for s in spec.segments):
        return []
    products = [Product(spec.bias, s.activation, spec.residuals == 1) for s in spec.segments]
    return products if all(_is_known(p, i, operands) for i, p in enumerate(products)) else []


def _is_known(product: Product, index: int, operands: Operands) -> bool:
    """Whether the library has the product; what it does more than multiply, it does 16 bytes at a time."""
    if product == Product():
        return True
    dtype = operands["in.x"].dtype
    stored = [operands[role] for role in (f"out.y{index}", *["in.residual0"] * product.residual)]
    alike = all(o.dtype == dtype and o.aligned and o.stride * ITEM_SIZE[dtype] % 16 == 0 for o in stored)
    return alike and product.name in PRODUCTS


def product_launch(spec: Linear, index: int, product: Product, x: str) -> Launch:
    """Launch the product of one segment over the rows x."""
    more = ("w.bias",) * product.bias + ("in.residual0",) * product.residual
    segment = spec.segments[index]
    rows = (segment.start, segment.stop) if len(spec.segments) > 1 else None
    return Launch("library", product.name, (x, "w.weight", f"out.y{index}", spec.rows, *more), rows=rows)


def epilogue_launch(spec: Linear, segment: Segment, index: int, operands: Operands) -> tuple[KernelRequest, Launch]:
    """Launch what one segment does with its part of scratch.product."""
    block = min(2048, next_power_of_2(segment.width))
    residuals = spec.residuals if index == 0 else 0
    arguments = Arguments(operands)
    arguments.bind_memory("scratch.product", operands["in.x"].dtype)
    if spec.bias:
        arguments.bind("w.bias")
    if segment.activation == "xielu":
        arguments.bind("w.alpha")
    arguments.bind(*(f"in.residual{i}" for i in range(residuals)), f"out.y{index}")
    params = tuple(replace(p, name="y_ptr") if p.name == f"y{index}_ptr" else p for p in arguments.params)
    numbers: dict[str, float] = {"N": spec.out_features, "START": segment.start, "WIDTH": segment.width, "BLOCK": block}
    numbers |= {"Y_STRIDE": operands[f"out.y{index}"].stride, "SCALE": spec.scale, "SOFTCAP": spec.softcap}
    structure = {
        "helpers": sorted({segment.activation} | ({"softcap"} if spec.softcap else set())),
        "bias": spec.bias,
        "gated": segment.gated,
        "activation": segment.activation,
        "residual_strides": [operands[f"in.residual{i}"].stride for i in range(residuals)],
    }
    request = kernel_request("epilogue", numbers, params, structure=structure, num_warps=4, num_stages=1)
    grid = (Extent(1, "T"), Extent(ceil_div(segment.width, block)))
    return request, Launch("kernel", request.name, arguments.args, grid)
