"""Weights: read by name from the artifact's shards onto a device, or made there from a seed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dscompile.runtime.errors import UserError
from dscompile.runtime.int8 import LARGEST
from dscompile.runtime.kv_cache import dtype_of
from dscompile.runtime.manifest import Manifest
from dscompile.runtime.plan import Plan, Weight
from dscompile.runtime.weight_stream import Piece, pieces_of, read_pieces

SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_ITEM_BYTES = {stored: getattr(torch, name).itemsize for name, stored in SAFETENSORS_DTYPES.items()}
ROW_SUM = "row_sum:"
NORMAL = "normal:"
FILL = "fill:"
INT8 = "int8"


def shards(manifest: Manifest, rank: int = 0) -> list[str]:
    """Paths inside the artifact of the files that hold a rank's weights, in order."""
    return sorted(name for name in manifest.files if name.startswith(f"weights/rank{rank}-"))


def weight_bytes(plan: Plan) -> int:
    """Bytes of all weights on the device."""
    return sum(_numel(w.shape) * dtype_of(w.dtype).itemsize for w in plan.weights.values())


def load_weights(
    artifact: str | Path, manifest: Manifest, plan: Plan, device: torch.device | str, rank: int = 0
) -> dict[str, torch.Tensor]:
    """Read or make every weight of the plan: name -> tensor of the plan's shape and dtype on the device."""
    device = torch.device(device)
    paths = [Path(artifact) / name for name in shards(manifest, rank)]
    loaded = _read_to_cpu(paths) if device.type == "cpu" else _read_to_gpu(paths, plan, device)
    made = [name for name in plan.weights if name not in loaded]
    for name in sorted(made, key=lambda n: plan.weights[n].init.startswith(ROW_SUM)):
        loaded[name] = make_weight(name, plan.weights[name], manifest.seed, device, loaded)
    return {name: loaded[name] for name in plan.weights}


def _read_to_cpu(paths: list[Path]) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                # A tensor is a view of the mapped file, which may change or go away under us.
                loaded |= {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be read ({error}); copy the artifact again") from error
    return loaded


def _read_to_gpu(paths: list[Path], plan: Plan, device: torch.device) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = {}
    pieces: list[Piece] = []
    for path in paths:
        for key, entry in read_header(path).items():
            weight = plan.weights[key]
            loaded[key] = torch.empty(weight.shape, dtype=dtype_of(weight.dtype), device=device)
            pieces += pieces_of(path, entry.offset, loaded[key])
    torch.cuda.current_stream(device).synchronize()
    read_pieces(pieces, device)
    return loaded


def make_weight(
    name: str, weight: Weight, seed: int, device: torch.device, others: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Make a weight by its `init`; the same for one seed and name on one type of device, whatever the order."""
    dtype = dtype_of(weight.dtype)
    if weight.init == "ones":
        return torch.ones(weight.shape, dtype=dtype, device=device)
    if weight.init == "zeros":
        return torch.zeros(weight.shape, dtype=dtype, device=device)
    if weight.init.startswith(FILL):
        return torch.full(weight.shape, float(weight.init.removeprefix(FILL)), dtype=dtype, device=device)
    if weight.init.startswith(ROW_SUM):
        return others[weight.init.removeprefix(ROW_SUM)].sum(-1, dtype=torch.float32).to(dtype)
    # 32 bits, because the CPU's generator ignores the others.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if weight.init == INT8:
        return torch.randint(-LARGEST, LARGEST + 1, weight.shape, dtype=dtype, device=device, generator=generator)
    std = float(weight.init.removeprefix(NORMAL))
    return torch.empty(weight.shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


# ---------------------------------------------------------------- check


def check_shards(root: Path, manifest: Manifest, plan: Plan) -> None:
    """Compare the shards' headers with the plan, reading no data. Raises UserError naming file and weight."""
    for rank in range(manifest.num_ranks):
        found: dict[str, str] = {}
        for name in shards(manifest, rank):
            for key, entry in read_header(root / name).items():
                weight = plan.weights.get(key)
                if weight is None:
                    raise UserError(
                        f"{root}: {name} holds {key!r}, which the plan does not use; copy the artifact again"
                    )
                if key in found:
                    raise UserError(f"{root}: {key!r} is in both {found[key]} and {name}; compile the model again")
                if (entry.dtype, entry.shape) != (SAFETENSORS_DTYPES.get(weight.dtype), weight.shape):
                    held, wanted = f"{entry.dtype} {list(entry.shape)}", f"{weight.dtype} {list(weight.shape)}"
                    raise UserError(f"{root}: {key!r} in {name} is {held}, the plan says {wanted}")
                found[key] = name
        for key, weight in plan.weights.items():
            if key not in found and not _can_be_made(weight, manifest, plan):
                raise UserError(f"{root}: no file holds the weight {key!r}; copy the artifact again")


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file; offset: of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor in a safetensors file. Raises UserError if header or size are wrong."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, 100 << 20):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, its header says {8 + length + end}")
        return {key: _entry(key, entry, 8 + length) for key, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy the artifact again") from error


def _entry(key: str, fields: dict[str, Any], data: int) -> Entry:
    start, stop = fields["data_offsets"]
    size = _ITEM_BYTES.get(fields["dtype"])
    if start < 0 or (size is not None and stop - start != size * _numel(fields["shape"])):
        raise ValueError(f"{key!r} has {stop - start} bytes")
    return Entry(fields["dtype"], tuple(fields["shape"]), data + start)


def _can_be_made(weight: Weight, manifest: Manifest, plan: Plan) -> bool:
    if weight.init.startswith(ROW_SUM):
        return weight.init.removeprefix(ROW_SUM) in plan.weights
    return manifest.weights == "dummy" and _INITS.get(weight.init.partition(":")[0], _never)(weight.init)


def _is_normal(init: str) -> bool:
    try:
        return float(init.removeprefix(NORMAL)) >= 0
    except ValueError:
        return False


def _is_fill(init: str) -> bool:
    try:
        return math.isfinite(float(init.removeprefix(FILL)))
    except ValueError:
        return False


def _never(init: str) -> bool:
    return False


def _always(init: str) -> bool:
    return True


_INITS: dict[str, Callable[[str], bool]] = {
    "ones": _always,
    "zeros": _always,
    "int8": _always,
    "fill": _is_fill,
    "normal": _is_normal,
}


def _numel(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
