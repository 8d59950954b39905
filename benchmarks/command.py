"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch

from benchmarks.machine import RESULTS


def parser_for(module: str, doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with --artifacts, --device, --name (and --out; module: as in `python -m benchmarks.MODULE`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=(doc or "").splitlines()[0])
    parser.add_argument("--artifacts", type=Path, help="folder that keeps compiled artifacts between commands")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default=name, help="name of the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that gives a result, without where its files were kept."""
    words = [parser.prog]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in ("help", "artifacts", "device", "name", "out") or value == action.default:
            continue
        words.append(action.option_strings[0])
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
    return " ".join(words)


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    return [int(part) for part in names(text)]


def free_memory() -> None:
    """Give back what an engine or a model that is gone has held: captured graphs keep their memory in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
