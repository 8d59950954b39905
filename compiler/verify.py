"""The gate: the artifact, run by the real runtime, against the original model, run by transformers."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import torch
import transformers
from torch import Tensor

from dscompile.compiler.encoders import counts_from_padding
from dscompile.compiler.facts import model_name
from dscompile.compiler.near_ties import decided_positions
from dscompile.compiler.prompts import NEW_TOKENS, choose_prompts, choose_texts, kv_tokens
from dscompile.compiler.reference import reference_hidden, reference_logits
from dscompile.compiler.source import ModelSource, find_model
from dscompile.compiler.step_through import decode_logits
from dscompile.runtime import load
from dscompile.runtime.artifact import read_plan
from dscompile.runtime.engine import Engine
from dscompile.runtime.errors import VerificationError
from dscompile.runtime.manifest import read_manifest
from dscompile.runtime.plan import Moe, Plan
from dscompile.runtime.report import Check, Verification

FLOAT32_LIMIT = 1e-5
# Half precision may be this much further from the float32 original than transformers is in the same dtype.
HALF_FACTOR = 1.5
# The largest error of a logit against the RMS of all errors: where greedy choices may differ.
PEAK_FACTOR = 10.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an artifact computed, per prompt.

    prefill:   logits of every position, all prompts in one ragged batch, [len, V]
    decode:    logits of the last positions, one token a step, all prompts in one batch, [up to DECODED, V]
    generated: the tokens that greedy generation added
    """

    prefill: list[Tensor]
    decode: list[Tensor]
    generated: list[list[int]]


def verify_artifact(artifact: Path, source: ModelSource) -> Verification:
    """Compare an artifact with its original model. The two are never in memory together."""
    plan = read_plan(artifact)
    checks, note, device = (_check_encoder if plan.is_encoder else _check_decoder)(artifact, source, plan)
    on_gpu = device.type == "cuda"
    return Verification(
        status="passed" if all(check.passed for check in checks) else "failed",
        model=model_name(source),
        against=f"transformers {transformers.__version__} eager, float32",
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        kernels="executed" if on_gpu else "not executed",
        checks=checks,
        note=note,
    )


def _check_decoder(artifact: Path, source: ModelSource, plan: Plan) -> tuple[tuple[Check, ...], str, torch.device]:
    manifest = read_manifest(artifact)
    avoid = getattr(source.config, "pad_token_id", None) if counts_from_padding(source.config) else None
    prompts, note = choose_prompts(plan, manifest.num_params, avoid)
    engine = load(artifact, max_kv_tokens=kv_tokens(plan, prompts))
    device = engine.device
    measured = measure(engine, prompts)
    del engine
    gc.collect()
    routed = any(isinstance(step.spec, Moe) for step in plan.steps)
    checks, left_out = compare(measured, prompts, source, manifest.dtype, plan.max_seq_len, device, routed)
    return checks, "; ".join(filter(None, (note, left_out))), device


def _check_encoder(artifact: Path, source: ModelSource, plan: Plan) -> tuple[tuple[Check, ...], str, torch.device]:
    """The last hidden states of texts in ragged batches."""
    manifest = read_manifest(artifact)
    texts, note = choose_texts(plan, manifest.num_params, getattr(source.config, "pad_token_id", None))
    engine = load(artifact)
    device = engine.device
    hidden = engine.hidden_states(texts)
    del engine
    gc.collect()
    exact = reference_hidden(source, texts, "float32", plan.max_seq_len, device)
    limit = FLOAT32_LIMIT
    if manifest.dtype != "float32":
        limit = HALF_FACTOR * rms_error(
            reference_hidden(source, texts, manifest.dtype, plan.max_seq_len, device), exact
        )
    return (Check("hidden states", rms_error(hidden, exact), limit),), note, device


def verify_against(artifact: str | Path, model: str | Path) -> Verification:
    """Repeat the comparison for an artifact on disk. Raises UserError where either cannot be read."""
    return verify_artifact(Path(artifact), find_model(model))


def check(verification: Verification) -> None:
    """Raise VerificationError if the comparison failed, with the figure that missed."""
    missed = [c for c in verification.checks if not c.passed]
    if missed:
        figures = ", ".join(f"{c.name} {c.error:.1e} (limit {c.limit:.1e})" for c in missed)
        raise VerificationError(
            f"the artifact does not compute what {verification.model} computes: {figures}; nothing was written"
        )


def measure(engine: Engine, prompts: list[list[int]]) -> Measured:
    """Run prompts through an engine in the three ways in which it computes.

    Decode comes first: its cache must not hold, from an earlier run, what decoding failed to write.
    """
    decode = decode_logits(engine, prompts)
    return Measured(
        prefill=engine.logits(prompts),
        decode=decode,
        generated=[r.tokens for r in engine.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True)],
    )


def compare(
    measured: Measured,
    prompts: list[list[int]],
    source: ModelSource,
    dtype: str,
    max_seq_len: int,
    device: torch.device,
    routed: bool = False,
) -> tuple[tuple[Check, ...], str]:
    """Errors of what was measured, each RMS(error) / RMS(reference) with its limit, and a note on what was left out.

    The original continues each prompt with the tokens that the artifact chose, so that every choice can be judged:
    its logit must be the largest, or within the rounding error of the largest.

    routed: the model has experts. Where the comparison fails, it is made again without the positions at which the
    original itself does not decide between two of them; see near_ties.
    """
    texts = [prompt + new for prompt, new in zip(prompts, measured.generated, strict=True)]
    exact = reference_logits(source, texts, "float32", max_seq_len, device)
    rounded = reference_logits(source, prompts, dtype, max_seq_len, device) if dtype != "float32" else None
    checks = _checks(measured, prompts, exact, rounded, [torch.ones(len(text), dtype=torch.bool) for text in texts])
    if not routed or all(check.passed for check in checks):
        return checks, ""
    decided = decided_positions(source, texts, exact, dtype, max_seq_len, device)
    left_out = sum(int((~kept).sum()) for kept in decided)
    note = f"{left_out} of {sum(map(len, texts))} positions, where two experts score alike, were left out"
    return _checks(measured, prompts, exact, rounded, decided), note if left_out else ""


def _checks(
    measured: Measured,
    prompts: list[list[int]],
    exact: list[Tensor],
    rounded: list[Tensor] | None,
    kept: list[Tensor],
) -> tuple[Check, ...]:
    """The checks over the positions that are kept, [len of prompt and new tokens] bool each.

    rounded: the original's logits of the prompts in half precision; None where the artifact is in float32
    """
    heads = [logits[: len(prompt)] for logits, prompt in zip(exact, prompts, strict=True)]
    in_prompt = [k[: len(prompt)] for k, prompt in zip(kept, prompts, strict=True)]
    limit = FLOAT32_LIMIT
    if rounded is not None:
        limit = HALF_FACTOR * rms_error(_select(rounded, in_prompt), _select(heads, in_prompt))
    tails = [head[-len(rows) :] for head, rows in zip(heads, measured.decode, strict=True)]
    last = [k[-len(rows) :] for k, rows in zip(in_prompt, measured.decode, strict=True)]
    return (
        Check("prefill", rms_error(_select(measured.prefill, in_prompt), _select(heads, in_prompt)), limit),
        Check("decode", rms_error(_select(measured.decode, last), _select(tails, last)), limit),
        Check("greedy tokens", _largest_gap(exact, prompts, measured.generated, kept), PEAK_FACTOR * limit),
    )


def _select(rows: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    return [part[k] for part, k in zip(rows, kept, strict=True)]


def rms_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """RMS(actual - expected) / RMS(expected) over all rows, in float64; infinite if anything is NaN."""
    wanted = torch.cat(expected).double()
    ratio = ((torch.cat(actual).double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    return ratio if ratio == ratio else float("inf")


def _largest_gap(
    exact: list[Tensor], prompts: list[list[int]], generated: list[list[int]], kept: list[Tensor]
) -> float:
    """How far below the best logit a chosen token's is at most, in units of the logits' RMS."""
    scale = torch.cat(exact).double().square().mean().sqrt().item()
    gap = 0.0
    for logits, prompt, new, k in zip(exact, prompts, generated, kept, strict=True):
        span = slice(len(prompt) - 1, len(prompt) - 1 + len(new))
        rows = logits[span].double()
        chosen = rows.gather(1, torch.tensor(new)[:, None])[:, 0]
        gap = max([gap, *(rows.max(1).values - chosen)[k[span]].tolist()])
    return gap / scale
