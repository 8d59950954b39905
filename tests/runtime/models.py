"""Tiny random models: a plan built by hand with its weights, and an independent dense oracle in float64."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from dscompile.runtime.plan import (
    Attention,
    Buffer,
    Embed,
    KeepRows,
    KVGroup,
    Linear,
    Norm,
    Plan,
    Ref,
    Sample,
    Segment,
    Step,
    Weight,
)


@dataclass(frozen=True)
class Shape:
    """What varies. kind "llama": RMS norms, rotary, gated MLP; "bloom": layer norms, biases, ALiBi. gate: attention's
    output is multiplied by the first columns of q, which serve as any would."""

    kind: str = "llama"
    layers: int = 2
    hidden: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    v_head_dim: int = 6
    rotary_dim: int = 6
    inner: int = 20
    vocab: int = 37
    windows: tuple[int, ...] = (0, 0)
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    causal: bool = True
    qk_norm: str = ""
    gate: str = "none"
    max_seq_len: int = 64
    max_batch: int = 4
    max_step_tokens: int = 64
    page_size: int = 4
    dtype: str = "float32"
    kv_dtype: str = ""

    @property
    def bloom(self) -> bool:
        return self.kind == "bloom"


@dataclass(frozen=True)
class Model:
    shape: Shape
    plan: Plan
    weights: dict[str, torch.Tensor]


def make_model(seed: int = 0, **options) -> Model:
    """A random model whose weights are large enough that every part of it matters to the logits."""
    shape = Shape(**options)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def normal(name: str, *size: int, mean: float = 0.0, std: float | None = None) -> str:
        std = size[-1] ** -0.5 if std is None else std
        value = torch.randn(size, generator=generator) * std + mean
        weights[name] = value.to(getattr(torch, shape.dtype))
        return name

    builder = _Builder(shape, normal, weights)
    steps = builder.steps()
    plan = Plan(
        vocab_size=shape.vocab,
        max_seq_len=shape.max_seq_len,
        max_batch=shape.max_batch,
        max_step_tokens=shape.max_step_tokens,
        page_size=shape.page_size,
        steps=tuple(steps),
        buffers=builder.buffers(),
        weights={n: Weight(tuple(w.shape), str(w.dtype).removeprefix("torch.")) for n, w in weights.items()},
        kv_groups=builder.groups(),
    )
    return Model(shape, plan, weights)


def make_encoder(**options) -> Model:
    """A model that sees whole sequences and ends in the row that its layers leave."""
    model = make_model(causal=False, **options)
    steps = tuple(
        dataclasses.replace(s, spec=dataclasses.replace(s.spec, index=0)) if isinstance(s.spec, Attention) else s
        for s in model.plan.steps[:-2]
        if not isinstance(s.spec, KeepRows)
    )
    used = {name for s in steps for name in s.weights.values()}
    plan = dataclasses.replace(
        model.plan,
        steps=steps,
        hidden=Ref("h", 0, model.shape.hidden),
        buffers={name: b for name, b in model.plan.buffers.items() if b.rows == "T"},
        weights={name: w for name, w in model.plan.weights.items() if name in used},
        kv_groups=tuple(dataclasses.replace(g, num_layers=1) for g in model.plan.kv_groups),
    )
    return dataclasses.replace(model, plan=plan, weights={n: w for n, w in model.weights.items() if n in used})


class _Builder:
    def __init__(self, shape: Shape, normal, weights) -> None:
        self.s, self.normal, self.weights = shape, normal, weights
        self.norm = Norm("layer", 1e-5, True, True) if shape.bloom else Norm("rms", 1e-6, True)
        self.q = shape.heads * shape.head_dim
        self.k = shape.kv_heads * shape.head_dim
        self.v = shape.kv_heads * shape.v_head_dim
        self.kinds = sorted(set(shape.windows))

    def groups(self) -> tuple[KVGroup, ...]:
        s = self.s
        return tuple(
            KVGroup(s.windows.count(w), s.kv_heads, s.head_dim, s.v_head_dim, s.kv_dtype or s.dtype, w, s.chunk)
            for w in self.kinds
        )

    def buffers(self) -> dict[str, Buffer]:
        s = self.s
        inner = s.inner
        widths = {
            "h": s.hidden,
            "qkv": self.q + self.k + self.v,
            "att": s.heads * s.v_head_dim,
            "h2": s.hidden,
            "up": inner,
        }
        buffers, offset = {}, 0
        for name, cols in widths.items():
            buffers[name] = Buffer(name, "T", cols, s.dtype, offset)
            offset += 512 * math.ceil(cols * getattr(torch, s.dtype).itemsize / 512)
        logits = "float64" if s.dtype == "float64" else "float32"
        return buffers | {"logits": Buffer("logits", "R", s.vocab, logits)}

    def norm_weights(self, name: str, width: int) -> dict[str, str]:
        found = {"norm_weight": self.normal(f"{name}.weight", width, mean=1.0, std=0.3)}
        if self.norm.bias:
            found["norm_bias"] = self.normal(f"{name}.bias", width, std=0.3)
        return found

    def linear(self, name: str, n: int, k: int, **options) -> tuple[Linear, dict[str, str]]:
        bound = {"weight": self.normal(f"{name}.weight", n, k)}
        if self.s.bloom and name != "head":
            bound["bias"] = self.normal(f"{name}.bias", n, std=0.5)
        segments = options.pop("segments", (Segment(0, n),))
        return Linear(k, n, segments, bias="bias" in bound, **options), bound

    def steps(self) -> list[Step]:
        s = self.s
        table = self.normal("embed", s.vocab, s.hidden, std=1.0)
        steps = [Step("embed", Embed(), ("embed",), None, {}, {"y": Ref("h", 0, s.hidden)}, {"table": table})]
        for layer in range(s.layers):
            steps += self.layer(layer)
        last = max(i for i, step in enumerate(steps) if isinstance(step.spec, Attention))
        kept = {"x0": Ref("att", 0, s.heads * s.v_head_dim), "x1": Ref("h", 0, s.hidden)}
        steps.insert(last + 1, Step("keep_rows", KeepRows(), ("keep_rows",), inputs=kept))
        head, bound = self.linear("head", s.vocab, s.hidden, norm=self.norm, rows="R")
        bound |= self.norm_weights("final", s.hidden)
        refs = {"x": Ref("h", 0, s.hidden)}, {"y0": Ref("logits", 0, s.vocab)}
        steps.append(Step("head", head, ("head",), None, *refs, bound))
        steps.append(Step("sample", Sample(), ("sample",), None, {"logits": Ref("logits", 0, s.vocab)}))
        return steps

    def layer(self, layer: int) -> list[Step]:
        s, name = self.s, f"layers.{layer}"
        q, k, v = self.q, self.k, self.v
        cuts = (Segment(0, q), Segment(q, q + k), Segment(q + k, q + k + v))
        h, h2 = Ref("h", 0, s.hidden), Ref("h2", 0, s.hidden)
        parts = [Ref("qkv", 0, q), Ref("qkv", q, q + k), Ref("qkv", q + k, q + k + v)]
        att = Ref("att", 0, s.heads * s.v_head_dim)
        up = Ref("up", 0, s.inner)
        qkv, qkv_w = self.linear(f"{name}.qkv", q + k + v, s.hidden, segments=cuts, norm=self.norm)
        qkv_w |= self.norm_weights(f"{name}.norm1", s.hidden)
        out, out_w = self.linear(f"{name}.out", s.hidden, s.heads * s.v_head_dim, residuals=1)
        if s.bloom:
            gate = (Segment(0, s.inner, "gelu_tanh"),)
        else:
            gate = (Segment(0, 2 * s.inner, "silu", True),)
        mlp, mlp_w = self.linear(f"{name}.up", gate[0].stop, s.hidden, segments=gate, norm=self.norm)
        mlp_w |= self.norm_weights(f"{name}.norm2", s.hidden)
        down, down_w = self.linear(f"{name}.down", s.hidden, s.inner, residuals=1)
        outs = {f"y{i}": p for i, p in enumerate(parts)}
        ins = dict(zip("qkv", parts, strict=True))
        if s.gate != "none":
            ins["gate"] = Ref("qkv", 0, s.heads * (s.v_head_dim if s.gate == "column" else 1))
        attention, attention_w = self.attention(layer)
        return [
            Step(f"{name}.qkv", qkv, ("attn_in",), layer, {"x": h}, outs, qkv_w),
            Step(f"{name}.attention", attention, ("attention",), layer, ins, {"y": att}, attention_w),
            Step(f"{name}.out", out, ("attn_out",), layer, {"x": att, "residual0": h}, {"y0": h2}, out_w),
            Step(f"{name}.up", mlp, ("mlp_in",), layer, {"x": h2}, {"y0": up}, mlp_w),
            Step(f"{name}.down", down, ("mlp_out",), layer, {"x": up, "residual0": h2}, {"y0": h}, down_w),
        ]  # fmt: skip

    def attention(self, layer: int) -> tuple[Attention, dict[str, str]]:
        s, bound = self.s, {}
        window = s.windows[layer]
        rotary = 0 if s.bloom else s.rotary_dim
        if rotary:
            angle = torch.arange(s.max_seq_len)[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
            table = torch.float64 if s.dtype == "float64" else torch.float32
            self.weights["rope_cos"], self.weights["rope_sin"] = angle.cos().to(table), angle.sin().to(table)
            bound |= {"rope_cos": "rope_cos", "rope_sin": "rope_sin"}
        if s.bloom:
            self.weights["slopes"] = torch.tensor([2.0 ** -(i + 1) for i in range(s.heads)])
            bound["alibi_slopes"] = "slopes"
        if s.sinks:
            self.weights[f"sinks.{layer}"] = torch.linspace(-1, 2, s.heads)
            bound["sinks"] = f"sinks.{layer}"
        norm = None
        if s.qk_norm:
            norm = Norm("rms", 1e-6, True)
            across = s.qk_norm == "across"
            bound["q_norm_weight"] = self.normal(f"q_norm.{layer}", self.q if across else s.head_dim, mean=1.0, std=0.3)
            bound["k_norm_weight"] = self.normal(f"k_norm.{layer}", self.k if across else s.head_dim, mean=1.0, std=0.3)
        spec = Attention(
            s.heads, s.kv_heads, s.head_dim, s.v_head_dim, 1.3 * s.head_dim**-0.5,
            group=self.kinds.index(window), index=s.windows[:layer].count(window), causal=s.causal, window=window,
            chunk=s.chunk, softcap=s.softcap, rotary_dim=rotary, q_norm=norm, k_norm=norm,
            norm_across_heads=s.qk_norm == "across", weigh_rotated=s.qk_norm == "rotated", alibi=s.bloom,
            sinks=s.sinks, gate=s.gate,
        )  # fmt: skip
        return spec, bound


# ---------------------------------------------------------------- the oracle


def oracle(model: Model, tokens: list[int]) -> torch.Tensor:
    """Logits [len, V] float64 of one sequence, by dense formulas that share no code with the runtime."""
    w = {name: value.double() for name, value in model.weights.items()}
    return _affine(_norm(hidden_oracle(model, tokens), w, "final", model.shape), w, "head")


def hidden_oracle(model: Model, tokens: list[int]) -> torch.Tensor:
    """The row [len, D] float64 that the layers leave."""
    s = model.shape
    w = {name: value.double() for name, value in model.weights.items()}
    h = w["embed"][tokens]
    for layer in range(s.layers):
        p = f"layers.{layer}"
        qkv = _affine(_norm(h, w, f"{p}.norm1", s), w, f"{p}.qkv")
        h = h + _affine(_attend(qkv, w, s, layer), w, f"{p}.out")
        up = _affine(_norm(h, w, f"{p}.norm2", s), w, f"{p}.up")
        if s.bloom:
            mid = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        else:
            gate, value = up.chunk(2, -1)
            mid = gate / (1 + torch.exp(-gate)) * value
        h = h + _affine(mid, w, f"{p}.down")
    return h


def _affine(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.einsum("tk,nk->tn", x, w[f"{name}.weight"]) + w.get(f"{name}.bias", 0.0)


def _norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str, s: Shape) -> torch.Tensor:
    if s.bloom:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    return _rms(x, w[f"{name}.weight"])


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _attend(qkv: torch.Tensor, w: dict[str, torch.Tensor], s: Shape, layer: int) -> torch.Tensor:
    n = len(qkv)
    q, k, v = qkv.split([s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.v_head_dim], -1)
    if s.qk_norm == "across":
        q, k = _rms(q, w[f"q_norm.{layer}"]), _rms(k, w[f"k_norm.{layer}"])
    q, k, v = q.view(n, s.heads, -1), k.view(n, s.kv_heads, -1), v.view(n, s.kv_heads, -1)
    if s.qk_norm == "head":
        q, k = _rms(q, w[f"q_norm.{layer}"]), _rms(k, w[f"k_norm.{layer}"])
    if not s.bloom and s.rotary_dim:
        q, k = _rotate(q, w, s), _rotate(k, w, s)
    if s.qk_norm == "rotated":
        q, k = _rms(q, w[f"q_norm.{layer}"]), _rms(k, w[f"k_norm.{layer}"])
    if s.kv_dtype == "int8":
        k, v = _as_int8(k), _as_int8(v)
    out = torch.zeros(n, s.heads, s.v_head_dim, dtype=torch.float64)
    for head in range(s.heads):
        kv = head * s.kv_heads // s.heads
        for i in range(n):
            scores, values = [], []
            for j in range(n):
                if _visible(s, layer, i, j):
                    score = float(1.3 * s.head_dim**-0.5 * (q[i, head] @ k[j, kv]))
                    score = s.softcap * math.tanh(score / s.softcap) if s.softcap else score
                    scores.append(score + (float(w["slopes"][head]) * (j - i) if s.bloom else 0.0))
                    values.append(v[j, kv])
            total = sum(map(math.exp, scores)) + (math.exp(float(w[f"sinks.{layer}"][head])) if s.sinks else 0.0)
            out[i, head] = sum(math.exp(a) / total * b for a, b in zip(scores, values, strict=True))
    if s.gate == "head":
        out = out * qkv[:, : s.heads, None]
    return out.view(n, -1) * (qkv[:, : s.heads * s.v_head_dim] if s.gate == "column" else 1.0)


def _as_int8(x: torch.Tensor) -> torch.Tensor:
    """Each head of each token rounded to 255 values."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / step) * step


def _visible(s: Shape, layer: int, i: int, j: int) -> bool:
    window = s.windows[layer]
    return (not s.causal or j <= i) and (not window or j > i - window) and (not s.chunk or j // s.chunk == i // s.chunk)


def _rotate(x: torch.Tensor, w: dict[str, torch.Tensor], s: Shape) -> torch.Tensor:
    """As complex numbers: pair (i, i + r/2) turned by its angle."""
    half = s.rotary_dim // 2
    turn = torch.complex(w["rope_cos"][: len(x)], w["rope_sin"][: len(x)])[:, None]
    z = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * turn
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)


def without_step(plan: Plan, index: int) -> Plan:
    return dataclasses.replace(plan, steps=plan.steps[:index] + plan.steps[index + 1 :])
