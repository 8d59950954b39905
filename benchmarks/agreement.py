"""Float32 on the CPU against transformers eager: logits in prefill and decode, and greedy tokens.

python -m benchmarks.agreement --models DIR,DIR --text FILE

20 prompts of different lengths from the text, in one ragged batch. Errors are RMS(error) / RMS(eager) of the worst.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import RESULTS, write_result
from dscompile.compiler import compile_model
from dscompile.compiler.step_through import decode_logits
from dscompile.runtime import load

NUM_PROMPTS = 20
NEW_TOKENS = 64


def main() -> None:
    args = _parse()
    rows = []
    for directory in args.models.split(","):
        rows.append(measure(Path(directory), args.text.read_text()))
        print(json.dumps(rows[-1]), flush=True)
    names = ",".join(Path(d).name for d in args.models.split(","))
    command = f"python -m benchmarks.agreement --models {names} --text {args.text.name}"
    print(write_result("agreement", {"command": command, "models": rows}, args.out))


@torch.no_grad()
def measure(directory: Path, text: str) -> dict[str, Any]:
    """Errors of prefill and of decode, and how many of the prompts are continued with the same greedy tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        compile_model(directory, Path(scratch) / "out", dtype="float32", target="cpu", verify=False)
        engine = load(Path(scratch) / "out", device="cpu")
    tokens = engine.encode(text)
    prompts = [tokens[997 * i : 997 * i + 5 + 9 * i] for i in range(NUM_PROMPTS)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [model(torch.tensor([p]), use_cache=False).logits[0] for p in prompts]
    same = 0
    for prompt, result in zip(
        prompts, engine.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True), strict=True
    ):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        same += result.tokens == theirs[0, len(prompt) :].tolist()
    return {
        "model": directory.name,
        "prompts": NUM_PROMPTS,
        "prefill_error": _worst(engine.logits(prompts), expected),
        "decode_error": _worst(decode_logits(engine, prompts), expected),
        "prompts_with_identical_greedy_tokens": same,
        "greedy_tokens": NEW_TOKENS,
    }


def _worst(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    ratios = []
    for a, e in zip(actual, expected, strict=True):
        error = (a.double() - e[-len(a) :].double()).square().mean().sqrt()
        ratios.append((error / e[-len(a) :].double().square().mean().sqrt()).item())
    return max(ratios)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, help="comma-separated model directories")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
