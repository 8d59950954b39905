"""What a decode step must read from memory: by plan and by kernel."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from dscompile.runtime.kernels import choose_case
from dscompile.runtime.kv_cache import block_bytes
from dscompile.runtime.plan import Attention, Embed, Moe, Plan, Router, Step

# Of these a step reads a row, or a number for each output: nothing beside the weights.
NEGLIGIBLE = ("positions_table", "row_sum", "rope_cos", "rope_sin")


def bytes_per_step(plan: Plan, batch: int, context: int) -> int:
    """Bytes that one decode step must read: every weight once, of experts those that are hit, a row of each table per
    token, and the KV cache, of which windows are not taken into account."""
    weights: dict[tuple[str, bool], float] = {}
    for step in plan.steps:
        for role, name in step.weights.items():
            weights[name, role == "table"] = _weight_bytes(plan, step, role, batch)
    cache = sum(block_bytes(group, 1) for group in plan.kv_groups)
    shared = (plan.kv_groups[s.spec.group] for s in plan.steps if isinstance(s.spec, Attention) and not s.spec.appends)
    cache += sum(block_bytes(group, 1) // group.num_layers for group in shared)
    return round(sum(weights.values())) + batch * context * cache


def bytes_by_kernel(plan: Plan, batch: int, context: int) -> dict[str, float]:
    """The same by name of kernel, for those of the artifact that read weights or the cache."""
    read: dict[str, float] = defaultdict(float)
    for step in plan.steps:
        case = choose_case(plan.programs[step.program], batch, True, context) if step.program else None
        for launch in (launch for launch in case.launches if launch.kind == "kernel") if case else ():
            roles = [arg.removeprefix("w.") for arg in launch.args if arg.startswith("w.")]
            read[launch.target] += sum(_weight_bytes(plan, step, role, batch) for role in roles)
            if "kv" in launch.args and isinstance(step.spec, Attention):
                group = plan.kv_groups[step.spec.group]
                read[launch.target] += batch * context * block_bytes(group, 1) / group.num_layers
    return {name: count for name, count in read.items() if count}


def experts_hit(router: Router, batch: int) -> float:
    """The share of a layer's experts that a batch reads if every choice is equally likely; exact for one sequence."""
    return 1 - (1 - router.top_k / router.num_experts) ** batch


def _weight_bytes(plan: Plan, step: Step, role: str, batch: int) -> float:
    """What a step of `batch` tokens reads of one of its weights."""
    if role in NEGLIGIBLE:
        return 0
    weight = plan.weights[step.weights[role]]
    whole = math.prod(weight.shape) * getattr(torch, weight.dtype).itemsize
    if role == "table" and isinstance(step.spec, Embed):
        return batch * whole / weight.shape[0]
    if isinstance(step.spec, Moe) and role != "correction":
        return whole * experts_hit(step.spec.router, batch)
    return whole
