"""Runs a program's launches through Triton itself, in its interpreter or on a GPU: for tests and for tuning."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from dscompile.codegen.emit import KernelRequest, render
from dscompile.runtime.plan import Case, Extent, Launch, Program
from dscompile.runtime.products import PRODUCTS

DTYPE = {"fp32": torch.float32, "i8": torch.int8, "fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}


class JitRunner:
    """Kernels imported from their rendered sources, launched as Triton's own functions."""

    def __init__(self, requests: Iterable[KernelRequest], device: str = "cpu") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dscompile-jit-")
        self._requests = {r.name: r for r in requests}
        self._functions = {r.name: self._load(r) for r in self._requests.values()}
        self._device = device

    def _load(self, request: KernelRequest) -> Any:
        path = Path(self._directory.name) / f"{request.name}.py"
        path.write_text(render(request))
        spec = importlib.util.spec_from_file_location(request.name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if os.environ.get("TRITON_INTERPRET") == "1":
            vars(module).update(PDL=False, INTERPRET=True)
        return getattr(module, request.name)

    def scratch(self, program: Program, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Allocate a program's scratch memory as bytes, poisoned with NaN bit patterns where it need not be zero."""
        memory = {}
        for s in program.scratch:
            rows = 1 if s.symbol == "1" else sizes[s.symbol]
            fill = 0 if s.zeroed else 0xFF
            memory[s.name] = torch.full((rows * s.bytes,), fill, dtype=torch.uint8, device=self._device)
        return memory

    def launch(self, launch: Launch, bind: Callable[[str], Any], sizes: Mapping[str, int]) -> None:
        """Launch once. bind: the tensor or number that an argument's name stands for; scratch may be bytes."""
        if launch.kind == "library":
            self._multiply(launch, bind, sizes["T"])
            return
        request = self._requests[launch.target]
        values = [self._typed(bind(a), p.type) for a, p in zip(launch.args, request.params, strict=True)]
        grid = tuple(extent_size(e, sizes) for e in launch.grid)
        options: dict[str, Any] = {"num_warps": request.num_warps, "num_stages": request.num_stages}
        if self._device != "cpu" and request.pdl and torch.cuda.get_device_capability()[0] >= 9:
            options["launch_pdl"] = True
        if launch.descriptors:
            triton.set_allocator(lambda *_: bind(launch.descriptors))
        self._functions[launch.target][grid](*values, **options)

    @staticmethod
    def _multiply(launch: Launch, bind: Callable[[str], Any], rows: int) -> None:
        """Compute a library launch through torch."""
        what, (x, weight, out, _, *more) = PRODUCTS[launch.target], (bind(a) for a in launch.args)
        taken = slice(*launch.rows or (None,))
        weight = weight[taken]
        if x.dtype == torch.uint8:
            x = x.view(weight.dtype).view(rows, weight.shape[1])
        if out.dtype == torch.uint8:
            out = out.view(weight.dtype).view(rows, weight.shape[0])
        bias = more.pop(0)[taken] if what.bias else None
        out.copy_(what.compute(x, weight, bias, more.pop(0) if what.residual else None))

    def run(self, case: Case, bind: Callable[[str], Any], sizes: Mapping[str, int]) -> None:
        """Launch everything of a case in order."""
        for launch in case.launches:
            self.launch(launch, bind, sizes)

    @staticmethod
    def _typed(value: Any, kind: str) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            return value.view(DTYPE[kind.removeprefix("*")])
        return value


def extent_size(extent: Extent, sizes: Mapping[str, int]) -> int:
    """Programs along one dimension of a grid."""
    symbol = 1 if extent.symbol == "1" else sizes[extent.symbol]
    return extent.factor * -(-symbol // extent.divisor) + extent.plus * sizes.get("B", 0) + extent.constant
