"""What a compilation was asked for, checked before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dscompile.codegen.targets import capability, supports
from dscompile.passes.lower.lower import Limits
from dscompile.passes.quantize.schemes import SCHEMES, STATIC
from dscompile.runtime.errors import UserError

DTYPES = ("float16", "bfloat16", "float32")
QUANTIZATIONS = ("none", *SCHEMES)
ROUNDINGS = ("nearest", "gptq")
REGIONS = ("embed", "norm", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "moe", "head", "sample")
DEFAULT_MAX_BATCH = 64
UNLIMITED_SEQ_LEN = 2048


@dataclass(frozen=True)
class CompileConfig:
    """Options of compile_model; the command line's names with underscores.

    dtype:         one of DTYPES, or "auto": the checkpoint's on a GPU, float32 on the CPU
    targets:       GPU architectures ("sm_90"); empty for the CPU alone
    max_seq_len:   longest sequence; None: the model's own limit
    max_batch:     most sequences in one step
    dummy_weights: None; "generated": the runtime makes them at load; "stored": random ones are written
    deterministic: on a GPU, a request's tokens do not depend on the other requests (on the CPU they never do)
    quant:         one of QUANTIZATIONS; quant_lm_head: the head too
    static_activations: scales of activations from calibration, instead of one for each token
    rounding:      of weights: one of ROUNDINGS
    kv_dtype:      "auto" (the activations') or "int8", of the KV cache
    calibrate:     text that quantization is calibrated on; None: one of our own
    max_perplexity_increase: in percent, what quantization may cost
    dump_ir:       directory for the graph after each pass that changes it
    """

    dtype: str = "auto"
    targets: tuple[str, ...] = ()
    quant: str = "none"
    kv_dtype: str = "auto"
    calibrate: Path | None = None
    quant_lm_head: bool = False
    static_activations: bool = False
    rounding: str = "nearest"
    max_perplexity_increase: float = 1.0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    max_seq_len: int | None = None
    max_batch: int = DEFAULT_MAX_BATCH
    tune: bool = False
    deterministic: bool = False
    dummy_weights: str | None = None
    require_fusion: tuple[str, ...] = ()
    dump_ir: Path | None = None
    verify: bool = True
    force: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether anything is computed or kept in int8."""
        return self.quant != "none" or self.kv_dtype != "auto"


def parse_config(**options: Any) -> CompileConfig:
    """Check the options as users give them and return a config. Raises UserError, one line, for the first bad one.

    As in CompileConfig, but: target (a string such as "native" or "sm_80,sm_90", or a list) becomes targets,
    dummy_weights may be True, dtype may be a torch.dtype, and None stands for a default.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = {*CompileConfig.__dataclass_fields__, "target"} - {"targets"}
    for name in given.keys() - known:
        raise UserError(f"unknown option {name!r}: choose from {', '.join(sorted(known))}")
    paths: dict[str, Any] = {name: Path(given.pop(name)) for name in ("calibrate", "dump_ir") if name in given}
    config = CompileConfig(
        dtype=str(given.pop("dtype", "auto")).removeprefix("torch."),
        targets=parse_targets(given.pop("target", "native")),
        dummy_weights=_dummy_weights(given.pop("dummy_weights", None)),
        require_fusion=_names(given.pop("require_fusion", ())),
        **paths,
        **given,
    )
    _check_numbers(config)
    _check_budget(config.max_perplexity_increase)
    _one_of("dtype", config.dtype, ("auto", *DTYPES))
    _one_of("quant", config.quant, QUANTIZATIONS)
    _one_of("kv_dtype", config.kv_dtype, ("auto", "int8"))
    _one_of("rounding", config.rounding, ROUNDINGS)
    for name in config.require_fusion:
        _one_of("require_fusion", name, REGIONS)
    _check_available(config)
    return config


def parse_targets(target: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """("sm_90",) from "native" or "sm_90"; () for the CPU. Raises UserError for an unknown target."""
    names = _names(target)
    if not names:
        raise UserError("no target given: choose from native, cpu, sm_80, sm_90 ...")
    if "native" in names:
        names = tuple(_native() if name == "native" else name for name in names)
    gpus = tuple(dict.fromkeys(name for name in names if name != "cpu"))
    return tuple(sorted(gpus, key=capability))


def resolve_dtype(config: CompileConfig, checkpoint_dtype: str | None) -> str:
    """The dtype of weights and activations. Raises UserError where a target cannot compute in it."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = checkpoint_dtype if config.targets and checkpoint_dtype in DTYPES else "float32"
    for target in config.targets:
        if not supports(target, dtype):
            raise UserError(f"{target} does not compute in {dtype}: choose --dtype float16")
    return dtype


def _native() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _names(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


def _dummy_weights(value: Any) -> str | None:
    if value in (None, False):
        return None
    value = "generated" if value is True else value
    _one_of("dummy_weights", value, ("generated", "stored"))
    return value


def _check_numbers(config: CompileConfig) -> None:
    for name in ("max_seq_len", "max_batch", "tensor_parallel", "pipeline_parallel"):
        value = getattr(config, name)
        if value is None:
            continue
        whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
        if isinstance(value, bool) or not whole or value < 1:
            raise UserError(f"{name} must be a positive integer, not {value!r}")


def _check_budget(percent: object) -> None:
    number = isinstance(percent, int | float) and not isinstance(percent, bool)
    if not number or not math.isfinite(percent) or percent < 0:  # type: ignore[arg-type, operator]
        raise UserError(f"max_perplexity_increase must be a percentage, not {percent!r}")


def _check_available(config: CompileConfig) -> None:
    if config.quant == "none" and (config.quant_lm_head or config.rounding != "nearest"):
        raise UserError("quant_lm_head and rounding need a scheme: give --quant int8 too")
    if config.static_activations and config.quant not in STATIC:
        raise UserError("static_activations needs a scheme that quantizes activations: give --quant int8")
    if not config.quantizes and config.calibrate is not None:
        raise UserError("calibrate needs something to quantize: give --quant int8 too")
    if config.tensor_parallel > 1 or config.pipeline_parallel > 1:
        raise UserError("parallel artifacts are not available in this version: leave out tensor and pipeline_parallel")
    if config.deterministic and config.targets and (config.quantizes or config.tune):
        raise UserError(
            "deterministic kernels are neither quantized nor tuned in this version: leave out one of the two"
        )
    if config.tune and not (config.targets and torch.cuda.is_available()):
        raise UserError("tune measures kernels on a GPU, and there is none here (or the target is the CPU)")


def _one_of(option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"unknown {option} {value!r}: choose from {', '.join(choices)}")


def resolve_limits(config: CompileConfig, model_limit: int | None, whole_sequences: bool = False) -> Limits:
    """The plan's limits. model_limit: longest sequence the model was made for, None if it knows none;
    whole_sequences: whether any sequence must fit in a step.

    Raises UserError where more is asked for: positions beyond it have no meaning to the model, or no table.
    """
    if model_limit is not None and (config.max_seq_len or 0) > model_limit:
        raise UserError(f"max_seq_len {config.max_seq_len} is more than the model's limit of {model_limit}")
    max_seq_len = config.max_seq_len or model_limit or UNLIMITED_SEQ_LEN
    return Limits(
        max_seq_len=max_seq_len,
        max_batch=config.max_batch,
        deterministic=config.deterministic,
        kv_dtype=config.kv_dtype,
        max_step_tokens=max(Limits.max_step_tokens, config.max_batch, max_seq_len if whole_sequences else 1),
    )
