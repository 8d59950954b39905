"""One line per error, the exit codes, and what the entry point says without the compiler."""

from __future__ import annotations

import errno

import pytest
import torch

from dscompile.runtime import cli, command, compiler_entry
from dscompile.runtime.errors import UserError


def failing(error: BaseException):
    def body(argv):
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no such\nmodel"), 2, "prog: no such model"),
        (OSError(errno.ENOSPC, "No space left on device", "/out"), 2, "prog: /out: No space left on device"),
        (RuntimeError("a defect"), 3, "prog: internal error: RuntimeError: a defect; --debug shows where"),
        (KeyboardInterrupt(), 130, "prog: interrupted"),
    ],
)
def test_an_error_is_one_line(error: BaseException, code: int, words: str, capsys) -> None:
    assert command.run("prog", failing(error), []) == code
    out, err = capsys.readouterr()
    assert out == "" and err == words + "\n"


def test_debug_shows_the_traceback(capsys) -> None:
    assert command.run("prog", failing(UserError("wrong")), ["--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("prog: wrong\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["dance"],
        ["generate"],
        ["generate", "out"],
        ["generate", "out", "-p", "x", "--tokens", "1,2"],
        ["generate", "out", "--tokens", "1,x"],
        ["generate", "out", "-p", "x", "--max-new-tokens", "many"],
        ["generate", "out", "-p", "x", "--temperature", "warm"],
        ["bench", "out", "--batch", "1,,2"],
        ["bench", "out", "--batch", "8,0"],
        ["bench", "out", "--repeat", "0"],
        ["perplexity", "out"],
        ["report", "out", "--html"],
        ["report", "out", "--htm", "x"],
        ["report", "nowhere"],
        ["verify", "nowhere"],
        ["info", "nowhere"],
        ["generate", "nowhere", "-p", "x"],
    ],
    ids=" ".join,
)
def test_dsrun_refuses_in_one_line(argv: list[str], capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsrun: ") and err.count("\n") == 1


def test_a_lack_of_memory_is_no_internal_error(capsys) -> None:
    assert command.run("dscompile", lambda _: torch.empty(1 << 60), []) == 2
    line = capsys.readouterr().err
    assert line.startswith("dscompile: out of memory: ") and "--max-batch" in line and line.count("\n") == 1


def test_without_its_extra_the_compiler_says_what_to_install(capsys, monkeypatch) -> None:
    monkeypatch.setattr(compiler_entry, "find_spec", lambda name: None if name == "triton" else object())
    assert compiler_entry.main(["model", "-o", "out"]) == 2
    assert capsys.readouterr().err == "dscompile: triton not installed; run: pip install 'dscompile[compiler]'\n"


def test_json_has_no_infinities(capsys) -> None:
    command.print_json({"a": float("inf"), "b": [float("nan"), 1.5]})
    assert capsys.readouterr().out.split() == ["{", '"a":', "null,", '"b":', "[", "null,", "1.5", "]", "}"]
