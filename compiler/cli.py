"""The `dscompile` command line: arguments, progress, exit codes; nothing else."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dscompile.runtime import command
from dscompile.runtime.manifest import read_manifest
from dscompile.runtime.report import Report
from dscompile.runtime.report_text import accuracy_lines, format_bytes, summary_lines, verification_line

EXAMPLE_PROMPT = "Once upon a time"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile. 0: done. 1: verification failed, no artifact. 2: something the user can act on, in one line."""
    return command.run("dscompile", _compile, argv)


def build_parser() -> argparse.ArgumentParser:
    """The arguments; their names are those of compile_model, with dashes."""
    parser = command.Parser(
        "dscompile", description="Compile a Hugging Face model into a directory that dsrun executes."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id or local directory")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="directory to write")
    add("--dtype", default="auto", metavar="TYPE", help="auto (the checkpoint's on a GPU, float32 on cpu), float16 ...")
    add(
        "--target",
        default="native",
        metavar="T[,T]",
        help="native (the GPU at hand, else cpu), cpu, or sm_80,sm_90 ...",
    )
    add("--quant", default="none", metavar="SCHEME", help="none, int8 or int8-weight-only")
    add("--kv-dtype", default="auto", metavar="TYPE", help="auto or int8")
    add("--quant-lm-head", action="store_true", help="quantize the head too")
    static = "scales of activations from calibration, not one for each token"
    add("--static-activations", action="store_true", help=static)
    add("--rounding", default="nearest", metavar="HOW", help="of quantized weights: nearest or gptq")
    budget = "what quantization may cost in perplexity; default: 1"
    add("--max-perplexity-increase", type=float, metavar="PERCENT", help=budget)
    add("--calibrate", type=Path, metavar="FILE", help="text that quantization is calibrated on")
    add("--tensor-parallel", type=command.positive_int, default=1, metavar="N")
    add("--pipeline-parallel", type=command.positive_int, default=1, metavar="N")
    add("--max-seq-len", type=command.positive_int, metavar="N", help="longest sequence; default: the model's")
    add("--max-batch", type=command.positive_int, metavar="N", help="most sequences in one step")
    deterministic = "a request's tokens do not depend on the others in its batch, on a GPU too; slower"
    add("--deterministic", action="store_true", help=deterministic)
    add("--tune", action="store_true", help="measure kernel configurations on the GPU at hand")
    dummy = "random weights, made at load (config.json is enough); =stored writes them"
    add("--dummy-weights", choices=("generated", "stored"), metavar="=stored", help=dummy)
    add("--require-fusion", type=_names, default=(), metavar="REGION[,REGION]", help="fail where one is not formed")
    add("--dump-ir", type=Path, metavar="DIR", help="write the graph after every pass that changes it")
    add("--no-verify", action="store_true", help="do not compare the artifact with the model")
    add("--force", action="store_true", help="replace OUT if it is an artifact")
    add("--json", action="store_true", help="print the report as JSON and nothing else")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _compile(argv: Sequence[str]) -> int:
    # Only =VALUE gives --dummy-weights a value: the word after it is the model.
    argv = ["--dummy-weights=generated" if word == "--dummy-weights" else word for word in argv]
    options = vars(build_parser().parse_args(argv))
    as_json, _ = options.pop("json"), options.pop("debug")
    model, out = options.pop("model"), options.pop("out")
    options["verify"] = not options.pop("no_verify")
    _quiet()
    # Imported late: `dscompile --help` and argument errors should not wait for torch and transformers.
    from dscompile.compiler.cli_progress import ConsoleProgress
    from dscompile.compiler.compile import compile_model

    if as_json:
        command.print_json(compile_model(model, out, **options).to_json())
        return 0
    console = Console(stderr=True)
    console.print(f"Compiling {model}", highlight=False)
    with ConsoleProgress(console) as progress:
        report = compile_model(model, out, progress=progress, **options)
    _summary(report, out)
    return 0


def _summary(report: Report, out: Path) -> None:
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    facts = [str(report.model[key]) for key in ("dtype", "target") if report.model.get(key)]
    print(f"{out}: {format_bytes(size)}, {', '.join(facts)}")
    for line in (*summary_lines(report), verification_line(report.verification), *accuracy_lines(report)):
        print(f"  {line}")
    prompt = f"-p {shlex.quote(EXAMPLE_PROMPT)}" if (out / "tokenizer.json").exists() else "--tokens 1,2,3"
    command = "embed" if read_manifest(out).pooling else "generate"
    print(f"Next: dsrun {command} {shlex.quote(str(out))} {prompt}")


def _quiet() -> None:
    """Our own progress is the only one: libraries that draw bars or warn on import stay silent."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    raise SystemExit(main())
