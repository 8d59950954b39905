"""Times of a report's regions, measured on the GPU at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dscompile.runtime import load
from dscompile.runtime.artifact import read_plan
from dscompile.runtime.bench import kernel_times
from dscompile.runtime.errors import UserError
from dscompile.runtime.report import Region, Report

PROMPT_TOKENS = 128
STEPS = 16


def measure_regions(report: Report, artifact: Path) -> Report:
    """Return the report with each region's microseconds in a decode step of one sequence, in one layer.

    Regions that share a kernel are given its mean. Without a GPU that the artifact has kernels for, or with too little
    memory on it, or for an encoder, which has no such step, the report is returned as it is.
    """
    if not torch.cuda.is_available() or read_plan(artifact).is_encoder:
        return report
    try:
        engine = load(artifact, max_kv_tokens=2 * PROMPT_TOKENS)
    except UserError:
        return report
    if engine.device.type != "cuda" or engine.plan.max_seq_len < PROMPT_TOKENS + 2 * STEPS + 1:
        return report
    times = {row["kernel"]: row["us_each"] for row in kernel_times(engine, 1, PROMPT_TOKENS, STEPS)}
    return with_times(report, times)


def with_times(report: Report, times: dict[str, float]) -> Report:
    """The report with times for T = 1. times: microseconds of one launch, by kernel."""
    classes = (
        dataclasses.replace(c, regions=tuple(_timed(region, times) for region in c.regions)) for c in report.classes
    )
    return dataclasses.replace(report, classes=tuple(classes))


def _timed(region: Region, times: dict[str, float]) -> Region:
    launches = next(iter(region.kernels.values()), ())
    if not launches or any(name not in times for name in launches):
        return region
    return dataclasses.replace(region, time_us={"1": round(sum(times[name] for name in launches), 2)})
