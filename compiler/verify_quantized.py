"""The gate of a quantized artifact: its unquantized twin against the original, then the two against each other."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

from dscompile.compiler.prompts import choose_prompts, kv_tokens
from dscompile.compiler.verify import Measured, measure, rms_error
from dscompile.runtime import load
from dscompile.runtime.artifact import read_plan
from dscompile.runtime.manifest import read_manifest
from dscompile.runtime.report import Check, Verification

# What int8 may change in the logits: each linear adds one or two percent, a lost column or scale far more than all.
LOGITS_LIMIT = 0.25
# Prefill and decode add in different orders, and now and then that takes a value over to the next integer.
DECODE_LIMIT = 0.05


def with_quantized(verification: Verification, artifact: Path, twin: Path) -> Verification:
    """Add to a twin's verification what its quantized artifact computes on the same prompts."""
    exact, quantized = _measured(twin), _measured(artifact)
    tails = [head[-len(rows) :] for head, rows in zip(quantized.prefill, quantized.decode, strict=True)]
    checks = (
        Check("int8 prefill against unquantized", rms_error(quantized.prefill, exact.prefill), LOGITS_LIMIT),
        Check("int8 decode against its prefill", rms_error(quantized.decode, tails), DECODE_LIMIT),
    )
    passed = verification.status == "passed" and all(check.passed for check in checks)
    return dataclasses.replace(
        verification, status="passed" if passed else "failed", checks=(*verification.checks, *checks)
    )


def _measured(artifact: Path) -> Measured:
    plan = read_plan(artifact)
    prompts, _ = choose_prompts(plan, read_manifest(artifact).num_params)
    engine = load(artifact, max_kv_tokens=kv_tokens(plan, prompts))
    measured = measure(engine, prompts)
    del engine
    gc.collect()
    return measured
