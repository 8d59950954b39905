"""What the sources must not hold: model names outside the adapters, imports against the current, traces of machines."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("compiler", "passes", "codegen", "runtime")
RUNTIME_MAY_IMPORT = {"dscompile", "torch", "numpy", "safetensors", "tokenizers", "rich"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level?) of every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((str(node.module), node in tree.body))
    return found


def test_no_model_type_outside_the_adapters() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    adapters = ROOT / "compiler" / "adapters"
    names = set(CONFIG_MAPPING_NAMES)
    for path in sources(*PACKAGES):
        if path.is_relative_to(adapters):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
        assert not strings & names, f"{path.relative_to(ROOT)} names the model type {', '.join(strings & names)}"


def test_runtime_imports_only_what_it_ships_with() -> None:
    for path in sources("runtime"):
        for module, top in imports(path):
            package = module.split(".")[0]
            if package in sys.stdlib_module_names or package == "__future__":
                continue
            if package == "jinja2":
                assert not top, f"{path.name} imports jinja2 before a chat asks for it"
                continue
            assert package in RUNTIME_MAY_IMPORT, f"{path.name} imports {module}"
            if package == "dscompile":
                assert module.startswith("dscompile.runtime"), f"{path.name} imports {module}"


@pytest.mark.parametrize("pattern", [r"/work/", r"/root/", r"\bTODO\b", r"\bFIXME\b", r"\bXXX\b"])
def test_sources_hold_no_traces(pattern: str) -> None:
    folders = (*PACKAGES, "examples", "benchmarks", "docs", ".ci")
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".j2", ".html", ".toml", ".json", ""}:
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(pattern, text), f"{name} holds {pattern}"


def test_every_package_and_data_file_is_installed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(["dscompile", *path.parent.relative_to(ROOT).parts])
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert found == set(config["packages"])
    for package, patterns in config["package-data"].items():
        folder = ROOT / package.removeprefix("dscompile.")
        installed = {path for pattern in patterns for path in folder.glob(pattern)}
        data = {p for p in folder.rglob("*") if p.is_file() and p.suffix in {".j2", ".html", ".json", ".txt"}}
        assert installed == data
