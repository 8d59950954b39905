"""Batch-1 latency of generate(): a transformers model as it is, then compiled. Two warm-ups, ten timed runs each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dscompile.compiler import init_inference

WARM_UPS, RUNS = 2, 10


def main() -> None:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(device)

    prompt = torch.randint(0, model.config.vocab_size, (1, args.prompt_tokens), device=device)
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens, "do_sample": False}

    def vanilla() -> torch.Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **length)

    vanilla_ms, vanilla_ids = measure(vanilla)
    report("vanilla", vanilla_ms)

    compiled_model = init_inference(model, tensor_parallel=1, dtype=dtype)
    model.to("cpu")

    def compiled() -> torch.Tensor:
        return compiled_model.generate(prompt, **length)

    compiled_ms, compiled_ids = measure(compiled)
    report("compiled", compiled_ms)

    same = (vanilla_ids == compiled_ids).float().mean().item()
    print(f"speed-up {np.mean(vanilla_ms) / np.mean(compiled_ms):.2f}x, {100 * same:.1f}% of the tokens the same")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="EleutherAI/gpt-j-6b", help="hub id or local directory of a GPT-J")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    return parser.parse_args()


def measure(generate: Callable[[], torch.Tensor]) -> tuple[list[float], torch.Tensor]:
    """Milliseconds of each timed run, and the tokens of the last."""
    for _ in range(WARM_UPS):
        tokens = generate()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        tokens = generate()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times, tokens


def report(name: str, times: list[float]) -> None:
    mean, deviation, p95 = np.mean(times), np.std(times), np.percentile(times, 95)
    print(f"{name:<9} mean {mean:8.2f} ms   deviation {deviation:6.2f} ms   P95 {p95:8.2f} ms", flush=True)


if __name__ == "__main__":
    main()
