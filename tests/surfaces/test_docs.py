"""What the README and the guides say can be typed."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from dscompile.compiler.cli import build_parser as dscompile_parser
from dscompile.runtime.cli import build_parser as dsrun_parser

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "examples/README.md", "docs/architecture.md", "docs/artifact.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("dscompile ", "dsrun "))]


def test_there_are_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    program, *argv = shlex.split(line, comments=True)
    argv = ["--dummy-weights=generated" if word == "--dummy-weights" else word for word in argv]
    (dscompile_parser() if program == "dscompile" else dsrun_parser()).parse_args(argv)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z-]+)", (ROOT / page).read_text())}
    assert {"demo", "test"} <= named <= targets | {"a"}


@pytest.mark.parametrize("number", [0, 1])
def test_python_blocks_run(number: int, compiled: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The first loads out/, the second compiles the example model."""
    shutil.copytree(compiled, tmp_path / "out")
    shutil.copytree(ROOT / "examples" / "models", tmp_path / "examples" / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    python = blocks("README.md", "python")
    assert len(python) == 2
    exec(compile(python[number], f"README.md block {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / target).exists(), f"{page} links to {target}"
    for name in re.findall(r"`((?:compiler|passes|codegen|runtime|tests)/[\w/.-]+)`", text):
        if name.isupper() or "NAME" in name or "MODEL_TYPE" in name:
            continue
        assert (ROOT / name).exists(), f"{page} names {name}"
