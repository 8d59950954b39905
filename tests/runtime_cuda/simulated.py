"""A GPU made of host memory: copies are memmove, launches run the kernels' sources in Triton's interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dscompile.runtime.kernels import choose_target
from dscompile.runtime.plan import Cubin, Kernel
from dscompile.runtime.products import Matrices, Product

ELEMENT = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
TARGET = "sm_90"


def at_address(address: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins at an address; kernels see only where it begins."""
    return torch.frombuffer((ctypes.c_uint8 * 16).from_address(address), dtype=torch.uint8).view(dtype)


class SimulatedDriver:
    """Has Driver's methods. A "cubin" is a file that names its kernel; `launches` counts, `copies` lists bytes."""

    def __init__(self, sources: Mapping[str, Kernel], artifact: Path) -> None:
        self._kernels, self._artifact = sources, artifact
        self._functions: list[tuple[Any, tuple[str, ...], int]] = []
        self.replaying = False
        self.launches = 0
        self.copies: list[int] = []

    def load_function(self, image: bytes, symbol: str, shared: int) -> int:
        kernel = self._kernels[symbol]
        self._functions.append((load_source(self._artifact / kernel.source, symbol), kernel.params, len(image)))
        return len(self._functions)

    def launch(self, config: Any, function: ctypes.c_void_p, parameters: ctypes.Array) -> None:
        kernel, types, _ = self._functions[(function.value or 0) - 1]
        grid = (config.grid_x, config.grid_y, config.grid_z)
        slots = [ctypes.c_uint64.from_address(p).value for p in parameters][: len(types)]
        arguments = [_argument(kind, slot) for kind, slot in zip(types, slots, strict=True)]

        self.launches += 1
        kernel[grid](*arguments)

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._copy(target, source, num_bytes)

    def copy_rows_to_device(self, target: int, source: int, pitch: int, width: int, rows: int, stream: int) -> None:
        for row in range(rows):
            self._copy(target + row * pitch, source + row * pitch, width)

    def _copy(self, target: int, source: int, num_bytes: int) -> None:
        assert not self.replaying, "a copy inside a captured graph"
        self.copies.append(num_bytes)
        ctypes.memmove(target, source, num_bytes)


class SimulatedLibrary:
    """Has CublasLt's methods."""

    def bind(self, product: Product, matrices: Matrices) -> Callable[[int, int], None]:
        m = matrices

        def launch(rows: int, stream: int) -> None:
            residual = None if m.residual is None else m.residual[:rows]
            m.out[:rows] = product.compute(m.x[:rows], m.weight, m.bias, residual)

        return launch


class SimulatedDevice:
    """Has CudaDevice's methods; a captured graph is what would have been captured, run again."""

    def __init__(self, kernels: Mapping[str, Kernel], artifact: Path, free: int = 1 << 30) -> None:
        self.device = torch.device("cpu")
        self.stream = 0
        self.driver = SimulatedDriver(kernels, artifact)
        self.library = SimulatedLibrary()
        self._free = free
        self.replays = 0

    def target(self, kernels: Mapping[str, Kernel]) -> str:
        return choose_target(kernels, (9, 0), 232448, "a simulated GPU")

    def active(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def event(self) -> Any:
        return self

    def record(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def pinned(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def free_bytes(self) -> int:
        return self._free

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            self.driver.replaying = True
            run()
            self.driver.replaying = False

        return replay


def load_source(path: Path, name: str) -> Any:
    """Import a kernel from its rendered source, set up for the interpreter."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(PDL=False, INTERPRET=True)
    return getattr(module, name)


def write_kernels(requests: Any, artifact: Path) -> dict[str, Kernel]:
    """Write sources and stand-ins for their cubins; returns the plan's kernel table."""
    from dscompile.codegen.emit import render

    (artifact / "kernels").mkdir(parents=True, exist_ok=True)
    kernels = {}
    for r in {r.name: r for r in requests}.values():
        (artifact / f"kernels/{r.name}.py").write_text(render(r))
        (artifact / f"kernels/{r.name}.{TARGET}.cubin").write_bytes(b"not a cubin")
        cubin = Cubin(f"kernels/{r.name}.{TARGET}.cubin", r.name, 0, r.num_warps, 0, 0, r.pdl, r.num_ctas)
        params = tuple(p.type for p in r.params)
        kernels[r.name] = Kernel(f"kernels/{r.name}.py", r.template, params, {TARGET: cubin})
    return kernels


def _argument(kind: str, slot: int) -> Any:
    if kind.startswith("*"):
        return at_address(slot, ELEMENT[kind[1:]])
    assert kind == "i32", kind
    return slot
