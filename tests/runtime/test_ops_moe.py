"""Mixtures of experts against their formula in float64, token by token; only experts that are hit are read."""

import math

import pytest
import torch

from dscompile.runtime import ops, ops_moe
from dscompile.runtime.ops_moe import gate, route
from dscompile.runtime.plan import Moe, Router
from tests.helpers import rms_ratio
from tests.runtime.test_ops import activate, random, step

T, K, F, E = 5, 13, 9, 6

ROUTERS = {
    "mixtral": Router(E, 2, "softmax", True),
    "qwen": Router(E, 3, "softmax", False),
    "deepseek_v3": Router(E, 2, "sigmoid", True, 2.5, True, num_groups=3, top_groups=2, group_top=2),
    "deepseek_v2": Router(E, 2, "softmax", False, 16.0, num_groups=2, top_groups=1),
    "llama4": Router(E, 1, "sigmoid", False),
}


def chosen(logits, correction, router):
    """(expert, weight) of one token, by the definition in plan.Router."""
    total = sum(math.exp(x) for x in logits)
    score = {
        "softmax": [math.exp(x) / total for x in logits],
        "sigmoid": [1 / (1 + math.exp(-x)) for x in logits],
        "none": logits,
    }[router.score]
    choice = [s + c for s, c in zip(score, correction, strict=True)]
    size = len(choice) // router.num_groups
    groups = [sorted(choice[g * size : (g + 1) * size])[-router.group_top :] for g in range(router.num_groups)]
    best = sorted(range(router.num_groups), key=lambda g: sum(groups[g]))[-router.top_groups :]
    allowed = [e for e in range(len(choice)) if e // size in best]
    experts = sorted(allowed, key=lambda e: choice[e])[-router.top_k :]
    divisor = sum(score[e] for e in experts) if router.normalize else 1.0
    return {e: score[e] / divisor * router.scale for e in experts}


@pytest.mark.parametrize("name", ROUTERS)
def test_route(name):
    router = ROUTERS[name]
    logits, correction = random(64, E, dtype=torch.float64), random(E, seed=1, dtype=torch.float64)
    given = correction if router.correction else None
    index, weights = route(logits, given, router)
    for t in range(64):
        expected = chosen(logits[t].tolist(), correction.tolist() if router.correction else [0.0] * E, router)
        actual = dict(zip(index[t].tolist(), weights[t].tolist(), strict=True))
        assert actual == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("limit,shift,bias", [(0.0, 0.0, False), (0.8, 1.0, True)])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_moe(name, limit, shift, bias, scale_input, dtype):
    router, factored = ROUTERS[name], bias
    spec = Moe(K, F, router, "silu", limit, shift, bias, scale_input, residuals=2, factor=factored)
    inputs = {"x": random(T, K, seed=1), "logits": random(T, E, seed=2)}
    inputs |= {f"residual{i}": random(T, K, seed=3 + i) for i in range(2)}
    inputs |= {"factor": random(T, 1, seed=10)} if factored else {}
    weights = {"gate_up": random(E, 2 * F, K, seed=5), "down": random(E, K, F, seed=6)}
    weights |= {"gate_up_bias": random(E, 2 * F, seed=7), "down_bias": random(E, K, seed=8)} if bias else {}
    inputs, weights = ({n: x.to(dtype) for n, x in d.items()} for d in (inputs, weights))
    weights |= {"correction": random(E, seed=9)} if router.correction else {}
    expected = inputs["residual0"].double() * (inputs["factor"].double() if factored else 1)
    expected = expected + inputs["residual1"].double()
    w = {n: x.double() for n, x in weights.items()}
    correction = w.get("correction", torch.zeros(E)).tolist()
    for t in range(T):
        for e, factor in chosen(inputs["logits"][t].tolist(), correction, router).items():
            v = inputs["x"][t].double() * (factor if scale_input else 1)
            g, u = (w["gate_up"][e] @ v + (w["gate_up_bias"][e] if bias else 0)).chunk(2)
            if limit:
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            y = w["down"][e] @ (activate("silu", g) * (u + shift)) + (w["down_bias"][e] if bias else 0)
            expected[t] += y if scale_input else y * factor
    actual = ops.execute(spec, inputs, weights, step())["y"]
    assert rms_ratio(actual, expected) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_experts_that_no_token_chose_are_not_read(monkeypatch):
    spec = Moe(K, F, ROUTERS["mixtral"], "silu")
    inputs = {"x": random(T, K), "logits": random(1, E, seed=2).expand(T, E)}
    weights = {"gate_up": random(E, 2 * F, K, seed=5), "down": random(E, K, F, seed=6)}
    hit = set(chosen(inputs["logits"][0].tolist(), [0.0] * E, spec.router))
    for e in set(range(E)) - hit:
        weights["gate_up"][e] = torch.nan
        weights["down"][e] = torch.nan
    computed = []
    monkeypatch.setattr(ops_moe, "gate", lambda spec, product: computed.append(len(product)) or gate(spec, product))
    assert torch.isfinite(ops.execute(spec, inputs, weights, step())["y"]).all()
    assert computed == [T] * len(hit), "one product for each expert that is hit, with all of its tokens"
