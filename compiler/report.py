"""Collects the fusion report from what the passes recorded, the plan and the verification."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from dscompile.codegen.memory import ITEM_SIZE
from dscompile.compiler.report_names import activation_names
from dscompile.passes.lower.lower import Lowered, RegionRecord
from dscompile.passes.runner import PassRecord
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Aten, Attention, Plan, Program, Sample, Step
from dscompile.runtime.report import (
    Fallback,
    LayerClass,
    NearMiss,
    Node,
    Region,
    Report,
    Verification,
)

GREEDY = "step.sample_greedy"


def collect_report(
    lowered: Lowered,
    passes: Sequence[PassRecord],
    model: dict[str, Any],
    verification: Verification | None = None,
    quantization: dict[str, Any] | None = None,
) -> Report:
    """Describe a compilation. Each layer class is described by its first layer; node names are that layer's.

    model: facts shown at the head: name, architecture, dtype, target.
    """
    misses = [miss for record in passes for miss in record.log.near_misses]
    classes = [_layer_class(lowered, layers, misses) for layers in lowered.classes]
    outside = _layer_class(lowered, (), misses)
    return Report(
        classes=tuple(classes) + ((outside,) if outside.regions else ()),
        fallbacks=tuple(_fallbacks(lowered)),
        verification=verification or Verification(),
        quantization=quantization or {},
        model=model,
    )


def require_fusion(report: Report, names: Iterable[str]) -> None:
    """Raise UserError for the first named region that some layer class (or, outside them, the model) did not form."""
    for name in names:
        holders = [c for c in report.classes if any(r.name == name for r in c.regions)]
        inside = any(c.layers for c in holders)
        lacking = [c for c in report.classes if c.layers and c not in holders] if inside or not holders else []
        if holders and not lacking:
            continue
        where = f"layer {lacking[0].layers[0]}" if lacking else "the model"
        reasons = [f"{m.rule} at {m.node}: {m.reason}" for c in (lacking or report.classes) for m in c.near_misses]
        why = f"; {reasons[0]}" if reasons else ""
        raise UserError(f"--require-fusion {name}: {where} has no such region{why}")


def _layer_class(lowered: Lowered, layers: tuple[int, ...], misses: Sequence[Any]) -> LayerClass:
    layer = layers[0] if layers else None
    names = activation_names(lowered.plan, layer)
    steps = {step.name: step for step in lowered.plan.steps}
    regions = [
        region
        for record in lowered.regions
        if record.layer == layer
        for region in _regions(record, steps[record.step], lowered.plan, names)
    ]
    own = dict.fromkeys(NearMiss(m.rule, m.node, m.reason) for m in misses if m.layer == layer)
    return LayerClass(len(layers) or 1, layers, tuple(regions), tuple(own))


def _regions(
    record: RegionRecord, step: Step, plan: Plan, names: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
) -> Iterable[Region]:
    """One record for each name that a region is listed under."""
    inputs, outputs = names[step.name]
    if isinstance(step.spec, Attention):
        record = _with_absorbed(record, step.spec, plan.buffers[step.inputs["q"].buffer].dtype)
    program = plan.programs.get(GREEDY if isinstance(step.spec, Sample) else step.program)
    for name in record.names:
        yield Region(
            name=name,
            rule="; ".join(record.rules) or "as it stands",
            nodes=tuple(Node(*entry) for entry in record.took),
            kernels=kernels_by_range(program) if program else {},
            inputs=inputs,
            outputs=outputs,
            bytes_saved=record.saved,
            step=step.name.removeprefix(f"layers.{step.layer}."),
        )


def _with_absorbed(record: RegionRecord, spec: Attention, dtype: str) -> RegionRecord:
    """An attention's record with the work that normalising moved into it: norms, rotation, cache append."""
    widths = {"q": spec.num_heads * spec.head_dim, "k": spec.num_kv_heads * spec.head_dim}
    widths["v"] = spec.num_kv_heads * spec.v_head_dim
    normed = [name for name, norm in (("q", spec.q_norm), ("k", spec.k_norm), ("v", spec.v_norm)) if norm]
    rotated = (["q", "k"] if spec.appends else ["q"]) if spec.rotary_dim else []
    append = ("cache", "append", f"[1, T, {widths['k'] + widths['v']}]")
    nodes = (
        *((f"{name}_norm", "norm", f"[1, T, {widths[name]}]") for name in normed),
        *((f"rotate_{name}", "rope", f"[1, T, {widths[name]}]") for name in rotated),
        *([append] if spec.appends else []),
    )
    # Each of them would have written its row for the next to read.
    saved = 2 * ITEM_SIZE[dtype] * sum(widths[name] for name in (*normed, *rotated))
    rules = (
        *([", ".join(f"norm({name})" for name in normed)] if normed else []),
        *([", ".join(f"rope({name})" for name in rotated)] if rotated else []),
        *(["append(k, v)"] if spec.appends else []),
    )
    return dataclasses.replace(
        record, took=(*nodes, *record.took), saved=record.saved + saved, rules=record.rules or (*rules, "attend")
    )


def kernels_by_range(program: Program) -> dict[str, tuple[str, ...]]:
    """Range of tokens, and of contexts -> launches. Where decode has cases of its own, the others are "prefill"."""
    ranges: dict[str, tuple[str, ...]] = {}
    has_decode = any(case.decode for case in program.cases)
    for case in program.cases:
        low, high = case.min_tokens, case.max_tokens
        span = f"{low}+" if high == 0 else str(low) if low == high else f"{low}-{high}"
        if has_decode and not case.decode:
            span = "prefill" if (low, high) == (1, 0) else f"{span} prefill"
        if case.max_context:
            span += f", context to {case.max_context}"
        ranges[span] = tuple(launch.target for launch in case.launches)
    return ranges


def _fallbacks(lowered: Lowered) -> Iterable[Fallback]:
    records = {record.step: record for record in lowered.regions}
    for step in lowered.plan.steps:
        if not isinstance(step.spec, Aten):
            continue
        nodes = records[step.name].took
        if step.regions == ("copy",):
            reason = "a packed linear reads its inputs side by side, and this one is also read elsewhere"
        else:
            reason = "no rule takes this operator into a region"
        yield Fallback(nodes[0][0] if nodes else step.name, step.spec.target, reason)
