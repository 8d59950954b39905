"""What the same machine does without us: transformers eager, and its static cache with torch.compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


def load_random(config: PretrainedConfig, dtype: str) -> torch.nn.Module:
    """A model of random weights made on the GPU."""
    with torch.device("cuda"):
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval()


def measure(
    model: torch.nn.Module, how: str, batch: int, prompt_tokens: int, new_tokens: int, repeat: int = 2
) -> dict[str, Any]:
    """Prefill and decode step in milliseconds of greedy generate(). how: "eager" or "compile"."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt_tokens), device="cuda")
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if how == "compile":
        options["cache_implementation"] = "static"
        model.generation_config.compile_config = None

    def generate(count: int) -> None:
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        torch.cuda.synchronize()

    start = time.perf_counter()
    generate(new_tokens)
    first_call = time.perf_counter() - start
    generate(new_tokens)
    whole = statistics.median(_seconds(lambda: generate(new_tokens)) for _ in range(repeat))
    short = statistics.median(_seconds(lambda: generate(1)) for _ in range(repeat))
    return {
        "peer": how,
        "batch": batch,
        "first_call_s": first_call,
        "prefill_ms": 1e3 * short,
        "decode_step_ms": 1e3 * (whole - short) / (new_tokens - 1),
        "whole_call_ms": 1e3 * whole,
    }


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
