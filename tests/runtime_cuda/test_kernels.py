"""Choosing cubins and cases, and binding launches, with a driver that only records."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace

import pytest
import torch

from dscompile.runtime.driver import LAUNCH_PROGRAMMATIC_DEPENDENCY, Function, PreparedLaunch, argument_bits
from dscompile.runtime.errors import UserError
from dscompile.runtime.kernels import Bindings, KernelTable, Sizes, choose_case, choose_target, context_bounds, grid_of
from dscompile.runtime.plan import Case, Cubin, Extent, Kernel, Launch, Program
from dscompile.runtime.products import PRODUCTS
from tests.codegen.oracle import ACTIVATIONS
from tests.helpers import rms_ratio
from tests.runtime_cuda.simulated import SimulatedLibrary

SIZES = Sizes(T=17, B=3, R=2, blocks=64)


def kernel(*targets: str, shared: int = 0) -> Kernel:
    return Kernel("k.py", "t", ("*fp16", "i32", "fp32"), {t: Cubin("k.cubin", "k", shared, 4, 32, 0) for t in targets})


class RecordingDriver:
    """Keeps what each launch was given: grid, block, shared memory, attributes, argument slots."""

    def __init__(self) -> None:
        self.launches: list[dict] = []
        self.images: list[bytes] = []

    def load_function(self, image: bytes, symbol: str, shared: int) -> int:
        self.images.append(image)
        return 7

    def launch(self, config, function, parameters) -> None:
        self.launches.append(
            {
                "grid": (config.grid_x, config.grid_y, config.grid_z),
                "block": config.block_x,
                "shared": config.shared,
                "stream": config.stream,
                "attributes": config.num_attributes,
                "function": function.value,
                "slots": [ctypes.c_uint64.from_address(p).value for p in parameters],
            }
        )


@pytest.mark.parametrize(
    ("targets", "capability", "chosen"),
    [
        (("sm_80", "sm_90"), (9, 0), "sm_90"),
        (("sm_80", "sm_90"), (8, 0), "sm_80"),
        (("sm_80",), (8, 9), "sm_80"),
        (("sm_80", "sm_86"), (8, 9), "sm_86"),
        (("sm_80", "sm_89"), (8, 6), "sm_80"),
        (("sm_90", "sm_100", "sm_120"), (10, 3), "sm_100"),
    ],
)
def test_the_highest_target_that_runs_is_chosen(targets, capability, chosen):
    assert choose_target({"a": kernel(*targets), "b": kernel(*targets)}, capability, 1 << 17, "a GPU") == chosen


def test_a_target_whose_blocks_do_not_fit_is_passed_over():
    kernels = {"a": kernel("sm_80", "sm_86"), "b": kernel("sm_80", "sm_86")}
    kernels["b"].cubins["sm_86"] = replace(kernels["b"].cubins["sm_86"], shared=120_000)
    assert choose_target(kernels, (8, 9), 101_376, "a GPU") == "sm_80"


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ({"a": kernel("sm_80", "sm_100")}, "holds kernels for sm_80, sm_100, and a GPU needs sm_90"),
        ({"a": kernel("sm_90", shared=300_000)}, "holds kernels for sm_90"),
        ({"a": kernel("sm_90"), "b": kernel("sm_80")}, "--target sm_90"),
        ({}, "holds no GPU kernels"),
    ],
)
def test_no_target_that_runs_is_an_error_that_names_what_there_is(kernels, words):
    with pytest.raises(UserError, match=words):
        choose_target(kernels, (9, 0), 232_448, "a GPU")


def test_cases_by_count_and_by_decode():
    launches = [(Launch("kernel", str(i), ()),) for i in range(4)]
    program = Program(
        (
            Case(1, 1, launches[0], decode=True),
            Case(1, 16, launches[1]),
            Case(17, 0, launches[2], decode=False),
        )
    )
    found = {(n, d): choose_case(program, n, d) for n in (1, 2, 16, 17, 5000) for d in (True, False)}
    assert found[1, True].launches == launches[0]
    assert found[1, False].launches == found[2, True].launches == found[16, False].launches == launches[1]
    assert found[17, False].launches == found[5000, False].launches == launches[2]
    assert found[17, True] is None


def test_cases_by_context():
    """One that is bound serves contexts up to its bound, and none of which nothing is known."""
    launches = [(Launch("kernel", str(i), ()),) for i in range(3)]
    program = Program(
        (
            Case(1, 1, launches[0], decode=True, max_context=257),
            Case(1, 1, launches[1], decode=True, max_context=513),
            Case(1, 0, launches[2]),
        )
    )
    contexts = {1: 0, 257: 0, 258: 1, 513: 1, 514: 2, 0: 2}
    assert {n: launches.index(choose_case(program, 1, True, n).launches) for n in contexts} == contexts
    assert choose_case(program, 2, True, 5).launches == choose_case(program, 1, False, 5).launches == launches[2]
    assert context_bounds([program, program], 1) == [257, 513]
    assert context_bounds([program], 2) == []


def test_grids():
    extents = (Extent(3, "T", 16, plus=1), Extent(5), Extent(2, "R"))
    assert grid_of(extents, SIZES) == (3 * 2 + 3, 5, 4)
    assert grid_of((), SIZES) == (1, 1, 1)


def test_arguments_become_slots():
    assert argument_bits("*fp16", 0x7F0000001000) == 0x7F0000001000
    assert argument_bits("i32", -1) & 0xFFFFFFFF == 0xFFFFFFFF
    assert argument_bits("fp32", 1.5) == struct.unpack("<I", struct.pack("<f", 1.5))[0]
    with pytest.raises(TypeError, match="bool"):
        argument_bits("bool", 1)


def test_a_bound_kernel_follows_sizes_and_keeps_addresses(tmp_path):
    (tmp_path / "k.cubin").write_bytes(b"image")
    table_kernel = Kernel("k.py", "t", ("*fp16", "i32", "i32"), {"sm_90": Cubin("k.cubin", "k", 1000, 8, 32, 0, True)})
    driver = RecordingDriver()
    table = KernelTable({"k": table_kernel}, tmp_path, "sm_90", driver)
    addresses = {"in.x": 4096}
    bound = table.bind(
        Launch("kernel", "k", ("in.x", "T", "blocks"), (Extent(1, "T", 8), Extent(1, "B"))),
        Bindings(addresses.__getitem__, lambda name: torch.empty(0)),
    )
    bound.launch(SIZES, 11)
    bound.launch(replace(SIZES, T=5, B=1), 11)
    bound.launch(replace(SIZES, T=0, B=0), 11)
    assert driver.images == [b"image"]
    first, second = driver.launches
    assert first["grid"] == (3, 3, 1)
    assert first["slots"] == [4096, 17, 64, 0, 0]
    assert (first["block"], first["shared"], first["stream"], first["function"]) == (256, 1000, 11, 7)
    assert first["attributes"] == 1
    assert second["grid"] == (1, 1, 1)
    assert second["slots"] == [4096, 5, 64, 0, 0]


def test_launch_attributes():
    driver = RecordingDriver()
    prepared = PreparedLaunch(driver, Function(1, 4, 0, pdl=True, num_ctas=2), (), [])
    assert prepared._attributes[0].id == LAUNCH_PROGRAMMATIC_DEPENDENCY
    assert len(prepared._attributes) == 3
    prepared.set_grid((5, 2, 1))
    assert prepared.config.grid_x == 10
    assert len(PreparedLaunch(driver, Function(1, 4, 0), (), [])._attributes) == 0


@pytest.mark.parametrize("in_scratch", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_library_launch_passes_the_rows_of_the_step(name, in_scratch):
    """x and out may lie in scratch memory, as bytes."""
    names = {"bias": "w.bias", "residual": "in.residual0"}
    shapes = {"in.x": (20, 4), "w.weight": (6, 4), "out.y": (20, 6), "w.bias": (6,), "in.residual0": (20, 6)}
    tensors = {n: torch.randn(shape).half() for n, shape in shapes.items()}
    x, weight, _, bias, residual = (t.double() for t in tensors.values())
    tensors["out.y"].fill_(torch.nan)
    views = tensors | {n: tensors[n].view(torch.uint8) for n in ("in.x", "out.y") if in_scratch}
    args = ("in.x", "w.weight", "out.y", "T", *(a for n, a in names.items() if getattr(PRODUCTS[name], n)))
    table = KernelTable({}, None, "sm_90", RecordingDriver(), SimulatedLibrary())
    bound = table.bind(Launch("library", name, args), Bindings(lambda name: 0, views.__getitem__))
    bound.launch(SIZES, 0)
    expected = x @ weight.T + (bias if "bias" in name else 0)
    expected = ACTIVATIONS[PRODUCTS[name].activation](expected) + (residual if "add" in name else 0)
    assert rms_ratio(tensors["out.y"][:17], expected[:17]) < 1e-3
    assert tensors["out.y"][17:].isnan().all()


def test_a_library_launch_may_take_some_rows_of_the_weight():
    tensors = {"in.x": torch.randn(20, 4), "w.weight": torch.randn(9, 4), "out.y1": torch.empty(20, 5)}
    tensors["w.bias"] = torch.randn(9)
    launch = Launch("library", "mm_bias", ("in.x", "w.weight", "out.y1", "T", "w.bias"), rows=(3, 8))
    table = KernelTable({}, None, "sm_90", RecordingDriver(), SimulatedLibrary())
    table.bind(launch, Bindings(lambda name: 0, tensors.__getitem__)).launch(SIZES, 0)
    expected = tensors["in.x"].double() @ tensors["w.weight"][3:8].double().T + tensors["w.bias"][3:8]
    assert rms_ratio(tensors["out.y1"][:17], expected[:17]) < 1e-6


def test_an_unknown_library_operation_is_refused():
    table = KernelTable({}, None, "sm_90", RecordingDriver(), SimulatedLibrary())
    with pytest.raises(UserError, match=r"'fft'.*update dscompile"):
        table.bind(Launch("library", "fft", ()), Bindings(lambda name: 0, lambda name: torch.empty(0)))
