"""The CUDA driver through ctypes: modules, launches and asynchronous copies in the context that torch already uses."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

MAX_DEFAULT_SHARED = 48 * 1024
FUNCTION_MAX_DYNAMIC_SHARED = 8
LAUNCH_CLUSTER_DIMENSION = 4
LAUNCH_CLUSTER_POLICY = 5
LAUNCH_PROGRAMMATIC_DEPENDENCY = 6
CLUSTER_POLICY_SPREAD = 1
MEMORY_HOST, MEMORY_DEVICE = 1, 2
HIDDEN_PARAMETERS = 2  # Triton appends pointers to memory for tensor descriptors and to memory for profiling

_FLOAT_FORMATS = {"fp16": ("<e", "<H"), "fp32": ("<f", "<I"), "fp64": ("<d", "<Q")}


class CudaError(RuntimeError):
    """A driver call that failed, with the driver's name and words for the error."""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, 72 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint64 * 8))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, 56 bytes."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D, 128 bytes."""

    _fields_ = (
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_type", ctypes.c_int),
        ("source_host", ctypes.c_void_p),
        ("source_device", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_type", ctypes.c_int),
        ("target_host", ctypes.c_void_p),
        ("target_device", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


@dataclass(frozen=True)
class Function:
    """A loaded kernel with what each of its launches needs: threads, dynamic shared memory (bytes), attributes."""

    handle: int
    num_warps: int
    shared: int
    pdl: bool = False
    num_ctas: int = 1


class Driver:
    """libcuda.so.1. Addresses are integers; sizes are bytes; streams are handles (`torch.cuda.Stream.cuda_stream`)."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"no NVIDIA driver on this machine ({error})") from error

    def load_function(self, image: bytes, symbol: str, shared: int) -> int:
        """Load a cubin into the current context and return its kernel `symbol`, allowed `shared` bytes a block."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._library.cuModuleLoadData(ctypes.byref(module), image), f"loading {symbol}")
        self._check(
            self._library.cuModuleGetFunction(ctypes.byref(function), module, symbol.encode()), f"finding {symbol}"
        )
        if shared > MAX_DEFAULT_SHARED:
            attribute = ctypes.c_int(FUNCTION_MAX_DYNAMIC_SHARED)
            self._check(
                self._library.cuFuncSetAttribute(function, attribute, ctypes.c_int(shared)),
                f"reserving {shared} bytes of shared memory for {symbol}",
            )
        assert function.value is not None
        return function.value

    def launch(self, config: ctypes.Structure, function: ctypes.c_void_p, parameters: ctypes.Array) -> None:
        """Launch a kernel on config.stream."""
        status = self._library.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None)
        if status:
            self._check(status, "launching a kernel")

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy pinned host memory to the device, in stream order."""
        status = self._library.cuMemcpyHtoDAsync_v2(
            ctypes.c_uint64(target), ctypes.c_void_p(source), ctypes.c_size_t(num_bytes), ctypes.c_void_p(stream)
        )
        self._check(status, "copying to the device")

    def copy_rows_to_device(self, target: int, source: int, pitch: int, width: int, rows: int, stream: int) -> None:
        """Copy the first `width` bytes of each of `rows` rows, `pitch` bytes apart on both sides, in stream order."""
        copy = Copy2D(
            source_type=MEMORY_HOST,
            source_host=source,
            source_pitch=pitch,
            target_type=MEMORY_DEVICE,
            target_device=target,
            target_pitch=pitch,
            width=width,
            height=rows,
        )
        status = self._library.cuMemcpy2DAsync_v2(ctypes.byref(copy), ctypes.c_void_p(stream))
        self._check(status, "copying rows to the device")

    def _check(self, status: int, doing: str) -> None:
        if not status:
            return
        name, words = ctypes.c_char_p(), ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(name))
        self._library.cuGetErrorString(status, ctypes.byref(words))
        described = [(text.value or b"").decode() for text in (name, words)]
        raise CudaError(f"{doing}: {described[0] or status} ({described[1]})")


class PreparedLaunch:
    """A kernel bound to its arguments, so that a launch changes only the sizes that differ from the last one."""

    def __init__(
        self,
        driver: Driver,
        function: Function,
        types: tuple[str, ...],
        values: list[int | float],
        descriptors: int = 0,
    ) -> None:
        """descriptors: address of the memory in which its programs build tensor descriptors, for kernels that do."""
        if len(types) != len(values):
            raise ValueError(f"{len(values)} arguments for {len(types)} parameters")
        num_slots = len(values) + HIDDEN_PARAMETERS
        bits = [argument_bits(kind, value) for kind, value in zip(types, values, strict=True)]
        self.slots = (ctypes.c_uint64 * num_slots)(*bits, descriptors, 0)
        base = ctypes.addressof(self.slots)
        self._parameters = (ctypes.c_void_p * num_slots)(*[base + 8 * i for i in range(num_slots)])
        self._attributes = launch_attributes(function)
        self.config = LaunchConfig(
            grid_y=1,
            grid_z=1,
            block_x=32 * function.num_warps,
            block_y=1,
            block_z=1,
            shared=function.shared,
            attributes=ctypes.addressof(self._attributes),
            num_attributes=len(self._attributes),
        )
        self._driver, self._num_ctas = driver, function.num_ctas
        self._function = ctypes.c_void_p(function.handle)

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        """Set the number of programs along x, y and z."""
        self.config.grid_x = grid[0] * self._num_ctas
        self.config.grid_y, self.config.grid_z = grid[1], grid[2]

    def launch(self, stream: int) -> None:
        """Launch on `stream`, captured if the stream is."""
        self.config.stream = stream
        self._driver.launch(self.config, self._function, self._parameters)


def launch_attributes(function: Function) -> ctypes.Array:
    """The CUlaunchAttribute array of a kernel: overlap with the kernel before it, thread block clusters."""
    attributes = []
    if function.pdl:
        attribute = LaunchAttribute(id=LAUNCH_PROGRAMMATIC_DEPENDENCY)
        attribute.value[0] = 1
        attributes.append(attribute)
    if function.num_ctas > 1:
        dimension = LaunchAttribute(id=LAUNCH_CLUSTER_DIMENSION)
        dimension.value[0] = function.num_ctas | (1 << 32)  # three 32-bit words: x, y, z
        dimension.value[1] = 1
        policy = LaunchAttribute(id=LAUNCH_CLUSTER_POLICY)
        policy.value[0] = CLUSTER_POLICY_SPREAD
        attributes += [dimension, policy]
    return (LaunchAttribute * len(attributes))(*attributes)


def argument_bits(kind: str, value: int | float) -> int:
    """The 64-bit slot of an argument of a Triton type ("*fp16", "i32", "u32", "fp32"); low bytes first.

    Raises TypeError for a type that a launch cannot pass.
    """
    if kind.startswith("*"):
        return int(value)
    if kind in _FLOAT_FORMATS:
        pack, unpack = _FLOAT_FORMATS[kind]
        return struct.unpack(unpack, struct.pack(pack, value))[0]
    if kind[0] in "iu" and kind[1:].isdigit():
        return int(value) & (2**64 - 1)
    raise TypeError(f"a kernel parameter of type {kind!r} is not supported")
