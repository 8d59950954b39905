"""The kernels of an artifact on one GPU: which cubins fit it, and launches bound to addresses and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dscompile.runtime.driver import Driver, Function, PreparedLaunch
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Case, Extent, Kernel, Launch, Program
from dscompile.runtime.products import PRODUCTS, Library, Matrices

SIZES = ("T", "B", "R")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one step. T: tokens, B: sequences, R: rows of logits, blocks: row stride of the block tables.

    context: tokens that no sequence has more of, this step's included; 0 where that is not known.
    """

    T: int
    B: int
    R: int
    blocks: int
    context: int = 0

    def rows(self, symbol: str) -> int:
        return 1 if symbol == "1" else getattr(self, symbol)


def choose_target(kernels: Mapping[str, Kernel], capability: tuple[int, int], shared_limit: int, name: str) -> str:
    """Return the target ("sm_90") whose cubins a GPU runs: its major version, at most its minor, all blocks fitting.

    capability: compute capability; shared_limit: bytes of shared memory a block may have; name: of the GPU.
    Raises UserError that names what the artifact holds.
    """
    held = sorted({target for kernel in kernels.values() for target in kernel.cubins}, key=_target_number)
    mine = 10 * capability[0] + capability[1]
    for target in reversed(held):
        number = _target_number(target)
        if number // 10 != capability[0] or number > mine:
            continue
        if all(target in k.cubins and k.cubins[target].shared <= shared_limit for k in kernels.values()):
            return target
    holds = f"kernels for {', '.join(held)}" if held else "no GPU kernels"
    raise UserError(f"this artifact holds {holds}, and {name} needs sm_{mine}; compile it with --target sm_{mine}")


def _target_number(target: str) -> int:
    return int("".join(c for c in target if c.isdigit()) or 0)


def device_target(kernels: Mapping[str, Kernel], device: torch.device) -> str:
    """`choose_target` for a CUDA device of torch."""
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return choose_target(kernels, (properties.major, properties.minor), shared, properties.name)


def choose_case(program: Program, count: int, decode: bool, context: int = 0) -> Case | None:
    """The first case that fits a count of rows and the context of `Sizes`, or None."""
    for case in program.cases:
        fits = not case.max_context or 0 < context <= case.max_context
        if fits and _fits_count(case, count, decode):
            return case
    return None


def context_bounds(programs: Iterable[Program], count: int) -> list[int]:
    """The bounds of context, ascending, on which launches of a decode step with `count` rows depend."""
    return sorted({c.max_context for p in programs for c in p.cases if c.max_context and _fits_count(c, count, True)})


def _fits_count(case: Case, count: int, decode: bool) -> bool:
    fits = case.min_tokens <= count and (not case.max_tokens or count <= case.max_tokens)
    return fits and (case.decode is None or case.decode == decode)


@lru_cache
def grid_of(extents: tuple[Extent, ...], sizes: Sizes) -> tuple[int, int, int]:
    """Programs along x, y and z."""
    grid = [e.factor * -(-sizes.rows(e.symbol) // e.divisor) + e.plus * sizes.B + e.constant for e in extents]
    x, y, z = (*grid, 1, 1, 1)[:3]
    return x, y, z


@dataclass(frozen=True)
class Bindings:
    """What the arguments of one step's launches stand for.

    address: the device address of an argument that is memory; tensor: its view over all rows (library launches).
    """

    address: Callable[[str], int]
    tensor: Callable[[str], torch.Tensor]


class BoundKernel:
    """A kernel launch of one step: addresses are fixed, sizes and grid follow the step."""

    def __init__(self, launch: Launch, kernel: Kernel, function: Function, driver: Driver, bindings: Bindings) -> None:
        names = launch.args
        self._sized = [(i, name) for i, name in enumerate(names) if name in SIZES or name == "blocks"]
        sized = {i for i, _ in self._sized}
        values: list[int | float] = [0 if i in sized else bindings.address(name) for i, name in enumerate(names)]
        descriptors = bindings.address(launch.descriptors) if launch.descriptors else 0
        self._prepared = PreparedLaunch(driver, function, kernel.params, values, descriptors)
        self._extents = launch.grid
        self._sizes: Sizes | None = None
        self._empty = False

    def launch(self, sizes: Sizes, stream: int) -> None:
        if sizes is not self._sizes:
            self._resize(sizes)
        if not self._empty:
            self._prepared.launch(stream)

    def _resize(self, sizes: Sizes) -> None:
        for slot, name in self._sized:
            self._prepared.slots[slot] = getattr(sizes, name)
        grid = grid_of(self._extents, sizes)
        self._prepared.set_grid(grid)
        self._empty = 0 in grid
        self._sizes = sizes


class BoundLibrary:
    """A library launch of one step: a product over the first rows of views."""

    def __init__(self, launch: Launch, library: Library, bindings: Bindings) -> None:
        product = PRODUCTS.get(launch.target)
        if product is None:
            raise UserError(f"the plan launches {launch.target!r}, which this runtime does not have; update dscompile")
        x, weight, out, *more = (bindings.tensor(name) for name in launch.args if name not in SIZES)
        bias = more.pop(0) if product.bias else None
        residual = more.pop(0) if product.residual else None
        if launch.rows is not None:
            taken = slice(*launch.rows)
            weight, bias = weight[taken], None if bias is None else bias[taken]
        n, k = weight.shape
        x, out = _typed(x, weight.dtype, k), _typed(out, weight.dtype, n)
        self._launch = library.bind(product, Matrices(x, weight, out, bias, residual))
        self._rows = next((name for name in launch.args if name in SIZES), "T")

    def launch(self, sizes: Sizes, stream: int) -> None:
        rows = sizes.rows(self._rows)
        if rows:
            self._launch(rows, stream)


def _typed(memory: torch.Tensor, dtype: torch.dtype, cols: int) -> torch.Tensor:
    """Scratch [rows, bytes] as the rows of `dtype` that it holds."""
    return memory.view(dtype)[:, :cols] if memory.dtype == torch.uint8 else memory


class KernelTable:
    """The cubins of one target, loaded into the current context; and a library, where products are launched too."""

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        artifact: Path,
        target: str,
        driver: Driver,
        library: Library | None = None,
    ) -> None:
        self._kernels, self._driver, self._library = kernels, driver, library
        self.target = target
        self.functions = {name: self._load(kernel, artifact) for name, kernel in kernels.items()}

    def _load(self, kernel: Kernel, artifact: Path) -> Function:
        cubin = kernel.cubins[self.target]
        image = (artifact / cubin.file).read_bytes()
        handle = self._driver.load_function(image, cubin.symbol, cubin.shared)
        return Function(handle, cubin.num_warps, cubin.shared, cubin.pdl, cubin.num_ctas)

    def bind(self, launch: Launch, bindings: Bindings) -> BoundKernel | BoundLibrary:
        """Bind a launch of the plan to the addresses of one step."""
        if launch.kind == "library":
            assert self._library is not None
            return BoundLibrary(launch, self._library, bindings)
        return BoundKernel(launch, self._kernels[launch.target], self.functions[launch.target], self._driver, bindings)
