"""The same plan without its quantization: what a quantized artifact is measured against."""

from __future__ import annotations

import dataclasses

from dscompile.passes.lower.lower import Lowered
from dscompile.passes.recipe import Cast, Quantize, Recipe, RowSum
from dscompile.runtime.plan import Linear, Plan, Step, Weight

INT8_ROLES = ("weight_scale", "input_scale")


def without_quantization(lowered: Lowered, dtype: str) -> Lowered:
    """A plan without kernels: the steps of `lowered`, with the unrounded weight in `dtype` for every int8 one, and the
    cache in `dtype`."""
    weights = {n: w for n, w in lowered.plan.weights.items() if not isinstance(lowered.recipes[n], Quantize)}
    recipes: dict[str, Recipe] = {n: lowered.recipes[n] for n in weights}

    def plain(step: Step) -> Step:
        if not isinstance(step.spec, Linear) or step.spec.quantization is None:
            return step
        bound = {role: name for role, name in step.weights.items() if role not in INT8_ROLES}
        source = lowered.recipes[bound["weight"]]
        assert isinstance(source, Quantize)
        recipes[bound["weight"]] = Cast(source.x, dtype)
        weights[bound["weight"]] = Weight(lowered.plan.weights[bound["weight"]].shape, dtype, "")
        if step.spec.norm and step.spec.norm.kind == "layer" and not step.spec.norm.weight:
            bound["row_sum"] = f"{step.name}.row_sum"
            recipes[bound["row_sum"]] = RowSum(recipes[bound["weight"]])
            weights[bound["row_sum"]] = Weight((step.spec.out_features,), "float32", f"row_sum:{bound['weight']}")
        return dataclasses.replace(step, spec=dataclasses.replace(step.spec, quantization=None), weights=bound)

    steps = tuple(dataclasses.replace(plain(step), program="") for step in lowered.plan.steps)
    used = {name for step in steps for name in step.weights.values()}
    weights = {name: weight for name, weight in weights.items() if name in used}
    groups = tuple(dataclasses.replace(g, dtype=dtype) for g in lowered.plan.kv_groups)
    plan: Plan = dataclasses.replace(
        lowered.plan, steps=steps, weights=weights, kv_groups=groups, programs={}, kernels={}
    )
    return dataclasses.replace(lowered, plan=plan, recipes=recipes, requests=())
