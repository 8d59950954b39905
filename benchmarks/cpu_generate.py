"""Greedy generation on the CPU beside transformers' cached generate(), in the same run and in turn.

python -m benchmarks.cpu_generate examples/models/nano-llama [MODEL ...] --batch 1,8 --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.machine import RESULTS, write_result
from dscompile.compiler import compile_model
from dscompile.runtime import load


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    batches = [int(b) for b in args.batch.split(",")]
    rows = [row for model in args.models for row in measure(model, batches, args)]
    command = f"python -m benchmarks.cpu_generate MODEL ... --batch {args.batch} --threads {args.threads}"
    result = {
        "command": command,
        "cpu": cpu_name(),
        "threads": args.threads,
        "prompt": args.prompt,
        "new": args.new,
        "rows": rows,
    }
    print(write_result("cpu_generate", result, args.out))


def measure(model: str, batches: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both on the same random prompts; medians of runs that alternate. Refuses to time tokens that differ."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "artifact"
        compile_model(model, out, target="cpu", dtype="float32", max_batch=max(batches), verify=False)
        engine = load(out, device="cpu")
    peer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None
    rows = []
    for batch in batches:
        ids = torch.randint(1, engine.plan.vocab_size, (batch, args.prompt), generator=torch.Generator().manual_seed(0))
        prompts, mask = ids.tolist(), torch.ones_like(ids)

        def ours(prompts: list[list[int]] = prompts) -> list[list[int]]:
            return [r.tokens for r in engine.generate(prompts, max_new_tokens=args.new, ignore_eos=True)]

        @torch.no_grad()
        def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> list[list[int]]:
            found = peer.generate(ids, attention_mask=mask, max_new_tokens=args.new, do_sample=False)
            return found[:, args.prompt :].tolist()

        if ours() != theirs():
            raise SystemExit(f"{model}, batch {batch}: tokens differ from transformers'")
        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(args.repeat):
            times["ours"].append(_seconds(ours))
            times["transformers"].append(_seconds(theirs))
        rows.append(_row(Path(model).name, batch, times, args.new))
    return rows


def _row(model: str, batch: int, times: dict[str, list[float]], new: int) -> dict[str, Any]:
    ours, theirs = (statistics.median(times[who]) for who in ("ours", "transformers"))
    ratios = [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)]
    row = {
        "model": model,
        "batch": batch,
        "ours_ms": 1e3 * ours,
        "transformers_ms": 1e3 * theirs,
        "speedup": statistics.median(ratios),
        "tokens_per_second": batch * new / ours,
    }
    print(f"{model:12} batch {batch}: {row['ours_ms']:8.1f} ms, transformers {row['transformers_ms']:8.1f} ms, "
          f"{row['speedup']:.2f}x, {row['tokens_per_second']:.0f} tokens/s", flush=True)  # fmt: skip
    return row


def cpu_name() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="hub ids or directories")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
