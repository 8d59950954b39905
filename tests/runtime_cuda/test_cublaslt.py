"""What cuBLASLt is asked, with a library that only records."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch

from dscompile.runtime import cublaslt
from dscompile.runtime.cublaslt import ALIGNMENT, CublasLt, alignment_of, rounded_up
from dscompile.runtime.driver import CudaError
from dscompile.runtime.products import PRODUCTS, Matrices

EPILOGUES = {"mm": 1, "mm_bias": 4, "mm_relu": 2, "mm_gelu_tanh": 32, "mm_bias_relu": 6, "mm_bias_gelu_tanh": 36}
EPILOGUES |= {"mm_add": 1, "mm_bias_add": 4}


class RecordingLibrary:
    """Numbers what it creates; `attributes` by number and name, `calls` of cublasLtMatmul."""

    def __init__(self) -> None:
        self.attributes: dict[tuple[int, int], int] = {}
        self.layouts: dict[int, tuple[int, ...]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.choices, self.made, self.status = 0, 0, 0

    def __getattr__(self, name: str) -> Any:
        if name.endswith("SetAttribute"):
            return self._set
        return self._create

    def _create(self, made: Any, *arguments: Any) -> int:
        self.made += 1
        made._obj.value = self.made
        self.layouts[self.made] = tuple(getattr(a, "value", a) for a in arguments)
        return 0

    def _set(self, target: Any, name: int, value: Any, size: Any) -> int:
        assert ctypes.sizeof(value._obj) == size.value
        self.attributes[target.value, name] = value._obj.value
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        self.choices += 1
        arguments[-1]._obj.value = 1
        return 0

    class _Matmul:
        argtypes = ()

        def __init__(self, owner: RecordingLibrary) -> None:
            self.owner = owner

        def __call__(self, *arguments: Any) -> int:
            assert len(arguments) == len(self.argtypes)
            self.owner.calls.append(tuple(getattr(a, "value", a) for a in arguments))
            return self.owner.status

    @property
    def cublasLtMatmul(self) -> Any:
        return self._Matmul(self)


@pytest.fixture
def library(monkeypatch) -> tuple[CublasLt, RecordingLibrary]:
    recording = RecordingLibrary()
    monkeypatch.setattr(cublaslt.ctypes, "CDLL", lambda name: recording)
    return CublasLt(torch.device("cpu")), recording


def matrices(name: str, rows: int = 40) -> Matrices:
    """x and out are columns of wider matrices."""
    what, n, k = PRODUCTS[name], 24, 16
    wide = torch.randn(rows, 64).half()
    bias = torch.randn(n).half() if what.bias else None
    residual = torch.randn(rows, n).half() if what.residual else None
    return Matrices(wide[:, :k], torch.randn(n, k).half(), wide[:, 32 : 32 + n], bias, residual)


def test_a_product_may_be_stored_in_float32(library):
    lt, recording = library
    m = matrices("mm")
    lt.bind(PRODUCTS["mm"], replace(m, out=torch.empty(40, 24)))(7, 99)
    (call,) = recording.calls
    assert [recording.layouts[call[place]][0] for place in (4, 6, 9, 11)] == [2, 2, 0, 0]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_described(library, name):
    """The library sees transposes: A is the weight, turned, B is x; C is the residual, or out times zero."""
    lt, recording = library
    m = matrices(name)
    lt.bind(PRODUCTS[name], m)(7, 99)
    (call,) = recording.calls
    description, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout = call[1:12]
    assert (a, b, d) == (m.weight.data_ptr(), m.x.data_ptr(), m.out.data_ptr())
    assert c == (d if m.residual is None else m.residual.data_ptr())
    assert call[-1] == 99
    scales = [ctypes.c_float.from_address(p).value for p in (alpha, beta)]
    assert scales == [1.0, float(m.residual is not None)]
    layouts = [recording.layouts[layout] for layout in (a_layout, b_layout, c_layout, d_layout)]
    assert layouts == [(2, 16, 24, 16), (2, 16, 7, 64), (2, 24, 7, 64 if m.residual is None else 24), (2, 24, 7, 64)]
    assert recording.attributes[description, 3] == 1
    assert recording.attributes[description, 7] == EPILOGUES[name]
    assert recording.attributes.get((description, 8)) == (None if m.bias is None else m.bias.data_ptr())


def test_an_algorithm_is_chosen_once_for_a_shape_and_like_numbers_of_rows(library):
    lt, recording = library
    m = matrices("mm_add")
    first, second = (lt.bind(PRODUCTS["mm_add"], m) for _ in range(2))
    for rows in (7, 16, 17, 7):
        first(rows, 0)
        second(rows, 0)
    assert recording.choices == 2
    layouts = [[recording.layouts[call[i]][2] for i in (6, 9, 11)] for call in recording.calls]
    assert layouts == [[rows] * 3 for rows in (7, 7, 16, 16, 17, 17, 7, 7)]


def test_a_failure_says_what_failed(library):
    lt, recording = library
    recording.status = 15
    with pytest.raises(CudaError, match="status 15 for 3 rows"):
        lt.bind(PRODUCTS["mm"], matrices("mm"))(3, 0)


def test_rows_are_rounded_up_by_an_eighth_at_most():
    assert [rounded_up(n) for n in (1, 16, 65, 128, 129, 300, 2040, 8191)] == [16, 16, 80, 128, 144, 320, 2048, 8192]
    assert all(n <= rounded_up(n) <= n * 1.13 for n in range(128, 3000))


def test_alignments():
    assert [alignment_of(a) for a in (4096, 4096 + 16, 4098)] == [ALIGNMENT, 16, 2]
