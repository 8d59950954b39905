"""Attention of long prompts, and over an int8 cache, on a GPU, against the CPU executor on the same plans."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dscompile.codegen.aot import compile_kernels
from dscompile.codegen.operands import KernelContext, Operand
from dscompile.codegen.select import programs_for
from dscompile.codegen.step_kernels import step_kernels
from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.cuda_executor import CudaExecutor
from dscompile.runtime.engine import Engine
from dscompile.runtime.plan import Aten, Sample, Step
from tests.helpers import rms_ratio
from tests.runtime.models import Model, make_model

pytestmark = pytest.mark.gpu

WIDE = {"hidden": 256, "inner": 256, "heads": 8, "head_dim": 64, "v_head_dim": 64, "rotary_dim": 64, "page_size": 16}
LIMITS = {"max_seq_len": 512, "max_batch": 8, "max_step_tokens": 512}
MODELS = {
    "gqa": {},
    "gqa_bfloat16": {"dtype": "bfloat16"},
    "mha_wide_heads": {"kv_heads": 8, "head_dim": 256, "v_head_dim": 256},
    "alibi_window_softcap_sinks": {"kind": "bloom", "kv_heads": 8, "windows": (70, 0), "softcap": 3.0, "sinks": True},
    "chunk_narrow_values": {"chunk": 48, "v_head_dim": 40, "rotary_dim": 32},
    "odd_heads_row_norms": {"heads": 6, "head_dim": 72, "v_head_dim": 72, "rotary_dim": 24, "qk_norm": "across"},
}
LENGTHS = (1, 17, 64, 150, 5, 200)
TOLERANCE = 6e-3  # two executions in float16, in which an integer of the cache, here and there, differs by one


def on_gpu(model: Model, target: str, directory: Path) -> Engine:
    """The model with the kernels that the compiler chooses."""
    plan = model.plan
    context = KernelContext(
        (target,), plan.page_size, plan.max_seq_len, plan.max_batch, plan.max_step_tokens, plan.kv_groups
    )
    programs, requests = step_kernels(plan)
    steps = []
    for step in plan.steps:
        if not isinstance(step.spec, Sample | Aten):
            programs[step.name], made = programs_for(step.spec, _operands(step, model), context)
            requests += made
            step = dataclasses.replace(step, program=step.name)
        steps.append(step)
    unique = {r.name: r for r in requests}.values()
    kernels = compile_kernels(unique, (target,), directory / "kernels")
    plan = dataclasses.replace(plan, steps=tuple(steps), programs=programs, kernels=kernels)
    device = torch.device("cuda")
    weights = {name: weight.to(device) for name, weight in model.weights.items()}
    return Engine(CudaExecutor(plan, weights, directory, device, 4096))


def _operands(step: Step, model: Model) -> dict[str, Operand]:
    plan, found = model.plan, {}
    for kind, refs in (("in", step.inputs), ("out", step.outputs)):
        for role, ref in refs.items():
            buffer = plan.buffers[ref.buffer]
            aligned = ref.start * getattr(torch, buffer.dtype).itemsize % 16 == 0
            found[f"{kind}.{role}"] = Operand(buffer.dtype, buffer.cols, (0, ref.stop - ref.start), aligned)
    for role, name in step.weights.items():
        weight = plan.weights[name]
        found[f"w.{role}"] = Operand(weight.dtype, weight.shape[-1], weight.shape)
    return found


LONG_MODELS = {
    "gqa": {},
    "mha_bfloat16": {"kv_heads": 8, "dtype": "bfloat16"},
    "heads_of_128": {"heads": 4, "head_dim": 128, "v_head_dim": 128},
    "alibi_window_softcap_sinks": MODELS["alibi_window_softcap_sinks"],
}


@pytest.mark.parametrize("name", LONG_MODELS)
def test_long_prompts(name, target, tmp_path, summary):
    """A 16-bit cache: prompts longer than SHORT_PROMPT, in pieces, beside short ones."""
    limits = {"max_seq_len": 2048, "max_batch": 8, "max_step_tokens": 1024}
    model = make_model(**{"dtype": "float16", **WIDE, **limits, **LONG_MODELS[name]})
    gpu, cpu = on_gpu(model, target, tmp_path), Engine(CpuExecutor(model.plan, model.weights, 8192))
    used = {kernel.template for kernel in gpu.plan.kernels.values()}
    assert {"attention_long", "attention_ring"} <= used
    generator = torch.Generator().manual_seed(0)
    lengths = (1500, 7, 2048, 130)
    prompts = [torch.randint(model.shape.vocab, (n,), generator=generator).tolist() for n in lengths]
    errors = [rms_ratio(a, b) for a, b in zip(gpu.logits(prompts), cpu.logits(prompts), strict=True)]
    summary(f"long prompts, {name}: {', '.join(f'{error:.2e}' for error in errors)}")
    assert max(errors) <= TOLERANCE * (8 if model.shape.dtype == "bfloat16" else 1)


MANY_MODELS = {
    "gqa": {},
    "mha_bfloat16": {"kv_heads": 8, "dtype": "bfloat16"},
    "heads_of_128": {"heads": 16, "head_dim": 128, "v_head_dim": 128},
    "wide_heads": {"kv_heads": 8, "head_dim": 256, "v_head_dim": 256},
    "alibi_window_softcap_sinks": MODELS["alibi_window_softcap_sinks"],
    "chunk": {"chunk": 48, "rotary_dim": 32},
    "head_norms": {"qk_norm": "head"},
}


@pytest.mark.parametrize("name", MANY_MODELS)
def test_many_sequences(name, target, tmp_path, summary):
    """A 16-bit cache and as many sequences as attention_decode_ring takes, whose contexts come to fill blocks."""
    limits = {"max_seq_len": 512, "max_batch": 40, "max_step_tokens": 4096}
    model = make_model(**{"dtype": "float16", **WIDE, "kv_heads": 4, **limits, **MANY_MODELS[name]})
    gpu, cpu = on_gpu(model, target, tmp_path), Engine(CpuExecutor(model.plan, model.weights, 16384))
    assert "attention_decode_ring" in {kernel.template for kernel in gpu.plan.kernels.values()}
    generator = torch.Generator().manual_seed(0)
    count = 160 // model.shape.kv_heads
    lengths = [1, 17, 63, 64, 65, 300, *torch.randint(1, 200, (count - 6,), generator=generator).tolist()]
    prompts = [torch.randint(model.shape.vocab, (n,), generator=generator).tolist() for n in lengths]
    results = gpu.generate(prompts, max_new_tokens=24, ignore_eos=True, logprobs=True)
    worst = 0.0
    for prompt, result in zip(prompts, results, strict=True):
        logits = cpu.logits([prompt + result.tokens])[0][len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1)[range(24), result.tokens]
        worst = max(worst, rms_ratio(torch.tensor(result.logprobs), expected))
    summary(f"many sequences, {name}: {worst:.2e}")
    assert worst <= TOLERANCE * (8 if model.shape.dtype == "bfloat16" else 1)


@pytest.mark.parametrize("name", MODELS)
def test_int8_cache(name, target, tmp_path, summary):
    """Prompts at once, and then token by token what greedy generation adds."""
    options = {"dtype": "float16", **WIDE, **LIMITS, **MODELS[name]}
    model = make_model(**options, kv_dtype="int8")
    gpu, cpu = on_gpu(model, target, tmp_path), Engine(CpuExecutor(model.plan, model.weights, 4096))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.shape.vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    prefill = max(rms_ratio(a, b) for a, b in zip(gpu.logits(prompts), cpu.logits(prompts), strict=True))
    results = gpu.generate(prompts, max_new_tokens=40, ignore_eos=True, logprobs=True)
    decode = 0.0
    for prompt, result in zip(prompts, results, strict=True):
        logits = cpu.logits([prompt + result.tokens])[0][len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1)[range(40), result.tokens]
        decode = max(decode, rms_ratio(torch.tensor(result.logprobs), expected))
    half = Engine(CpuExecutor(make_model(**options).plan, model.weights, 4096))
    rounding = max(rms_ratio(a, b) for a, b in zip(half.logits(prompts), cpu.logits(prompts), strict=True))
    summary(f"int8 cache, {name}: prefill {prefill:.2e}, decode {decode:.2e}, int8 itself {rounding:.2e}")
    limit = TOLERANCE * (8 if model.shape.dtype == "bfloat16" else 1)
    assert prefill <= limit
    assert decode <= 2 * limit
