"""Random weights, where shapes matter and values do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dscompile.passes.recipe import Recipe, RowSum, sources
from dscompile.runtime.plan import Plan
from dscompile.runtime.weights import ROW_SUM, make_weight

SEED = 0


def keep_constants(plan: Plan, recipes: dict[str, Recipe]) -> Plan:
    """A plan whose weights the runtime can make: those that no checkpoint tensor goes into lose their `init`."""
    weights = {
        name: weight
        if sources(recipes[name]) or isinstance(recipes[name], RowSum)
        else dataclasses.replace(weight, init="")
        for name, weight in plan.weights.items()
    }
    return dataclasses.replace(plan, weights=weights)


def dummy_maker(plan: Plan) -> Callable[[str], Tensor]:
    """Return a function that makes a weight of the plan as a runtime on the CPU would."""
    device = torch.device("cpu")

    def make(name: str) -> Tensor:
        init = plan.weights[name].init
        summed = init.removeprefix(ROW_SUM) if init.startswith(ROW_SUM) else None
        others = {summed: make(summed)} if summed else {}
        return make_weight(name, plan.weights[name], SEED, device, others)

    return make
