"""The linears and attentions of three models' decode steps, as the compiler packs them."""

from __future__ import annotations

from dscompile.codegen.linear_kernels import has_row_sum
from dscompile.codegen.operands import Operand, Operands
from dscompile.runtime.plan import Attention, Linear, Norm, Segment

RMS, LAYER = Norm("rms", 1e-5), Norm("layer", 1e-5)


def _linear(n: int, k: int, *segments: Segment, **options) -> Linear:
    return Linear(k, n, segments or (Segment(0, n),), **options)


LINEARS: dict[str, tuple[str, dict[str, Linear]]] = {
    "llama3-8b": (
        "bfloat16",
        {
            "attn_in": _linear(6144, 4096, Segment(0, 4096), Segment(4096, 5120), Segment(5120, 6144), norm=RMS),
            "attn_out": _linear(4096, 4096, residuals=1),
            "mlp_in": _linear(28672, 4096, Segment(0, 28672, "silu", gated=True), norm=RMS),
            "mlp_out": _linear(4096, 14336, residuals=1),
            "head": _linear(128256, 4096, norm=RMS, rows="R"),
        },
    ),
    "gptj-6b": (
        "float16",
        {
            "attn_in": _linear(
                28672,
                4096,
                *(Segment(i, i + 4096) for i in (0, 4096, 8192)),
                Segment(12288, 28672, "gelu_tanh"),
                norm=LAYER,
                bias=True,
            ),
            "attn_out": _linear(4096, 20480, bias=True, residuals=1),
            "head": _linear(50400, 4096, norm=LAYER, bias=True, rows="R"),
        },
    ),
    "bloom-7b1": (
        "float16",
        {
            "attn_in": _linear(12288, 4096, *(Segment(i, i + 4096) for i in (0, 4096, 8192)), norm=LAYER, bias=True),
            "attn_out": _linear(4096, 4096, bias=True, residuals=1),
            "mlp_in": _linear(16384, 4096, Segment(0, 16384, "gelu_tanh"), norm=LAYER, bias=True),
            "mlp_out": _linear(4096, 16384, bias=True, residuals=1),
            "head": _linear(250880, 4096, norm=LAYER, rows="R"),
        },
    ),
}

ATTENTIONS: dict[str, tuple[str, Attention]] = {
    "llama3-8b": ("bfloat16", Attention(32, 8, 128, 128, 128**-0.5, 0, 0, rotary_dim=128)),
    "gptj-6b": ("float16", Attention(16, 16, 256, 256, 256**-0.5, 0, 0, rotary_dim=64)),
    "bloom-7b1": ("float16", Attention(32, 32, 128, 128, 128**-0.5, 0, 0, alibi=True)),
}


def linear_operands(spec: Linear, dtype: str) -> Operands:
    """Operands of a linear as dense matrices."""
    n, k = spec.out_features, spec.in_features
    operands = {"in.x": Operand(dtype, k, (0, k)), "w.weight": Operand(dtype, k, (n, k))}
    if spec.quantization:
        operands |= {"w.weight": Operand("int8", k, (n, k)), "w.weight_scale": Operand("float32", 1, (n,))}
    if spec.bias:
        operands["w.bias"] = Operand(dtype, 1, (n,))
    if has_row_sum(spec):
        operands["w.row_sum"] = Operand("float32", 1, (n,))
    for i in range(spec.residuals):
        operands[f"in.residual{i}"] = Operand(dtype, spec.segments[0].width, (0, spec.segments[0].width))
    for i, s in enumerate(spec.segments):
        operands[f"out.y{i}"] = Operand("float32" if spec.rows == "R" else dtype, s.width, (0, s.width))
    return operands


def attention_operands(spec: Attention, dtype: str, max_seq_len: int) -> Operands:
    """Operands of an attention as dense matrices."""
    widths = {
        "in.q": spec.num_heads * spec.head_dim,
        "in.k": spec.num_kv_heads * spec.head_dim,
        "in.v": spec.num_kv_heads * spec.v_head_dim,
        "out.y": spec.num_heads * spec.v_head_dim,
    }
    operands = {role: Operand(dtype, width, (0, width)) for role, width in widths.items()}
    if spec.rotary_dim:
        half = spec.rotary_dim // 2
        operands |= {f"w.rope_{f}": Operand("float32", half, (max_seq_len, half)) for f in ("cos", "sin")}
    if spec.alibi:
        operands["w.alibi_slopes"] = Operand("float32", 1, (spec.num_heads,))
    return operands
