"""A process that compiles Triton sources to cubins: one JSON job a line on stdin, one JSON answer a line on stdout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer jobs until stdin closes; a failed job answers {"error": text}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Triton prints the PTX of a failed kernel to stdout
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = compile_cubin(**job)
        except Exception as error:
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
            answer = {"error": f"{type(error).__name__}: {lines[-1]}"}
        print(json.dumps(answer), file=answers, flush=True)


def compile_cubin(
    source: str, name: str, signature: dict, aligned: list, capability: int, options: dict, out: str
) -> dict[str, Any]:
    """Compile the kernel `name` of a source file for one architecture and write the cubin to `out`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    kernel = _load(source, name, pdl=options.get("launch_pdl", False))
    if list(signature) != list(kernel.arg_names):
        raise TypeError(f"parameters {list(signature)} do not match the source's {kernel.arg_names}")
    attrs = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    compiled = compile(
        _source_type(kernel)(fn=kernel, signature=signature, constexprs={}, attrs=attrs),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    Path(out).write_bytes(compiled.asm["cubin"])
    registers, spills = _resources(out)
    return {
        "symbol": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "scratch": compiled.metadata.global_scratch_size,
        "registers": registers,
        "spills": spills,
    }


def _source_type(kernel: Any) -> type:
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _load(source: str, name: str, pdl: bool) -> Any:
    import triton.language as tl

    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["PDL"] = tl.constexpr(pdl)
    return getattr(module, name)


def _resources(cubin: str) -> tuple[int, int]:
    """Registers of a thread and the bytes it spills."""
    import triton.backends.nvidia as backend

    tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), max(int(usage["STACK"]), int(usage["LOCAL"]))


if __name__ == "__main__":
    main()
