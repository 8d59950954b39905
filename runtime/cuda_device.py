"""One GPU as the executor uses it: a stream of its own, events, pinned memory and captured graphs, through torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from dscompile.runtime.cublaslt import CublasLt
from dscompile.runtime.driver import Driver
from dscompile.runtime.kernels import device_target
from dscompile.runtime.plan import Kernel


class CudaDevice:
    """All work goes to `stream`, in order; `driver` reaches the context that torch made for the device, `library`
    multiplies matrices there."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device("cuda", torch.device(device).index or 0)
        torch.cuda.set_device(self.device)
        self._stream = torch.cuda.Stream(self.device)
        self.stream: int = self._stream.cuda_stream
        self.driver = Driver()
        self.library = CublasLt(self.device)
        self._pool = torch.cuda.graph_pool_handle()

    def target(self, kernels: Mapping[str, Kernel]) -> str:
        """The target of an artifact's kernels that this GPU runs; UserError if there is none."""
        return device_target(kernels, self.device)

    def active(self) -> AbstractContextManager:
        """Make the device and its stream torch's current ones."""
        torch.cuda.set_device(self.device)
        return torch.cuda.stream(self._stream)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event) -> None:
        """Let `event` happen when everything launched so far is done."""
        event.record(self._stream)

    def pinned(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Zeros in host memory that copies do not wait for."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def free_bytes(self) -> int:
        """Device memory that is not allocated, what torch keeps for reuse included."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def synchronize(self) -> None:
        """Wait for everything launched on this device."""
        torch.cuda.synchronize(self.device)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture what `run` launches, without executing it; returns a function that launches it all at once."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
        return graph.replay
