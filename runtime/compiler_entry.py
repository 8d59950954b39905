"""The `dscompile` command: the compiler where its extra is installed, else one line that says how to install it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

COMPILER_NEEDS = ("transformers", "triton", "onnx", "jinja2", "huggingface_hub")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the compiler's command line and return its exit code."""
    missing = [name for name in COMPILER_NEEDS if find_spec(name) is None]
    if missing:
        packages = ", ".join(missing)
        print(f"dscompile: {packages} not installed; run: pip install 'dscompile[compiler]'", file=sys.stderr)
        return 2
    # Not a plain import statement: nothing in the runtime may depend on the compiler.
    return import_module("dscompile.compiler.cli").main(argv)
