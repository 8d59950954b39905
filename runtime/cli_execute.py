"""The commands of `dsrun` that run the model: generate, embed, perplexity, bench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dscompile.runtime import load
from dscompile.runtime.command import print_json
from dscompile.runtime.errors import UserError

SAMPLING = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
)

BENCH_SPARE_TOKENS = 64


def generate(args: argparse.Namespace) -> int:
    """Continue the prompts; one prompt streams on a terminal."""
    prompts = args.prompt or args.tokens
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.chat and not args.prompt:
        raise UserError("--chat needs a text prompt; give it with -p")
    engine = _load(args)
    if args.chat:
        results = [engine.chat([{"role": "user", "content": text}], **sampling) for text in prompts]
    elif _streams(args, engine):
        return _stream(engine, prompts[0], sampling)
    else:
        results = engine.generate(prompts, **sampling)
    if args.json:
        print_json([_result(prompt, result) for prompt, result in zip(prompts, results, strict=True)])
        return 0
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        print("\n" if index else "", _shown(engine, prompt, args.chat), _text(engine, result), sep="")
    return 0


def embed(args: argparse.Namespace) -> int:
    """Print a line of numbers for each text, its vector."""
    texts = args.prompt or args.tokens
    vectors = _load(args).embed(texts, args.pooling, args.normalize).tolist()
    if args.json:
        print_json([{"prompt": text, "embedding": vector} for text, vector in zip(texts, vectors, strict=True)])
        return 0
    for vector in vectors:
        print(*(f"{x:.6g}" for x in vector))
    return 0


def perplexity(args: argparse.Namespace) -> int:
    """Perplexity on a text file: windows that do not overlap, each from its own beginning."""
    from dscompile.runtime.perplexity import perplexity as measure

    text = _read_text(args.file)
    engine = _load(args)
    if args.window > engine.plan.max_seq_len:
        raise UserError(f"--window {args.window} exceeds the artifact's max_seq_len of {engine.plan.max_seq_len}")
    tokens = engine.encode(text)
    with Progress(console=Console(stderr=True), transient=True, disable=args.json or not sys.stderr.isatty()) as bar:
        task = bar.add_task("windows")
        result = measure(
            engine,
            tokens,
            args.window,
            args.windows,
            batch=max(1, min(8, engine.plan.max_batch)),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if args.json:
        print_json(result)
    else:
        print(f"perplexity {result['perplexity']:.4f} over {result['windows']} windows of {result['window']} tokens")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Decode step time, prefill time, tokens per second, share of the read bandwidth; per kernel with --kernels."""
    from dscompile.runtime import bench as measure

    # The rest of the memory is left to the measurement of the bandwidth.
    longest = args.prompt_tokens + args.new_tokens + BENCH_SPARE_TOKENS
    args.max_kv_tokens = args.max_kv_tokens or max(args.batch) * longest
    engine = _load(args)
    result = measure.bench(engine, args.batch, args.prompt_tokens, args.new_tokens, args.repeat)
    if args.kernels:
        result["kernels"] = measure.kernel_times(
            engine, args.batch[0], args.prompt_tokens, bandwidth=result["read_bandwidth"]
        )
    if args.json:
        print_json(result)
    else:
        _print_bench(result)
    return 0


def _load(args: argparse.Namespace) -> Any:
    return load(args.artifact, device=args.device, max_kv_tokens=args.max_kv_tokens)


def _streams(args: argparse.Namespace, engine: Any) -> bool:
    """Whether to print as it is generated: one prompt, a person (or --stream) at the other end, text to print."""
    if args.json or len(args.prompt or args.tokens) > 1 or not engine.tokenizer:
        return False
    return args.stream or sys.stdout.isatty()


def _stream(engine: Any, prompt: str | list[int], sampling: dict[str, Any]) -> int:
    print(_shown(engine, prompt, chat=False), end="", flush=True)
    for piece in engine.stream(prompt, **sampling):
        print(piece, end="", flush=True)
    print()
    return 0


def _shown(engine: Any, prompt: str | list[int], chat: bool) -> str:
    """The prompt as the continuation follows it."""
    if chat:
        return ""
    if isinstance(prompt, str):
        return prompt
    return engine.tokenizer.decode(prompt) if engine.tokenizer else f"{','.join(map(str, prompt))} -> "


def _text(engine: Any, result: Any) -> str:
    return result.text if engine.tokenizer else ",".join(map(str, result.tokens))


def _result(prompt: str | list[int], result: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); give a text file") from error


def _print_bench(result: dict[str, Any]) -> None:
    console = Console()
    machine = result["device"]
    console.print(f"{machine}, {result['prompt_tokens']} prompt tokens, {result['new_tokens']} new tokens")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    columns = ["batch", "prefill ms", "decode step ms", "tokens/s", "bytes/step"]
    for column in columns + (["bandwidth", "GPU idle"] if result["read_bandwidth"] else []):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["batches"]:
        cells = [
            str(row["batch"]),
            f"{row['prefill_ms']:.2f}",
            f"{row['decode_step_ms']:.3f} \u00b1 {row['decode_step_ms_deviation']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['bytes_per_step'] / 1e6:.1f} MB",
        ]
        if result["read_bandwidth"]:
            cells.append(f"{100 * row['bandwidth_fraction']:.1f}%")
            cells.append("" if row["gpu_idle"] is None else f"{100 * row['gpu_idle']:.1f}%")
        table.add_row(*cells)
    console.print(table)
    if result["read_bandwidth"]:
        console.print(f"read bandwidth measured in this run: {result['read_bandwidth'] / 1e12:.2f} TB/s")
    if "kernels" in result:
        _print_kernels(console, result["kernels"])


def _print_kernels(console: Console, kernels: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("kernel", no_wrap=True, max_width=26)
    table.add_column("regions", overflow="fold")
    for column in ("launches", "us each", "us/step", "share", "bandwidth"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in kernels:
        table.add_row(
            row["kernel"],
            row["regions"],
            f"{row['launches_per_step']:.0f}",
            f"{row['us_each']:.2f}",
            f"{row['us_per_step']:.1f}",
            f"{100 * row['share']:.1f}%",
            "" if row["bandwidth_fraction"] is None else f"{100 * row['bandwidth_fraction']:.0f}%",
        )
    console.print(table)
