"""compile_model(): from a Hugging Face model to an artifact. The file to read first."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from dscompile.codegen.aot import compile_kernels
from dscompile.compiler.budget import NONE, BudgetMissed, Kept
from dscompile.compiler.calibration import read_calibration
from dscompile.compiler.checkpoint import Checkpoint
from dscompile.compiler.config import CompileConfig, parse_config, resolve_dtype, resolve_limits
from dscompile.compiler.encoders import counts_from_padding, first_position, is_encoder
from dscompile.compiler.facts import count_parameters, make_manifest, model_name, report_facts
from dscompile.compiler.measure import measure_regions
from dscompile.compiler.model import build_on_meta
from dscompile.compiler.progress import Progress, Silent
from dscompile.compiler.quantize import Quantizer
from dscompile.compiler.report import collect_report, require_fusion
from dscompile.compiler.source import ModelSource, find_model, write_tokenizer
from dscompile.compiler.stand_in import why_stand_in, write_stand_in
from dscompile.compiler.trace import trace_model
from dscompile.compiler.tune import tune
from dscompile.compiler.twin import write_twin
from dscompile.compiler.verify import check, verify_artifact
from dscompile.compiler.verify_quantized import with_quantized
from dscompile.compiler.weights import write_weights
from dscompile.passes.lower.lower import Limits, Lowered, lower
from dscompile.passes.pipeline import PIPELINE, quantizing
from dscompile.passes.runner import run_pipeline
from dscompile.runtime.artifact import atomic_directory, check_output, write_json, write_manifest, write_plan
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Plan
from dscompile.runtime.report import Report, Verification
from dscompile.runtime.report_html import write_html

# What the comparison with a stand-in leaves out: random weights say nothing about the quantization of real ones.
_PLAIN: dict[str, Any] = {
    "quant": "none",
    "kv_dtype": "auto",
    "quant_lm_head": False,
    "static_activations": False,
    "rounding": "nearest",
    "calibrate": None,
    "require_fusion": (),
}


def compile_model(model: str | Path, out: str | Path, *, progress: Progress | None = None, **options: Any) -> Report:
    """Compile a model into the directory `out`, compare the two, and return the report that `out` holds too.

    model:    a hub id, or a directory as save_pretrained() writes it; with dummy_weights config.json is enough
    progress: told about each stage
    options:  dtype, target, max_seq_len, max_batch, dummy_weights, require_fusion, dump_ir, verify, force ... as on
              the command line; see CompileConfig
    Raises UserError, one line that says what to do, and VerificationError where the artifact computes something else;
    `out` is then as it was before.
    """
    config = parse_config(**options)
    check_output(out, config.force)
    progress = progress or Silent()
    source = find_model(model, config.dummy_weights is None, progress)
    with atomic_directory(out, config.force) as directory:
        return _compile_within_budget(source, config, directory, progress)


def _compile_within_budget(source: ModelSource, config: CompileConfig, directory: Path, progress: Progress) -> Report:
    """Compile, and where quantization costs more than its budget, again with more linears as they are."""
    kept = NONE
    while True:
        try:
            return _compile(source, config, directory, progress, kept)
        except BudgetMissed as missed:
            progress.finish()
            kept = missed.keep_more()
        shutil.rmtree(directory)
        directory.mkdir()


def _compile(
    source: ModelSource, config: CompileConfig, directory: Path, progress: Progress, kept: Kept = NONE
) -> Report:
    limits = resolve_limits(config, _model_limit(source), is_encoder(source.config))
    checkpoint = None if config.dummy_weights else Checkpoint(source.directory, build_on_meta(source.config))
    quantizer = _quantizer(source, config, checkpoint, limits, progress, kept)
    progress.start("tracing")
    graph = trace_model(source.config, limits.max_seq_len)
    num_params = count_parameters(graph)
    if checkpoint:
        checkpoint.require_values({name: graph.buffers[name] for name in graph.assumed})
    dtype = resolve_dtype(config, checkpoint.dtype if checkpoint else source.dtype())
    progress.finish()

    pipeline = quantizing(quantizer.passes(), quantizer.packed_passes(directory)) if quantizer else PIPELINE
    progress.start("passes", sum(len(phase.passes) for phase in pipeline), "passes")
    records = run_pipeline(graph, pipeline, config.dump_ir, lambda name: progress.advance())
    measured = tune(graph, dtype, config.targets, limits, progress) if config.tune else ()
    lowered = lower(graph, dtype, config.targets, limits, model_name(source), measured)
    quantization = quantizer.report() if quantizer else None
    report = collect_report(lowered, records, report_facts(source, config, dtype), quantization=quantization)
    require_fusion(report, config.require_fusion)
    progress.finish()

    plan = write_weights(directory, lowered, graph.constants, checkpoint, config.dummy_weights, progress)
    plan = _write_kernels(directory, lowered, plan, config.targets, progress)
    write_plan(directory, plan)
    write_tokenizer(source, directory)
    manifest = write_manifest(directory, make_manifest(source, config, plan, dtype, num_params))

    with contextlib.ExitStack() as stack:
        twin = None
        if quantizer and checkpoint and config.verify:
            twin = stack.enter_context(write_twin(directory, lowered, graph.constants, checkpoint, manifest))
        verification = _verify(source, config, directory, report, num_params, progress, twin)
        if quantizer and twin:
            progress.start("accuracy")
            report = dataclasses.replace(report, quantization=report.quantization | quantizer.gate(directory, twin))
            progress.finish()
    report = dataclasses.replace(report, verification=verification)
    if config.targets and config.verify:
        report = measure_regions(report, directory)
    write_json(directory / "report.json", report.to_json())
    write_html(report, directory / "report.html")
    write_manifest(directory, manifest)
    return report


def _model_limit(source: ModelSource) -> int | None:
    """The longest sequence the model was made for; a position table may have rows that no token gets."""
    limit = source.max_seq_len()
    if limit is None or not counts_from_padding(source.config):
        return limit
    return limit - first_position(build_on_meta(source.config))


def _quantizer(
    source: ModelSource,
    config: CompileConfig,
    checkpoint: Checkpoint | None,
    limits: Limits,
    progress: Progress,
    kept: Kept,
) -> Quantizer | None:
    if not config.quantizes:
        return None
    if is_encoder(source.config):
        raise UserError(f"{model_name(source)}: encoders are not quantized in this version: leave out quant, kv_dtype")
    if checkpoint is None:
        return Quantizer(config, None, None, progress)
    text = read_calibration(config.calibrate, source, limits.max_seq_len)
    return Quantizer(config, text, checkpoint.read, progress, kept)


def _write_kernels(directory: Path, lowered: Lowered, plan: Plan, targets: tuple[str, ...], progress: Progress) -> Plan:
    """Compile the kernels that the plan launches; returns the plan with its table of kernels."""
    if not targets:
        return plan
    progress.start("kernels", len({r.name for r in lowered.requests}) * len(targets), "kernels")
    kernels = compile_kernels(
        lowered.requests, targets, directory / "kernels", progress.advance, provenance=lowered.provenance
    )
    progress.finish()
    return dataclasses.replace(plan, kernels=kernels)


def _verify(
    source: ModelSource,
    config: CompileConfig,
    directory: Path,
    report: Report,
    num_params: int,
    progress: Progress,
    twin: Path | None = None,
) -> Verification:
    """Compare the artifact with its model, or, where that cannot be, a small model of the same layers with its own.

    twin: the artifact without its quantization, which must compute what the model computes.
    """
    if not config.verify:
        return Verification(note="not asked for")
    progress.start("verification")
    reason = why_stand_in(config, num_params)
    if reason is None:
        verification = verify_artifact(twin or directory, source)
        if twin:
            verification = with_quantized(verification, directory, twin)
    else:
        with write_stand_in(source, report, directory) as (small, scratch):
            options = dataclasses.replace(config, verify=False, dummy_weights=None, dump_ir=None, **_PLAIN)
            artifact = scratch / "artifact"
            artifact.mkdir()
            _compile(small, options, artifact, Silent())
            verification = verify_artifact(artifact, small)
        verification = dataclasses.replace(verification, model=f"{small.name} ({reason})")
    progress.finish()
    check(verification)
    return verification
