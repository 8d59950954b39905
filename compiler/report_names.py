"""Names for a report's reader: an activation is called by what it is, not by its graph node."""

from __future__ import annotations

import re

from dscompile.runtime.plan import Attention, Embed, Linear, Plan, Ref, RowNorm, Sample, Step

OPERANDS = ("q", "k", "v", "gate")

Written = tuple[int, int, str]


def activation_names(plan: Plan, layer: int | None) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Step name -> names of the activations it reads and writes, for the steps of a layer (None: outside the layers).

    q, k, v, gate, context, act, hidden, logits; what a layer writes again gets a number, so names differ within it.
    """
    attends = _read_by_attention(plan)
    written: dict[str, list[Written]] = {}
    counts: dict[str, int] = {}
    names: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for step in plan.steps:
        inside = step.layer == layer
        reads = [name for ref in step.inputs.values() for name in _readable(written, ref)]
        writes = []
        for role, ref in step.outputs.items():
            for part, name in _parts(step, role, ref, attends):
                if inside and layer is not None:
                    counts[name] = counts.get(name, 0) + 1
                    name = f"{name} {counts[name]}" if name == "hidden" or counts[name] > 1 else name
                written.setdefault(part.buffer, []).append((part.start, part.stop, name))
                writes.append(name)
        if isinstance(step.spec, Sample):
            writes.append("tokens")
        names[step.name] = tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes))
    return names


def _readable(written: dict[str, list[Written]], ref: Ref) -> list[str]:
    """Names of what was written last to the columns that a reference covers."""
    return [name for start, stop, name in written.get(ref.buffer, ()) if start < ref.stop and ref.start < stop]


def _parts(step: Step, role: str, ref: Ref, attends: dict[str, dict[Ref, str]]) -> list[tuple[Ref, str]]:
    """An output with its name, or the parts that attention reads as q, k, v and gate."""
    inside = [
        (r, name) for r, name in attends.get(ref.buffer, {}).items() if ref.start <= r.start and r.stop <= ref.stop
    ]
    return sorted(inside, key=lambda part: OPERANDS.index(part[1])) or [(ref, _base_name(step, role, ref))]


def _base_name(step: Step, role: str, ref: Ref) -> str:
    if isinstance(step.spec, Attention):
        return "context"
    if isinstance(step.spec, RowNorm):
        return "normed"
    if isinstance(step.spec, Embed) or role == "sum":
        return "hidden"
    if isinstance(step.spec, Linear):
        if step.spec.rows == "R":
            return "logits"
        if {"attn_out", "mlp_out"} & set(step.regions):
            return "hidden"
        if "mlp_in" in step.regions:
            return "act"
    return re.sub(r"_\d+$", "", ref.buffer)


def _read_by_attention(plan: Plan) -> dict[str, dict[Ref, str]]:
    """Buffer -> columns that attention reads -> q, k, v or gate."""
    reads: dict[str, dict[Ref, str]] = {}
    for step in plan.steps:
        if isinstance(step.spec, Attention):
            for role, ref in step.inputs.items():
                reads.setdefault(ref.buffer, {})[ref] = role
    return reads
