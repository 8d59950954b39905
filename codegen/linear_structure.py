"""What every template of a packed linear is told: its segments, its numbers, its arguments."""

from __future__ import annotations

from dscompile.codegen.operands import Arguments, Operands, ceil_div
from dscompile.runtime.plan import Linear, Norm, Segment


def segment_tiles(segments: tuple[Segment, ...], block: int) -> list[dict]:
    """Where each segment's programs begin and end, `block` rows of the packed weight a program."""
    tiles, first = [], 0
    for i, s in enumerate(segments):
        count = ceil_div(s.width, block // 2) if s.gated else ceil_div(s.width, block)
        tiles.append(
            {"index": i, "start": s.start, "width": s.width, "gated": s.gated, "activation": s.activation}
            | {"first": first, "end": first + count}
        )
        first += count
    return tiles


def structure_of(spec: Linear, operands: Operands, block: int, two_pass: bool) -> dict:
    segments = segment_tiles(spec.segments, block)
    for s in segments:
        s["stride"] = operands[f"out.y{s['index']}"].stride
    gated = sum(s.gated for s in spec.segments)
    norm, post = spec.norm, spec.post_norm
    helpers = {s.activation for s in spec.segments} | ({"softcap"} if spec.softcap else set())
    return {
        "segments": segments,
        "gating": "none" if not gated else "all" if gated == len(spec.segments) else "some",
        "uniform": not gated and all(s["start"] == s["first"] * block for s in segments),
        "full_n": all(s.width % (block // 2 if s.gated else block) == 0 for s in spec.segments),
        "helpers": sorted(helpers),
        "bias": spec.bias,
        "add": spec.add,
        "store": spec.store,
        "rows": spec.rows,
        "residual_strides": [operands[f"in.residual{i}"].stride for i in range(spec.residuals)],
        "two_pass": two_pass,
        **_norm_structure(norm, ""),
        **_norm_structure(post, "post_"),
        **({"quantized": spec.quantization.activations} if spec.quantization else {}),
    }


def _norm_structure(norm: Norm | None, prefix: str) -> dict:
    return {
        f"{prefix}norm": norm.kind if norm else "",
        f"{prefix}norm_weight": bool(norm and norm.weight),
        f"{prefix}norm_bias": bool(norm and norm.bias),
    }


def has_row_sum(spec: Linear) -> bool:
    """Whether the plan holds the weight's row sums, with which a layer norm can be applied to the product."""
    norm = spec.norm
    return norm is not None and norm.kind == "layer" and not norm.weight and spec.quantization is None


def numbers_of(spec: Linear, operands: Operands) -> dict:
    numbers = {
        "N": spec.out_features,
        "K": spec.in_features,
        "X_STRIDE": operands["in.x"].stride,
        "W_STRIDE": operands["w.weight"].stride,
        "SCALE": spec.scale,
        "SOFTCAP": spec.softcap,
    }
    if spec.norm:
        numbers["EPS"] = spec.norm.eps
    if spec.post_norm:
        numbers["POST_EPS"] = spec.post_norm.eps
    return numbers


def arguments_of(spec: Linear, operands: Operands, folded_norm: bool) -> Arguments:
    arguments = Arguments(operands)
    arguments.bind("in.x", "w.weight")
    if spec.quantization:
        arguments.bind("w.weight_scale")
    for present, role in (
        (spec.add, "in.add"),
        (spec.bias, "w.bias"),
        (spec.has_alpha, "w.alpha"),
        (spec.norm and spec.norm.weight, "w.norm_weight"),
        (spec.norm and spec.norm.bias, "w.norm_bias"),
        (spec.post_norm and spec.post_norm.weight, "w.post_norm_weight"),
        (spec.post_norm and spec.post_norm.bias, "w.post_norm_bias"),
        (spec.norm and spec.norm.kind == "layer" and folded_norm, "w.row_sum"),
        (spec.store, "out.sum"),
    ):
        if present:
            arguments.bind(role)
    arguments.bind(*(f"in.residual{i}" for i in range(spec.residuals)))
    arguments.bind(*(f"out.y{i}" for i in range(len(spec.segments))))
    return arguments


def bind_input_scale(spec: Linear, arguments: Arguments) -> None:
    """Add what one step of the rounded rows is worth: a stored number, or one of each row."""
    if spec.quantization and spec.quantization.activations == "tensor":
        arguments.bind("w.input_scale")
    else:
        arguments.bind_memory("scratch.scales", "float32")
