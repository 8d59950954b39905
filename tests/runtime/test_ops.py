"""Each op against its formula in float64: prologues, epilogues, norms, fallbacks, packed weights."""

import math

import pytest
import torch

from dscompile.runtime import ops
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import StepInputs
from dscompile.runtime.ops_linear import PackedWeights, join_columns
from dscompile.runtime.plan import Aten, Embed, Linear, Norm, RowNorm, Segment
from tests.helpers import rms_ratio

T, K = 5, 13


def step(num_tokens=T, logit_rows=()) -> StepInputs:
    tokens = torch.tensor([(3 * i + 1) % 11 for i in range(num_tokens)])
    return StepInputs(
        tokens, torch.arange(num_tokens) + 2, torch.tensor([num_tokens + 2]), torch.tensor(logit_rows).long(),
        [], [], [0, num_tokens], [num_tokens + 2],
    )  # fmt: skip


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normalised(x, norm, weight, bias):
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return x * (weight if norm.weight else 1) + (bias if norm.bias else 0)


def activate(name, x, alpha=None):
    return {
        "none": lambda x: x,
        "relu": lambda x: x.clamp(min=0),
        "relu2": lambda x: x.clamp(min=0) ** 2,
        "silu": lambda x: x / (1 + (-x).exp()),
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_quick": lambda x: x / (1 + (-1.702 * x).exp()),
        "tanh": torch.tanh,
        "sigmoid": lambda x: 1 / (1 + (-x).exp()),
        "softplus": lambda x: (1 + x.exp()).log(),
        "xielu": lambda x: (
            alpha[2] * x
            + torch.where(x > 0, alpha[0] * x * x, alpha[1] * (torch.special.expm1(x.clamp(max=alpha[3].item())) - x))
        ),
    }[name](x)


def linear_oracle(spec, inputs, weights):
    i = {k: v.double() for k, v in inputs.items()}
    w = {k: v.double() for k, v in weights.items()}
    v = i["x"]
    if spec.post_norm:
        v = normalised(v, spec.post_norm, w.get("post_norm_weight"), w.get("post_norm_bias"))
    if spec.add:
        v = v + i["add"]
    outputs = {"sum": v} if spec.store else {}
    if spec.norm:
        v = normalised(v, spec.norm, w.get("norm_weight"), w.get("norm_bias"))
    p = v @ w["weight"].T + w.get("bias", 0)
    for n, s in enumerate(spec.segments):
        part = p[:, s.start : s.stop]
        if s.gated:
            gate, up = part.chunk(2, -1)
            y = activate(s.activation, gate, w.get("alpha")) * up
        else:
            y = activate(s.activation, part, w.get("alpha"))
        y = spec.softcap * torch.tanh(y / spec.softcap) if spec.softcap else y
        outputs[f"y{n}"] = y * spec.scale + sum(i[f"residual{r}"] for r in range(spec.residuals))
    return outputs


N = 12
RMS, LAYER = Norm("rms", 1e-6, True, True), Norm("layer", 1e-5, True, True)
LINEARS = {
    "plain": {},
    "bias": {"bias": True},
    "rms": {"norm": RMS},
    "bare_layer": {"norm": Norm("layer", 1e-5), "bias": True},
    "layer": {"norm": LAYER},
    "add_store": {"norm": RMS, "add": True, "store": True},
    "sandwich": {"norm": RMS, "post_norm": Norm("rms", 1e-6, True), "add": True, "store": True},
    "residual": {"residuals": 1},
    "bias_residuals": {"residuals": 2, "bias": True},
    "scaled_residual": {"residuals": 1, "scale": 0.3},
    "softcap": {"softcap": 2.0, "scale": 0.5},
    "gated": {"segments": (Segment(0, N, "silu", True),)},
    "gated_scaled_residual": {"segments": (Segment(0, N, "gelu", True),), "scale": 2.0, "residuals": 1},
    "mixed": {"segments": (Segment(0, 3), Segment(3, 5, "gelu_tanh"), Segment(5, 11, "silu", True), Segment(11, 12))},
    "rows": {"rows": "R", "norm": LAYER, "bias": True, "softcap": 3.0},
    "rows_add": {"rows": "R", "add": True, "norm": RMS},
} | {
    f"act_{a}": {"segments": (Segment(0, N, a),)}
    for a in ("relu", "relu2", "gelu", "gelu_quick", "tanh", "sigmoid", "softplus", "xielu")
}


def make_linear(options, dtype=torch.float32):
    spec = Linear(K, N, **({"segments": (Segment(0, N),)} | options))
    width = spec.segments[0].width
    # A mean far from zero, so that a norm that forgets it shows.
    inputs = {"x": random(T, K, seed=1) + 3}
    inputs |= {"add": random(T, K, seed=2)} if spec.add else {}
    inputs |= {f"residual{i}": random(T, width, seed=3 + i) for i in range(spec.residuals)}
    weights = {"weight": random(N, K, seed=9), "bias": random(N, seed=10)}
    weights |= {
        f"{r}_{p}": random(K, seed=11 + len(r + p)) + 1 for r in ("norm", "post_norm") for p in ("weight", "bias")
    }
    weights = {k: v.to(dtype) for k, v in weights.items()}
    weights |= {"alpha": torch.tensor([0.7, 1.9, 0.4, -0.1])} if spec.has_alpha else {}
    return spec, {k: v.to(dtype) for k, v in inputs.items()}, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LINEARS)
def test_linear(name, dtype):
    spec, inputs, weights = make_linear(LINEARS[name], dtype)
    weights = weights if spec.bias else {k: v for k, v in weights.items() if k != "bias"}
    actual = ops.execute(spec, inputs, weights, step())
    expected = linear_oracle(spec, inputs, weights)
    bound = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 4e-4, torch.bfloat16: 4e-3}[dtype]
    assert actual.keys() == expected.keys()
    for role, y in expected.items():
        assert rms_ratio(actual[role], y) < bound


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
@pytest.mark.parametrize("name", ["plain", "bias", "residual", "bias_residuals", "gated", "act_gelu", "layer"])
def test_packed_weights(name, num_tokens, monkeypatch):
    monkeypatch.setattr(PackedWeights, "MIN_PACKED", 0)
    monkeypatch.setattr(PackedWeights, "MIN_TRANSPOSED", 0)
    options = LINEARS[name]
    spec, inputs, weights = make_linear(options)
    spec = Linear(K, 2 * N, **({"segments": (Segment(0, 2 * N),)} | options)) if "segments" not in options else spec
    weights["weight"], weights["bias"] = random(spec.out_features, K), random(spec.out_features, seed=1)
    weights = weights if spec.bias else {k: v for k, v in weights.items() if k != "bias"}
    width = spec.segments[0].width
    wide = torch.randn(num_tokens, K + 3)
    inputs = {"x": wide[:, 2 : 2 + K]} | {
        f"residual{i}": random(num_tokens, width, seed=i) for i in range(spec.residuals)
    }
    buffer = torch.full((num_tokens, width + 5), torch.nan)
    packed = PackedWeights()
    with torch.inference_mode():
        ops.bind(spec, inputs, {"y0": buffer[:, 3 : 3 + width]}, weights, packed=packed)(step(num_tokens))
    expected = linear_oracle(spec, inputs, weights)["y0"]
    assert rms_ratio(buffer[:, 3 : 3 + width], expected) < 2e-6
    assert buffer[:, :3].isnan().all() and buffer[:, 3 + width :].isnan().all()


def test_packed_weights_stay_within_their_memory(monkeypatch):
    monkeypatch.setattr(PackedWeights, "MIN_PACKED", 0)
    monkeypatch.setattr(PackedWeights, "MAX_BYTES", 100)
    assert PackedWeights().onednn(random(6, 6), 2) is None


def test_embed():
    weights = {"table": random(11, K), "positions_table": random(20, K, seed=1), "norm_weight": random(K, seed=2)}
    spec = Embed(scale=1.5, position_offset=2, norm=Norm("rms", 1e-6, True))
    inputs = step()
    x = (weights["table"].double()[inputs.tokens] + weights["positions_table"].double()[inputs.positions + 2]) * 1.5
    actual = ops.execute(spec, {}, weights, inputs)["y"]
    assert rms_ratio(actual, normalised(x, spec.norm, weights["norm_weight"], None)) < 1e-6
    assert torch.equal(ops.execute(Embed(), {}, weights, inputs)["y"], weights["table"][inputs.tokens])


@pytest.mark.parametrize("norm", [RMS, LAYER, Norm("rms", 1e-6), Norm("layer", 1e-5)])
def test_row_norm(norm):
    inputs = {"x": random(T, K) + 5, "add": random(T, K, seed=1)}
    weights = {"norm_weight": random(K, seed=2), "norm_bias": random(K, seed=3)}
    x = inputs["x"].double() + inputs["add"].double()
    actual = ops.execute(RowNorm(norm, add=True), inputs, weights, step())["y"]
    assert rms_ratio(actual, normalised(x, norm, weights["norm_weight"], weights["norm_bias"])) < 2e-6


def test_aten():
    x, w, y = random(T, K), random(K, seed=1), torch.full((T, K), torch.nan)
    ops.bind(Aten("mul.Tensor", ("in.a", "w.b")), {"a": x}, {"y": y}, {"b": w})(step())
    assert torch.equal(y, x * w)
    ops.bind(Aten("softmax.int", ("in.a", -1), {"dtype": "torch.float32"}), {"a": x}, {"y": y}, {})(step())
    assert torch.equal(y, x.softmax(-1))
    ops.bind(Aten("cat.default", (["in.a", "in.b"], -1)), {"a": x[:, :3], "b": x[:, 3:]}, {"y": y}, {})(step())
    assert torch.equal(y, x)


@pytest.mark.parametrize(
    "target", ["from_file.default", "set_.source_Storage", "mul.Nothing", "cumsum.default", "__class__"]
)
def test_aten_refuses_what_is_not_on_its_list(target):
    with pytest.raises(UserError, match="does not allow"):
        ops.bind(Aten(target), {}, {"y": torch.empty(1)}, {})


def test_join_columns():
    buffer = random(4, 10)
    assert torch.equal(join_columns([buffer[:, 1:3], buffer[:, 3:7]]), buffer[:, 1:7])
    assert join_columns([buffer[:, 1:3], buffer[:, 4:7]]) is None
    assert join_columns([buffer[:, 3:7], buffer[:, 1:3]]) is None
    assert join_columns([buffer[:, 1:3], random(4, 10)[:, 3:7]]) is None
