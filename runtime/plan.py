"""The plan: every step of one model pass as plain data, written by the compiler and interpreted by the runtime.

Symbols. T: tokens in the step, summed over its sequences. B: sequences in the step. R: rows of logits asked for.
Every activation is a matrix [T or R, cols], row-major; a `Ref` names a range of its columns.
A `Step` says *what* is computed (its `spec`, executed on the CPU by `runtime.ops`) and a `Program` says *how* on a
GPU: a list of launches for each range of T and, in decoding, of contexts. Layers of one class share their programs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Symbol = Literal["1", "T", "B", "R"]
Activation = Literal[
    "none", "relu", "relu2", "silu", "gelu", "gelu_tanh", "gelu_quick", "tanh", "sigmoid", "softplus", "xielu"
]


# ---------------------------------------------------------------- what a step computes


@dataclass(frozen=True)
class Norm:
    """Normalise each row (or each head's slice of it) in float32.

    rms:    x * rsqrt(mean(x^2) + eps)              (Zhang & Sennrich 2019)
    layer:  (x - mean(x)) * rsqrt(var(x) + eps)     (Ba et al. 2016; biased variance)
    then `* weight` and `+ bias`, each only where the flag says so. Flags are off where the pass `fold_norm` moved
    them into the linear that follows.
    """

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Embed:
    """y[T, D] = norm((table[token] + positions_table[position + offset]) * scale)

    table: False for a look-up of positions alone, which is added later
    in:      nothing (tokens and positions belong to the step)
    weights: table [V, D] if `table`; positions_table [P, D] if position_offset is not None; norm_weight, norm_bias [D]
    out:     y
    """

    scale: float = 1.0
    position_offset: int | None = None
    norm: Norm | None = None
    table: bool = True


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a packed weight and what is done with their part of the product.

    gated: the rows are a gate half followed by an up half; y = activation(gate) * up, half as wide.
    Otherwise y = activation(product).
    """

    start: int
    stop: int
    activation: Activation = "none"
    gated: bool = False

    @property
    def width(self) -> int:
        return (self.stop - self.start) // (2 if self.gated else 1)


@dataclass(frozen=True)
class Quantization:
    """How a linear computes in int8. Its weight is q [N, K] int8 in [-127, 127] times weight_scale [N].

    activations "none":  p = (v @ q.T) * weight_scale + bias
    activations "token": each row of v is quantized too, s = max|v| / 127 (1 for a row of zeros), r = v / s rounded half
                         to even; p = (r @ q.T) * s * weight_scale + bias, the product in int32
    activations "tensor": the same with one s, input_scale, for all rows; r is clamped to [-127, 127]
    """

    activations: Literal["none", "token", "tensor"] = "none"


@dataclass(frozen=True)
class Linear:
    """One packed GEMM with its prologue and epilogue; every linear of a model is one of these.

    prologue, per row:  v = x;  v = post_norm(v);  v = v + add;  store v to `sum`;  v = norm(v)     (each if present)
    product:            p = v @ weight.T + bias
    epilogue, segment i: y_i = softcap(act(p_i)) * scale + residual_0 + residual_1 ...
                        softcap(z) = cap * tanh(z / cap)

    rows "R": the output is [R, ...] (the head, behind a KeepRows).
    in:      x [T, K]; add [T, K] if `add`; residual0.. [T, width] (one segment only, never with rows "R")
    weights: weight [N, K]; bias [N] if `bias`; norm_weight, norm_bias, post_norm_weight, post_norm_bias [K];
             row_sum [N] float32 = sum over K of the stored weight, present exactly when norm.kind == "layer", the norm
             has no weight of its own and nothing is quantized, so that a kernel may normalise after the product;
             alpha [4] float32 if `has_alpha`: what its layer learned for xielu, see runtime.ops_linear;
             weight_scale [N] float32 if `quantization`, and then weight is int8;
             input_scale [1] float32 if quantization.activations == "tensor"
    out:     y0 .. yn, one per segment [T or R, width]; sum [T, K] if `store`
    """

    in_features: int
    out_features: int
    segments: tuple[Segment, ...]
    bias: bool = False
    norm: Norm | None = None
    post_norm: Norm | None = None
    add: bool = False
    store: bool = False
    residuals: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    rows: Literal["T", "R"] = "T"
    quantization: Quantization | None = None

    @property
    def has_alpha(self) -> bool:
        """Whether a segment's activation has numbers that the layer learned."""
        return any(s.activation == "xielu" for s in self.segments)


@dataclass(frozen=True)
class Attention:
    """Rotate q and k, append k and v to the paged cache, attend.

    q [T, num_heads * head_dim], k [T, num_kv_heads * head_dim], v [T, num_kv_heads * v_head_dim], head-major.
    Optional q_norm and k_norm come first: per head over head_dim, or over the whole row if `norm_across_heads`. Heads
    share the weights of their norm [head_dim] unless `norm_by_head`; by head and across heads they have their own.
    v_norm: of each head of v over v_head_dim, before v is appended; heads share its weights [v_head_dim].
    weigh_rotated: the norms' weights multiply after the rotation; then the norms are rms and have no bias.
    Rotary embedding acts on the first `rotary_dim` columns of each head, in the half-split layout
    (y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, halves of the rotated part; Su et al. 2021); models that interleave
    have had their q and k rows permuted by the compiler.
    score(i, j) = softcap(scale * q_i . k_j) + alibi_slope[head] * (j - i), j and i positions in the sequence.
    Key j is visible to query i if (not causal or j <= i) and (window == 0 or j > i - window and (causal or
    j < i + window)) and (chunk == 0 or j // chunk == i // chunk).
    sinks: a logit per head that joins the softmax's denominator and has no value.

    gate: the output is multiplied by a number for each head or for each of its columns, which comes as it is.
    appends: False where k and v are those of an earlier step: this one reads them at that step's place in the cache, of
    which `group` and `index` are the numbers, appends nothing and has neither k_norm nor v_norm.

    in:      q; k and v if `appends`; gate [T, num_heads] of heads, [T, num_heads * v_head_dim] of columns
    weights: rope_cos, rope_sin [max_seq_len, rotary_dim / 2] float32 if rotary_dim; alibi_slopes [num_heads] float32;
             sinks [num_heads] float32; q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, v_norm_weight,
             v_norm_bias
    out:     y [T, num_heads * v_head_dim]
    group, index: the KV group, and this layer's place in the group's blocks. A layer that is not causal sees keys of
    its own step only, so all such layers share the first place.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    group: int
    index: int
    causal: bool = True
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    rotary_dim: int = 0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_across_heads: bool = False
    norm_by_head: bool = False
    weigh_rotated: bool = False
    gate: Literal["none", "head", "column"] = "none"
    alibi: bool = False
    sinks: bool = False
    v_norm: Norm | None = None
    appends: bool = True


@dataclass(frozen=True)
class Router:
    """Which experts serve a token and with which weights, from its logits l [num_experts].

    s = score(l);  c = s + correction if `correction`, else s
    If num_groups > 1 the experts form that many groups of equal size, and only those of the top_groups groups whose
    group_top largest c have the largest sum can be chosen (DeepSeek-AI 2024).
    The top_k experts of largest c serve the token. Their weights are s * scale, s divided by its sum over the chosen
    first if `normalize`.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "none"]
    normalize: bool
    scale: float = 1.0
    correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 1


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: y = sum over the chosen e of w_e * expert_e(x), + residual_0 + residual_1 ...

    expert_e(x) = down_e (act(min(g, limit)) * (clamp(u, -limit, limit) + shift)) [+ down_bias_e]
    [g | u] = gate_up_e x [+ gate_up_bias_e];  limit 0: none
    scale_input: expert_e(w_e * x) instead of w_e * expert_e(x)
    factor: residual_0 is multiplied by a number for each row first

    in:      x [T, K]; logits [T, num_experts]; residual0.. [T, K]; factor [T, 1] if `factor`
    weights: gate_up [num_experts, 2 F, K], gate rows first; down [num_experts, K, F];
             gate_up_bias [num_experts, 2 F] and down_bias [num_experts, K] if `bias`;
             correction [num_experts] float32 if the router has one
    out:     y [T, K]
    """

    in_features: int
    hidden_features: int
    router: Router
    activation: Activation
    limit: float = 0.0
    shift: float = 0.0
    bias: bool = False
    scale_input: bool = False
    residuals: int = 0
    factor: bool = False


@dataclass(frozen=True)
class RowNorm:
    """A norm that no linear could take in: y = norm(x [+ add]). in: x, add; weights: norm_weight, norm_bias; out: y.

    groups: equal ranges of columns, each normalised by itself; they share the weights.
    """

    norm: Norm
    add: bool = False
    groups: int = 1


@dataclass(frozen=True)
class KeepRows:
    """Keep only the rows of logits: row logit_rows[r] of every input becomes row r, in place, and T is R from here on.

    Every plan that ends in a head has one, behind its last Attention and Embed: what follows treats each row alone.
    Where a step asks for every row (T == R) it does nothing.
    in: x0.. [T, any], all that a later step reads; out: nothing
    """


@dataclass(frozen=True)
class Aten:
    """A node outside the vocabulary, executed by torch: the ATen overload `target`, from an allow-list.

    args, kwargs: JSON values; a string "in.x3" stands for an input, "w.x1" for a weight.
    out: y
    """

    target: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Choose a token for each row of logits [R, V] float32. in: logits. Tokens belong to the step, not to a buffer."""


Spec = Embed | Linear | Attention | Moe | RowNorm | KeepRows | Aten | Sample


# ---------------------------------------------------------------- where it is computed


@dataclass(frozen=True)
class Buffer:
    """An activation [rows, cols]. Its bytes start at rows * offset of the arena that belongs to its row symbol.

    Offsets are bytes per row and multiples of 256, so one layout serves every T with every buffer aligned.
    """

    name: str
    rows: Literal["T", "R"]
    cols: int
    dtype: str
    offset: int = 0


@dataclass(frozen=True)
class Ref:
    """Columns [start, stop) of a buffer."""

    buffer: str
    start: int
    stop: int


@dataclass(frozen=True)
class Step:
    """One region of the fused graph with the buffers and weights its roles are bound to."""

    name: str
    spec: Spec
    regions: tuple[str, ...]
    layer: int | None = None
    inputs: dict[str, Ref] = field(default_factory=dict)
    outputs: dict[str, Ref] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    program: str = ""


# ---------------------------------------------------------------- how a GPU computes it


@dataclass(frozen=True)
class Extent:
    """A grid dimension: factor * ceil(symbol / divisor) + plus * B + constant ("1" counts one).

    plus bounds the tiles that sequences break off, constant those of a number of things that the compiler knows.
    """

    factor: int = 1
    symbol: Symbol = "1"
    divisor: int = 1
    plus: int = 0
    constant: int = 0


@dataclass(frozen=True)
class Launch:
    """kernel: a cubin of the kernel table. library: one of runtime.products.PRODUCTS, a GEMM with what follows it.

    args name what is passed, in the order of the kernel's parameters:
      in.ROLE out.ROLE w.ROLE   a bound activation (address of its first column) or weight
      scratch.NAME              scratch memory of the program
      kv                        this layer's part of block 0 in the pool of the step's KV group (pool base + index *
                                bytes of one layer in a block), so that layers of one class share a kernel
      step.NAME                 tokens positions seq_starts context_lens logit_rows block_table slots (int32), and what
                                sampling and advancing keep on the device or write for the host (see cuda_state)
      T B R                     sizes, int32;  blocks: row stride of step.block_table, int32
    descriptors: the scratch memory in which each program of the kernel builds its tensor descriptors, if it does
    rows: of the weight, and of the bias, that a library's product takes; None: all.
    """

    kind: Literal["kernel", "library"]
    target: str
    args: tuple[str, ...]
    grid: tuple[Extent, ...] = ()
    descriptors: str = ""
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Case:
    """Launches for min_tokens <= T <= max_tokens (0: no bound).

    decode: every sequence of the step has one token.
    max_context: no sequence has more tokens, this step's included (0: no bound).
    """

    min_tokens: int
    max_tokens: int
    launches: tuple[Launch, ...]
    decode: bool | None = None
    max_context: int = 0


@dataclass(frozen=True)
class Scratch:
    """Memory a program needs while it runs: bytes * rows(symbol); if `zeroed`, zeroed at load (kernels restore it)."""

    name: str
    symbol: Symbol
    bytes: int
    zeroed: bool = False


@dataclass(frozen=True)
class Program:
    """The launches of a step, by its sizes; the first case that fits is taken."""

    cases: tuple[Case, ...]
    scratch: tuple[Scratch, ...] = ()


@dataclass(frozen=True)
class Cubin:
    """One kernel compiled for one GPU architecture."""

    file: str
    symbol: str
    shared: int
    num_warps: int
    registers: int
    spills: int
    pdl: bool = False
    num_ctas: int = 1


@dataclass(frozen=True)
class Kernel:
    """A generated kernel: its readable source, its parameter types in order, and a cubin per target ("sm_90")."""

    source: str
    template: str
    params: tuple[str, ...]
    cubins: dict[str, Cubin] = field(default_factory=dict)


@dataclass(frozen=True)
class KVGroup:
    """Layers whose cache has one shape and one visibility rule, and so one block table.

    A block holds `page_size` tokens of every layer of the group: [layers, K [num_kv_heads, page_size, head_dim] then
    V [num_kv_heads, page_size, v_head_dim]], contiguous.

    dtype "int8": each token's rotated k and its v are quantized per head as by runtime.int8.quantize_rows, and
    attention reads q * scale, of the step's own tokens too. A layer's part of a block
    then ends in the scales, float32: K's [num_kv_heads, page_size], V's [num_kv_heads, page_size]; page_size is a
    multiple of 4, and head_dim and v_head_dim are even.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    window: int = 0
    chunk: int = 0


@dataclass(frozen=True)
class Weight:
    """A weight as stored. init says how to make it when the artifact holds none: "normal:STD", "ones", "zeros",
    "fill:VALUE", "int8" (each of -127..127 alike), "row_sum:NAME" (float32 sums over the columns of another weight), or
    "" (always stored)."""

    shape: tuple[int, ...]
    dtype: str
    init: str = ""


@dataclass(frozen=True)
class Plan:
    """A model, compiled. `limits` bound what a step may ask for; `page_size` is the tokens of a KV block.

    hidden: of an encoder, which has no sample step: the last hidden states [T, D], its output.
    """

    vocab_size: int
    max_seq_len: int
    max_batch: int
    max_step_tokens: int
    page_size: int
    steps: tuple[Step, ...]
    buffers: dict[str, Buffer]
    weights: dict[str, Weight]
    kv_groups: tuple[KVGroup, ...]
    programs: dict[str, Program] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    hidden: Ref | None = None

    @property
    def is_encoder(self) -> bool:
        """Whether tokens see the whole of their sequence, so that a step computes whole sequences and nothing is
        kept for the next."""
        return self.hidden is not None

    @property
    def output_width(self) -> int:
        """Columns of what a step returns for a token: the vocabulary, or an encoder's hidden state."""
        return self.vocab_size if self.hidden is None else self.hidden.stop - self.hidden.start
