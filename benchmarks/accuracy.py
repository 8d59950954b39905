"""Half precision on the GPU against the original: logits, perplexity and top-1 agreement, beside eager's own.

    python -m benchmarks.accuracy --models DIR,DIR --text FILE

Windows of 512 tokens of the text. "error" is RMS(logits - float32 eager) / RMS(float32 eager); perplexity is that of
`dsrun perplexity` over the first 256 windows, beside the one about.json records where the model's directory has one.
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
from dscompile.runtime import Engine, load
from dscompile.runtime.perplexity import perplexity

WINDOW = 512


def main() -> None:
    args = _parse()
    rows = []
    for directory in args.models.split(","):
        rows.append(measure(Path(directory), args))
        print(json.dumps(rows[-1]), flush=True)
    names = ",".join(Path(d).name for d in args.models.split(","))
    command = f"python -m benchmarks.accuracy --models {names} --text {args.text.name}"
    print(write_result("accuracy", {"command": command, "models": rows}, args.out))


@torch.no_grad()
def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Errors of one model's artifact and of eager, on the first windows of the text; perplexities on all."""
    with tempfile.TemporaryDirectory() as scratch:
        artifact = args.artifacts / directory.name if args.artifacts else Path(scratch) / "artifact"
        if not args.artifacts:
            compile_model(directory, artifact, dtype=args.dtype, target="native")
        engine = load(artifact, device="cuda")
        tokens = engine.encode(args.text.read_text())
        windows = [tokens[i : i + WINDOW] for i in range(0, args.windows * WINDOW, WINDOW)]
        exact = _eager(directory, torch.float32, windows)
        eager = _eager(directory, getattr(torch, args.dtype), windows)
        ours = torch.stack(engine.logits(windows))
        decoded = _decode(engine, windows)
        found = perplexity(engine, tokens, WINDOW, 256, batch=4)
    row = {
        "model": directory.name,
        "dtype": args.dtype,
        "windows": len(windows),
        "error_ours": _ratio(ours, exact),
        "error_eager": _ratio(eager, exact),
        "top1_agreement_with_eager": (ours.argmax(-1) == eager.argmax(-1)).double().mean().item(),
        "greedy_tokens_agreement": decoded,
        "perplexity": found["perplexity"],
    }
    row["error_over_eager"] = row["error_ours"] / row["error_eager"]
    about = directory / "about.json"
    if about.exists():
        recorded = json.loads(about.read_text())["perplexity_fp16_512_token_windows"].get(args.name)
        row |= {"perplexity_recorded": recorded, "perplexity_ratio": found["perplexity"] / recorded}
    return row


def _eager(directory: Path, dtype: torch.dtype, windows: list[list[int]]) -> torch.Tensor:
    """Logits [windows, WINDOW, V] float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").cuda().eval()
    rows = [model(torch.tensor([w], device="cuda"), use_cache=False).logits[0].float().cpu() for w in windows]
    return torch.stack(rows)


def _decode(engine: Engine, windows: list[list[int]]) -> float:
    """Share of greedy tokens that batched decoding and one prefill of the same text agree on."""
    prompts = [w[: 16 + 7 * i] for i, w in enumerate(windows)]
    results = engine.generate(prompts, max_new_tokens=48, ignore_eos=True)
    texts = [[*p, *r.tokens] for p, r in zip(prompts, results, strict=True)]
    same = total = 0
    for prompt, text, logits in zip(prompts, texts, engine.logits(texts), strict=True):
        predicted = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
        same += sum(a == b for a, b in zip(predicted, text[len(prompt) :], strict=True))
        total += len(predicted)
    return same / total


def _ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return (error / expected.double().square().mean().sqrt()).item()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, help="comma-separated model directories")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--name", default="docs", help="the text's name in about.json")
    parser.add_argument("--windows", type=int, default=16, help="windows compared with eager")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--artifacts", type=Path, help="directory of artifacts by model name, instead of compiling")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
