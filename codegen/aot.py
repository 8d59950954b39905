"""Compiles rendered kernels to cubins ahead of time, in parallel processes, cached by content; needs no GPU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from dscompile.codegen import targets as gpu
from dscompile.codegen.emit import DESCRIPTOR_BYTES, KernelRequest, render
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Cubin, Kernel

CACHE_FORMAT = 2  # of the facts kept beside a cubin


class KernelError(RuntimeError):
    """A kernel that does not compile, or does not fit its target."""


def compile_kernels(
    requests: Iterable[KernelRequest],
    targets: Sequence[str],
    kernels_dir: Path,
    progress: Callable[[int], None] | None = None,
    provenance: dict[str, str] | None = None,
    processes: int | None = None,
) -> dict[str, Kernel]:
    """Write NAME.py and NAME.sm_XX.cubin for every request into `kernels_dir` and return the plan's kernel table.

    progress:   called with the number of cubins that have just become ready
    provenance: kernel name -> lines for the head of its source (model, region, rule)
    File names in the result are relative to the parent of `kernels_dir`. Requests of one name count once.
    Raises KernelError, naming the kernel, where one does not compile or does not fit the target's shared memory.
    """
    unique = {r.name: r for r in requests}
    kernels_dir.mkdir(parents=True, exist_ok=True)
    for request in unique.values():
        source = render(request, (provenance or {}).get(request.name, ""))
        (kernels_dir / f"{request.name}.py").write_text(source)
    jobs = [(request, target) for request in unique.values() for target in targets]

    def build(job: tuple[KernelRequest, str]) -> Cubin:
        cubin = _build(*job, kernels_dir, pool)
        if progress:
            progress(1)
        return cubin

    count = min(processes or _num_cores(), max(1, len(jobs)))
    with _Workers() as pool, ThreadPoolExecutor(count) as threads:
        cubins = list(threads.map(build, jobs))
    table = {
        name: Kernel(f"{kernels_dir.name}/{name}.py", r.template, tuple(p.type for p in r.params))
        for name, r in unique.items()
    }
    for (request, target), cubin in zip(jobs, cubins, strict=True):
        table[request.name].cubins[target] = cubin
    return table


def _num_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build(request: KernelRequest, target: str, kernels_dir: Path, workers: _Workers) -> Cubin:
    options = compile_options(request, target)
    path = kernels_dir / f"{request.name}.{target}.cubin"
    key = _key(request, target, options)
    facts = _from_cache(key, path)
    if facts is None:
        facts = workers.run(
            source=str((kernels_dir / f"{request.name}.py").resolve()),
            name=request.name,
            signature={p.name: p.type for p in request.params},
            aligned=[p.name for p in request.params if p.aligned],
            capability=gpu.capability(target),
            options=options,
            out=str(path.resolve()),
        )
        if "error" in facts:
            raise KernelError(f"{request.name} does not compile for {target}: {facts['error']}")
        _to_cache(key, path, facts)
    limit = gpu.shared_limit((target,))
    if facts["shared"] > limit:
        raise KernelError(f"{request.name} asks for {facts['shared']} bytes of shared memory, {target} has {limit}")
    if facts["scratch"] != request.descriptors * DESCRIPTOR_BYTES:
        raise KernelError(f"{request.name} builds {facts['scratch']} bytes of descriptors, not {request.descriptors}")
    return Cubin(
        file=f"{kernels_dir.name}/{path.name}",
        symbol=facts["symbol"],
        shared=facts["shared"],
        num_warps=facts["num_warps"],
        registers=facts["registers"],
        spills=facts["spills"],
        pdl=bool(options.get("launch_pdl", False)),
        num_ctas=request.num_ctas,
    )


def compile_options(request: KernelRequest, target: str) -> dict[str, Any]:
    """Return Triton's compile options for a request, every name checked: Triton ignores a misspelt one in silence."""
    options: dict[str, Any] = {"num_warps": request.num_warps, "num_stages": request.num_stages}
    if request.num_ctas != 1:
        options["num_ctas"] = request.num_ctas
    if request.pdl and gpu.has_pdl(target):
        options["launch_pdl"] = True
    check_options(options)
    return options


def check_options(options: dict[str, Any]) -> None:
    """Raise KernelError for an option that Triton's CUDA backend does not know."""
    from triton.backends.nvidia.compiler import CUDAOptions

    for name in options:
        if name not in CUDAOptions.__dataclass_fields__:
            raise KernelError(f"Triton has no compile option {name!r}")


class _Workers:
    """Compiler processes, one for each thread that asks; closed together.

    Subprocesses rather than multiprocessing: a caller's script needs no `if __name__ == "__main__"` guard.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._running: list[subprocess.Popen] = []

    def __enter__(self) -> _Workers:
        self._cache = tempfile.TemporaryDirectory(prefix="dscompile-triton-")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.wait()
            process.stdout.close()
        self._cache.cleanup()

    def run(self, **job: Any) -> dict:
        process = getattr(self._local, "process", None) or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        return json.loads(answer) if answer else {"error": "the compiler process died"}

    def _start(self) -> subprocess.Popen:
        # Line information holds paths: without it, cubins are the same bytes in every directory.
        settings = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": self._cache.name, "OMP_NUM_THREADS": "1"}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "dscompile.codegen.aot_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=inherited | settings,
        )
        self._local.process = process
        self._running.append(process)
        return process


def _key(request: KernelRequest, target: str, options: dict) -> str:
    params = [[p.name, p.type, p.aligned] for p in request.params]
    data = [render(request), params, target, options, toolchain(), CACHE_FORMAT]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@cache
def toolchain() -> dict[str, str]:
    """Versions that decide a cubin's bytes: Triton's and its ptxas's."""
    import triton
    import triton.backends.nvidia as backend

    tool = Path(backend.__file__).parent / "bin" / "ptxas"
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return {"triton": triton.__version__, "ptxas": text.strip().splitlines()[-1]}


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dscompile" / "cubins"


def _from_cache(key: str, path: Path) -> dict | None:
    try:
        facts = json.loads((_cache_dir() / f"{key}.json").read_text())
        cubin = (_cache_dir() / f"{key}.cubin").read_bytes()
    except (OSError, ValueError):
        return None
    if hashlib.sha256(cubin).hexdigest() != facts.pop("sha256", ""):
        return None
    _write(path, cubin)
    return facts


def _to_cache(key: str, path: Path, facts: dict) -> None:
    cubin = path.read_bytes()
    try:
        _cache_dir().mkdir(parents=True, exist_ok=True)
        _replace(_cache_dir() / f"{key}.cubin", cubin)
        _replace(
            _cache_dir() / f"{key}.json", json.dumps(facts | {"sha256": hashlib.sha256(cubin).hexdigest()}).encode()
        )
    except OSError:
        return  # a cache that cannot be written is no cache


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
