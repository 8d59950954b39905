"""Products of matrices by cuBLASLt, through ctypes: bias, activation and residual are part of one launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dscompile.runtime.driver import CudaError
from dscompile.runtime.errors import UserError
from dscompile.runtime.products import Matrices, Product

WORKSPACE_BYTES = 32 << 20  # what cuBLAS asks for on Hopper
ALIGNMENT = 256
TRANSPOSE, COMPUTE_FLOAT32, SUM_IN_FLOAT32 = 1, 68, 2
DATA_TYPE = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
# Attributes of a product and of the choice of an algorithm; alignments of A, B, C, D.
PRODUCT_TRANSPOSE_A, PRODUCT_EPILOGUE, PRODUCT_BIAS, PRODUCT_BIAS_TYPE = 3, 7, 8, 26
CHOICE_WORKSPACE, CHOICE_REDUCTION, CHOICE_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
EPILOGUE_NONE, EPILOGUE_BIAS = 1, 4
EPILOGUE = {"none": 0, "relu": 2, "gelu_tanh": 32}

Handle = ctypes.c_void_p


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, 96 bytes."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Shape:
    """What the choice of an algorithm depends on beside the number of rows. Strides and alignments (bytes) are those
    of weight, x, residual and out."""

    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    strides: tuple[int, ...]
    alignments: tuple[int, ...]
    product: Product


@dataclass(frozen=True)
class Choice:
    """For a number of rows: layouts of x, residual and out, and the algorithm."""

    x: Handle
    residual: Handle
    out: Handle
    algorithm: Any


class CublasLt:
    """A products.Library: the one that torch has loaded, with memory to work in. All products go to one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._preferences: dict[tuple[int, ...], Handle] = {}
        self._choices: dict[tuple[Shape, int], Choice] = {}
        self._algorithms: dict[tuple[Shape, int], Any] = {}

    def bind(self, product: Product, matrices: Matrices) -> Callable[[int, int], None]:
        """Prepare a product over the addresses of matrices on the device."""
        return BoundProduct(self, product, matrices).launch

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function that is not on the way of every step."""
        if status := getattr(self._library, function)(*arguments):
            raise CudaError(f"{function} failed with status {status}")

    def matmul(self, operands: tuple[Any, ...], stream: int) -> int:
        """cublasLtMatmul with operands from the descriptor of the product to the algorithm; returns its status."""
        return self._matmul(self._handle, *operands, self._workspace.data_ptr(), WORKSPACE_BYTES, stream)

    def choose(self, shape: Shape, rows: int, description: Handle, weight: Handle) -> Choice:
        """Layouts for a number of rows, remembered, and the algorithm for as many and somewhat more."""
        if (shape, rows) not in self._choices:
            most = rounded_up(rows)
            if (shape, most) not in self._algorithms:
                layouts = (weight, *self._layouts(shape, most))
                self._algorithms[shape, most] = self._best(shape, most, description, layouts)
            self._choices[shape, rows] = Choice(*self._layouts(shape, rows), self._algorithms[shape, most])
        return self._choices[shape, rows]

    def describe(self, shape: Shape, bias: int) -> Handle:
        """The descriptor of a product; bias: an address, or 0."""
        description = Handle()
        self.call("cublasLtMatmulDescCreate", ctypes.byref(description), COMPUTE_FLOAT32, DATA_TYPE[torch.float32])
        epilogue = EPILOGUE[shape.product.activation] | (EPILOGUE_BIAS if bias else 0)
        values: dict[int, Any] = {PRODUCT_TRANSPOSE_A: ctypes.c_int32(TRANSPOSE)}
        values[PRODUCT_EPILOGUE] = ctypes.c_int32(epilogue or EPILOGUE_NONE)
        if bias:
            values |= {PRODUCT_BIAS: Handle(bias), PRODUCT_BIAS_TYPE: ctypes.c_int32(DATA_TYPE[shape.dtype])}
        self._set("cublasLtMatmulDescSetAttribute", description, values)
        return description

    def layout(self, dtype: torch.dtype, columns: int, rows: int, stride: int) -> Handle:
        """The descriptor of [rows, columns], which the library sees as its transpose."""
        found = Handle()
        sizes = (ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(stride))
        self.call("cublasLtMatrixLayoutCreate", ctypes.byref(found), DATA_TYPE[dtype], *sizes)
        return found

    def _layouts(self, shape: Shape, rows: int) -> tuple[Handle, Handle, Handle]:
        """Of x, residual and out."""
        _, x, residual, out = shape.strides
        added, stored = (self.layout(shape.out_dtype, shape.n, rows, stride) for stride in (residual, out))
        return self.layout(shape.dtype, shape.k, rows, x), added, stored

    def _best(self, shape: Shape, rows: int, description: Handle, layouts: tuple[Handle, ...]) -> Any:
        found, count = Heuristic(), ctypes.c_int()
        preference = self._preference(shape.alignments)
        function, results = "cublasLtMatmulAlgoGetHeuristic", (1, ctypes.byref(found), ctypes.byref(count))
        self.call(function, self._handle, description, *layouts, preference, *results)
        if not count.value or found.status:
            raise CudaError(f"cuBLASLt has no algorithm for {rows} rows of {shape}")
        return found.algorithm

    def _preference(self, alignments: tuple[int, ...]) -> Handle:
        if alignments not in self._preferences:
            preference = Handle()
            self.call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
            values: dict[int, Any] = {CHOICE_WORKSPACE: ctypes.c_size_t(WORKSPACE_BYTES)}
            values[CHOICE_REDUCTION] = ctypes.c_uint32(SUM_IN_FLOAT32)
            values |= {name: ctypes.c_uint32(a) for name, a in zip(CHOICE_ALIGNMENTS, alignments, strict=True)}
            self._set("cublasLtMatmulPreferenceSetAttribute", preference, values)
            self._preferences[alignments] = preference
        return self._preferences[alignments]

    def _set(self, function: str, target: Handle, values: dict[int, Any]) -> None:
        for name, value in values.items():
            self.call(function, target, name, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    @cached_property
    def _library(self) -> ctypes.CDLL:
        major = (torch.version.cuda or "").split(".")[0]
        try:
            return ctypes.CDLL(f"libcublasLt.so.{major}")
        except OSError as error:
            raise UserError(
                f"torch {torch.__version__} comes without cuBLASLt: {error}; install torch for CUDA"
            ) from None

    @cached_property
    def _handle(self) -> Handle:
        handle = Handle()
        self.call("cublasLtCreate", ctypes.byref(handle))
        return handle

    @cached_property
    def _workspace(self) -> torch.Tensor:
        return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)

    @cached_property
    def _matmul(self) -> Any:
        function = self._library.cublasLtMatmul
        function.argtypes = (*[ctypes.c_void_p] * 14, ctypes.c_size_t, ctypes.c_void_p)
        return function


class BoundProduct:
    """A product over fixed addresses; the number of rows follows the step."""

    def __init__(self, library: CublasLt, product: Product, matrices: Matrices) -> None:
        weight, out = matrices.weight, matrices.out
        residual = out if matrices.residual is None else matrices.residual
        operands = (weight, matrices.x, residual, out)
        n, k = weight.shape
        strides = tuple(m.stride(0) for m in operands)
        alignments = tuple(alignment_of(m.data_ptr()) for m in operands)
        self._shape = Shape(n, k, weight.dtype, out.dtype, strides, alignments, product)
        bias = 0 if matrices.bias is None else matrices.bias.data_ptr()
        self._description = library.describe(self._shape, bias)
        self._weight = library.layout(weight.dtype, k, n, weight.stride(0))
        self._addresses = [m.data_ptr() for m in operands]
        self._one, self._beta = ctypes.c_float(1.0), ctypes.c_float(float(product.residual))
        self._library = library
        self._rows, self._operands = 0, tuple[Any, ...]()

    def launch(self, rows: int, stream: int) -> None:
        """Launch for the first `rows` rows on `stream`, captured if the stream is."""
        if rows != self._rows:
            self._resize(rows)
        if status := self._library.matmul(self._operands, stream):
            raise CudaError(f"cublasLtMatmul failed with status {status} for {rows} rows of {self._shape}")

    def _resize(self, rows: int) -> None:
        choice = self._library.choose(self._shape, rows, self._description, self._weight)
        weight, x, residual, out = self._addresses
        first = (self._description, ctypes.addressof(self._one), weight, self._weight, x, choice.x)
        second = (ctypes.addressof(self._beta), residual, choice.residual, out, choice.out)
        self._operands = (*first, *second, ctypes.addressof(choice.algorithm))
        self._rows = rows


def rounded_up(rows: int) -> int:
    """A number of rows, at most an eighth larger from 128 on, for which an algorithm is chosen: choosing takes the host
    longer than launching, and the lengths of prompts are many."""
    step = max(16, (1 << (rows - 1).bit_length()) // 16)
    return -(-rows // step) * step


def alignment_of(address: int) -> int:
    """The largest power of two that divides an address, at most 256."""
    return min(ALIGNMENT, address & -address)
