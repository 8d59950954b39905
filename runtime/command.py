"""What the two command lines share: one line for every error, exit codes, JSON output."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dscompile.runtime.errors import UserError, VerificationError

EXIT_FAILED = 1  # the answer is no: verification found a difference
EXIT_USER = 2  # something the user can act on
EXIT_INTERNAL = 3  # a defect of ours
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(program: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `command(argv)` and return the exit code; an error becomes one line on stderr, --debug adds its traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = command(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; without this the interpreter complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _explain(program, error)


def print_json(data: Any) -> None:
    """Print data as JSON and nothing else. Infinities and NaN become null, so that every parser reads it."""
    print(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False))


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_ints(text: str) -> list[int]:
    """An argparse type: comma-separated integers of at least 1."""
    return [positive_int(part) for part in text.split(",")]


def int_list(text: str) -> list[int]:
    """An argparse type: comma-separated whole numbers, such as 1,8,32."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,8,32") from None


def _explain(program: str, error: Exception) -> int:
    if isinstance(error, UserError):
        line, code = str(error), EXIT_FAILED if isinstance(error, VerificationError) else EXIT_USER
    elif isinstance(error, OSError):
        line, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), EXIT_USER
    elif _is_out_of_memory(error):
        line = f"out of memory: {error}; free some, or lower --max-batch, --max-seq-len or --max-kv-tokens"
        code = EXIT_USER
    else:
        line, code = f"internal error: {type(error).__name__}: {error}; --debug shows where", EXIT_INTERNAL
    print(f"{program}: {' '.join(line.split())}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """torch says so on the CPU by a plain RuntimeError, on a GPU by a type that this module would have to import."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not (float("-inf") < data < float("inf")):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
