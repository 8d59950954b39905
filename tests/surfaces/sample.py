"""Reports to render: a Llama-like model with everything in it, and the least a report can hold."""

from __future__ import annotations

from dscompile.runtime.report import (
    Check,
    Fallback,
    LayerClass,
    NearMiss,
    Node,
    Region,
    Report,
    Verification,
)

RANGES = ("1", "2-4", "5-16", "17-64", "65+")


def full_report() -> Report:
    """A GPT-J-like class (packed parallel block), a Llama-like class, near misses, times, a fallback."""
    return Report(
        classes=(_llama_class(), _parallel_class(), _outside()),
        fallbacks=(Fallback("clamp_3", "aten.clamp.default", "no rule takes a clamp outside a mixture of experts"),),
        verification=Verification(
            status="passed",
            model="the model itself",
            against="transformers 5.17.0 eager, float32",
            device="NVIDIA H200",
            kernels="executed",
            checks=(
                Check("prefill, 3 ragged prompts", 6.1e-4, 9.2e-4),
                Check("decode, 40 tokens", 7.4e-4, 9.3e-4),
                Check("decode past the window", 1.2e-4, 9.3e-4),
            ),
            note="limit: 1.5 times the error of float16 eager",
        ),
        quantization={},
        model={"name": "sample-7b", "architecture": "LlamaForCausalLM", "dtype": "float16", "target": "sm_90"},
    )


def least_report() -> Report:
    """No layer class has a kernel, nothing was verified."""
    region = Region("embed", "embed", (Node("embed_tokens", "embedding", "[1, T, 8]"),), step="embed")
    return Report(classes=(LayerClass(1, (), (region,)),))


def _llama_class() -> LayerClass:
    return LayerClass(
        count=28,
        layers=tuple(range(0, 28)),
        regions=(
            Region(
                "attn_in",
                "norm_into_linear + pack_linears",
                (
                    Node("input_layernorm", "rms_norm", "[1, T, 4096]"),
                    Node("q_proj", "linear", "[1, T, 4096]"),
                    Node("k_proj", "linear", "[1, T, 1024]"),
                    Node("v_proj", "linear", "[1, T, 1024]"),
                ),
                _kernels("linear_qkv_4096x6144"),
                ("h",),
                ("q", "k", "v"),
                bytes_saved=49152,
                time_us={"1": 13.2},
                step="qkv",
            ),
            Region(
                "attention",
                "rope_into_attention",
                (
                    Node("apply_rotary", "rope", "[1, T, 4096]"),
                    Node("apply_rotary_1", "rope", "[1, T, 1024]"),
                    Node("cache_append", "kv_append", "[1, T, 2048]"),
                    Node("attention", "attention", "[1, T, 4096]"),
                ),
                {r: ("attention_decode",) if r == "1" else ("rope_append", "attention_paged") for r in RANGES},
                ("q", "k", "v"),
                ("attn",),
                bytes_saved=20480,
                time_us={"1": 6.1},
                step="attention",
            ),
            Region(
                "attn_out",
                "residual_into_linear",
                (Node("o_proj", "linear", "[1, T, 4096]"), Node("add", "add", "[1, T, 4096]")),
                _kernels("linear_residual_4096x4096"),
                ("attn", "h"),
                ("h1",),
                bytes_saved=16384,
                time_us={"1": 9.0},
                step="o",
            ),
            Region(
                "mlp_in",
                "norm_into_linear + gate_up",
                (
                    Node("post_attention_layernorm", "rms_norm", "[1, T, 4096]"),
                    Node("gate_proj", "linear", "[1, T, 14336]"),
                    Node("up_proj", "linear", "[1, T, 14336]"),
                    Node("silu", "silu", "[1, T, 14336]"),
                    Node("mul", "mul", "[1, T, 14336]"),
                ),
                _kernels("linear_gated_4096x28672"),
                ("h1",),
                ("act",),
                bytes_saved=180224,
                time_us={"1": 55.4},
                step="gate_up",
            ),
            Region(
                "mlp_out",
                "residual_into_linear",
                (Node("down_proj", "linear", "[1, T, 4096]"), Node("add_1", "add", "[1, T, 4096]")),
                _kernels("linear_residual_14336x4096"),
                ("act", "h1"),
                ("h2",),
                bytes_saved=16384,
                time_us={"1": 28.0},
                step="down",
            ),
        ),
        near_misses=(
            NearMiss("residual_into_norm", "add", "the sum is also read by add_1, so it has to be stored"),
            NearMiss("norm_weight_into_linear", "input_layernorm", "the weight is shared with another layer"),
        ),
    )


def _parallel_class() -> LayerClass:
    nodes = (
        Node("ln_1", "layer_norm", "[1, T, 4096]"),
        Node("q_proj", "linear", "[1, T, 4096]"),
        Node("k_proj", "linear", "[1, T, 4096]"),
        Node("v_proj", "linear", "[1, T, 4096]"),
        Node("fc_in", "linear", "[1, T, 16384]"),
        Node("gelu", "gelu_tanh", "[1, T, 16384]"),
    )
    packed = dict(
        rule="pack_linears",
        nodes=nodes,
        kernels=_kernels("linear_packed_4096x28672"),
        inputs=("h",),
        outputs=("q", "k", "v", "act"),
        bytes_saved=98304,
        step="in",
    )
    out = dict(
        rule="concat_linears",
        nodes=(
            Node("out_proj", "linear", "[1, T, 4096]"),
            Node("fc_out", "linear", "[1, T, 4096]"),
            Node("add", "add"),
        ),
        kernels=_kernels("linear_residual_20480x4096"),
        inputs=("attn", "act", "h"),
        outputs=("h1",),
        bytes_saved=49152,
        step="out",
    )
    return LayerClass(
        count=4,
        layers=(28, 29, 30, 31),
        regions=(
            Region("attn_in", **packed),
            Region("mlp_in", **packed),
            Region(
                "attention",
                "rope_into_attention",
                (Node("rope", "rope", "[1, T, 4096]"), Node("attention", "attention", "[1, T, 4096]")),
                _kernels("attention_decode"),
                ("q", "k", "v"),
                ("attn",),
                bytes_saved=32768,
                step="attention",
            ),
            Region("attn_out", **out),
            Region("mlp_out", **out),
        ),
    )


def _outside() -> LayerClass:
    return LayerClass(
        count=1,
        layers=(),
        regions=(
            Region(
                "embed", "embed", (Node("embed_tokens", "embedding", "[1, T, 4096]"),), _kernels("embed"), (), ("h",),
                step="embed", time_us={"1": 2.1},
            ),
            Region(
                "head",
                "norm_into_linear",
                (Node("norm", "rms_norm", "[1, R, 4096]"), Node("lm_head", "linear", "[1, R, 128256]")),
                _kernels("linear_head_4096x128256"), ("h2",), ("logits",), bytes_saved=16384, step="head",
                time_us={"1": 240.0},
            ),
            Region("sample", "sample", (), _kernels("sample_greedy"), ("logits",), ("tokens",), step="sample"),
        ),
    )  # fmt: skip


def _kernels(name: str) -> dict[str, tuple[str, ...]]:
    return {tokens: (f"{name}_{tokens.replace('-', '_').replace('+', '_up')}",) for tokens in RANGES}
