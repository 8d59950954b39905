"""What int8 costs in perplexity, on models as they are and on a Llama with outlier channels, and what space it takes.

    python -m benchmarks.quantization --models DIR,DIR --texts FILE,FILE --calibrate FILE [--outliers DIR]

Perplexity is that of `dsrun perplexity`, on windows of 512 tokens, in float32 on the CPU. The outliers of
`benchmarks.outliers` leave the model's function as it is; "rounded" is that model with each linear's input and weight
rounded as int8 does, but nothing folded or smoothed. Bytes are those of the plan's weights in float16.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.machine import RESULTS, write_result
from benchmarks.models import MODELS, ONE_GPU
from benchmarks.outliers import KINDS, inject
from dscompile.compiler import compile_model
from dscompile.passes.quantize.int8 import rounded
from dscompile.runtime import load
from dscompile.runtime.artifact import read_plan
from dscompile.runtime.perplexity import perplexity
from dscompile.runtime.plan import Linear, Plan

WINDOW = 512
RUNS: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"quant": "int8"},
    "int8-weight-only": {"quant": "int8-weight-only"},
    "none, int8 cache": {"kv_dtype": "int8"},
    "int8, int8 cache": {"quant": "int8", "kv_dtype": "int8"},
    "int8-weight-only, int8 cache": {"quant": "int8-weight-only", "kv_dtype": "int8"},
    "int8 with the head": {"quant": "int8", "quant_lm_head": True},
    "int8, gptq": {"quant": "int8", "rounding": "gptq"},
    "int8-weight-only, gptq": {"quant": "int8-weight-only", "rounding": "gptq"},
    "int8, static": {"quant": "int8", "static_activations": True},
}


def main() -> None:
    args = _parse()
    command = "python -m benchmarks.quantization --models DIR,... --texts FILE,... --calibrate FILE --outliers DIR"
    data: dict[str, Any] = {"command": command, "windows": args.windows, "bytes": {}, "models": [], "outliers": []}
    for name in ONE_GPU:
        data["bytes"][name] = sizes(name)
    for directory in args.models.split(","):
        data["models"].append(measure(Path(directory), RUNS, args))
        write_result("quantization", data, args.out)
    for kind in KINDS if args.outliers else ():
        data["outliers"].append(with_outliers(kind, args))
        write_result("quantization", data, args.out)


def with_outliers(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `measure` finds on a model with outliers, and what rounding alone costs there."""
    with tempfile.TemporaryDirectory() as scratch:
        model = inject(kind, args.outliers, Path(scratch) / f"{args.outliers.name} with outliers: {kind}")
        row = measure(model, {name: RUNS[name] for name in ("none", "int8")}, args)
        row["increase_percent"]["rounded"] = _increases(row["perplexity"]["none"], _rounded(model, args))
    print(json.dumps(row["increase_percent"]), flush=True)
    return row


def measure(model: Path, runs: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Perplexities by run and text, and what each adds to the first run's, in percent."""
    found: dict[str, dict[str, float]] = {}
    for name, options in runs.items():
        with tempfile.TemporaryDirectory() as scratch:
            calibrate = {"calibrate": args.calibrate} if options else {}
            compile_model(model, Path(scratch) / "out", target="cpu", verify=False, **options, **calibrate)
            engine = load(Path(scratch) / "out")
            found[name] = {
                text.stem: float(
                    perplexity(engine, engine.encode(text.read_text()), WINDOW, args.windows, batch=4)["perplexity"]
                )
                for text in args.texts
            }
    base, *others = found
    increases = {name: _increases(found[base], found[name]) for name in others}
    print(json.dumps({"model": model.name, "increase_percent": increases}), flush=True)
    return {"model": model.name, "perplexity": found, "increase_percent": increases}


def sizes(name: str) -> dict[str, float]:
    """Bytes of a large model's weights, and what part of float16's quantized linears and the whole model take."""
    plans = {}
    with tempfile.TemporaryDirectory() as scratch:
        MODELS[name][0]().save_pretrained(Path(scratch) / name)
        for kind, options in {"float16": {}, "int8": {"quant": "int8", "quant_lm_head": True}}.items():
            common = {"target": "cpu", "dtype": "float16", "dummy_weights": True, "verify": False}
            compile_model(Path(scratch) / name, Path(scratch) / kind, **common, **options)
            plans[kind] = read_plan(Path(scratch) / kind)
    whole = {kind: _bytes(plan, plan.weights) for kind, plan in plans.items()}
    steps = [s for s in plans["int8"].steps if isinstance(s.spec, Linear) and s.spec.quantization]
    names = {s.weights[role] for s in steps for role in ("weight", "weight_scale")}
    elements = sum(math.prod(plans["int8"].weights[s.weights["weight"]].shape) for s in steps)
    found = {
        **whole,
        "linears": _bytes(plans["int8"], names) / (2 * elements),
        "whole": whole["int8"] / whole["float16"],
    }
    print(json.dumps({name: found}), flush=True)
    return found


def _bytes(plan: Plan, names: Iterable[str]) -> int:
    weights = (plan.weights[name] for name in names)
    return sum(math.prod(w.shape) * getattr(torch, w.dtype).itemsize for w in weights)


def _increases(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {text: 100 * (after[text] / before[text] - 1) for text in before}


class _Eager:
    """A transformers model whose linears, but for the head, round their inputs and weights."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.data = rounded(module.weight.data)
                module.register_forward_pre_hook(lambda module, args: (rounded(args[0][0])[None],))

    @torch.no_grad()
    def logits(self, prompts):
        return [self.model(torch.tensor([p]), use_cache=False).logits[0] for p in prompts]


def _rounded(directory: Path, args: argparse.Namespace) -> dict[str, float]:
    eager = _Eager(directory)
    with tempfile.TemporaryDirectory() as scratch:
        compile_model(directory, Path(scratch) / "out", target="cpu", verify=False)
        encode = load(Path(scratch) / "out").encode
    return {
        text.stem: float(perplexity(eager, encode(text.read_text()), WINDOW, args.windows)["perplexity"])
        for text in args.texts
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, help="comma-separated model directories")
    parser.add_argument("--texts", required=True, type=_paths, help="comma-separated held-out texts")
    parser.add_argument("--calibrate", type=Path, help="text to calibrate on")
    parser.add_argument("--outliers", type=Path, help="a Llama's directory, to put outliers into")
    parser.add_argument("--windows", type=int, default=64, help="windows of each text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
