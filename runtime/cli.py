"""The `dsrun` command line: run an artifact, read its report, check it, measure it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dscompile.runtime import command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done. 1: `verify` found a difference. 2: something the user can act on, in one line."""
    return command.run("dsrun", _dispatch, argv)


def _dispatch(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    # Imported by command: `dsrun report` and `dsrun --help` should not wait for torch.
    module = "cli_execute" if args.command in ("generate", "embed", "perplexity", "bench") else "cli_inspect"
    return getattr(import_module(f"dscompile.runtime.{module}"), args.command)(args)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of every command; --debug is read by `command.run`."""
    parser = command.Parser("dsrun", description="Run and inspect an artifact that dscompile wrote.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_embed(commands)
    _add_report(commands)
    _add_verify(commands)
    _add(commands, "info", "what the artifact holds")
    _add_bench(commands)
    _add_perplexity(commands)
    return parser


def _add(commands: argparse._SubParsersAction, name: str, summary: str, runs: bool = False) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("artifact", type=Path, metavar="OUT", help="the directory that dscompile wrote")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if runs:
        parser.add_argument("--device", help="cuda, cuda:N or cpu; default: the GPU if the artifact has kernels for it")
        parser.add_argument("--max-kv-tokens", type=command.positive_int, metavar="N", help="size of the KV cache")
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "generate", "continue a prompt", runs=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument("--tokens", action="append", type=command.int_list, metavar="IDS", help="token ids: 5,7,9")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    parser.add_argument("--stream", action="store_true", help="print as it is generated; the default on a terminal")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end of the sequence")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--min-new-tokens", type=int, default=0, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy, the default")
    parser.add_argument("--top-k", type=int, metavar="N")
    parser.add_argument("--top-p", type=float, metavar="X")
    parser.add_argument("--min-p", type=float, metavar="X")
    parser.add_argument("--repetition-penalty", type=float, metavar="X")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given several times")


def _add_embed(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "embed", "vectors of texts, by an encoder", runs=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", action="extend", nargs="+", metavar="TEXT", help="may be given several times")
    source.add_argument("--tokens", action="append", type=command.int_list, metavar="IDS", help="token ids: 5,7,9")
    parser.add_argument("--pooling", metavar="NAME", help="mean, cls or max; default: the model's own")
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="scale vectors to length 1; default: the model's own"
    )


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "report", "what was fused, what was not, and why")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page instead")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "verify", "check the artifact's integrity and consistency; needs no GPU")
    parser.add_argument("--against", metavar="MODEL", help="also compare it with the original (needs the compiler)")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "bench", "measure decode and prefill", runs=True)
    parser.add_argument("--batch", type=command.positive_ints, default=[1], metavar="N[,N]", help="default: 1")
    parser.add_argument("--prompt-tokens", type=command.positive_int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--new-tokens", type=command.positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--repeat", type=command.positive_int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--kernels", action="store_true", help="time per kernel (needs a GPU)")


def _add_perplexity(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "perplexity", "perplexity on a text file", runs=True)
    parser.add_argument("file", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--windows", type=command.positive_int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--window", type=command.positive_int, default=512, metavar="TOKENS", help="default: 512")


if __name__ == "__main__":
    raise SystemExit(main())
