"""Reads a checkpoint's safetensors one tensor at a time, under the names of the model's own parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from dscompile.passes.recipe import Source
from dscompile.runtime.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: bytes [start, stop) of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class _Converted:
    """A tensor that transformers makes of several stored ones: parts holds theirs by the converter's source pattern."""

    converter: WeightConverter
    parts: dict[str, list[_Entry]]
    target: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values()))[0].file

    def read(self) -> Tensor:
        return _convert(self.converter, {p: [_read(e) for e in entries] for p, entries in self.parts.items()})[
            self.target
        ]


class Checkpoint:
    """The tensors of a model's directory, by parameter name. Nothing is kept in memory between reads.

    Files are read, not mapped: mapped pages would count as this process's memory until their file is closed.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        """Read the headers of all shards. Raises UserError naming a file that is missing, truncated or corrupt."""
        stored: dict[str, _Entry] = {}
        for file in _shards(directory):
            stored |= _read_header(file)
        self.directory = directory
        self._entries = _under_model_names(stored, model)

    @property
    def dtype(self) -> str | None:
        """The dtype that most of the checkpoint's elements have, such as "float16"."""
        elements: dict[torch.dtype, int] = {}
        for entry in self._entries.values():
            if entry.dtype.is_floating_point:
                elements[entry.dtype] = elements.get(entry.dtype, 0) + math.prod(entry.shape)
        return str(max(elements, key=elements.__getitem__)).removeprefix("torch.") if elements else None

    def require(self, sources: Iterable[Source]) -> None:
        """Raise UserError for the first tensor that is missing or has another shape than the model's."""
        for source in sources:
            entry = self._entries.get(source.name)
            if entry is None:
                raise UserError(f"{self.directory}: the checkpoint lacks the tensor {source.name!r}")
            if entry.shape != source.shape:
                raise UserError(
                    f"{entry.file}: {source.name!r} is {list(entry.shape)}, but config.json makes it "
                    f"{list(source.shape)}; the two are of different models"
                )

    def require_values(self, values: dict[str, Tensor]) -> None:
        """Raise UserError for the first tensor that is stored with other values than these."""
        for name, value in values.items():
            entry = self._entries.get(name)
            if entry is not None and not torch.equal(self.read(name).to(value.dtype), value):
                raise UserError(
                    f"{entry.file}: {name!r} holds other values than the model's code gives it, and dscompile read the "
                    f"attention's mask from the code; save the model again with transformers"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises UserError naming the file if it cannot be read."""
        entry = self._entries[name]
        return entry.read() if isinstance(entry, _Converted) else _read(entry)


def _read(entry: _Entry) -> Tensor:
    data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            count = file.readinto(data.numpy())  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{entry.file}: cannot be read ({error.strerror})") from error
    if count != data.numel():
        raise UserError(f"{entry.file}: is truncated; download it again")
    return data.view(entry.dtype).view(entry.shape)


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    if (directory / SINGLE).is_file() and not index.is_file():
        return [directory / SINGLE]
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is not an index of shards; download it again") from error
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: is missing, though {INDEX} names it; download it again")
    return [directory / name for name in names]


def _read_header(file: Path) -> dict[str, _Entry]:
    """The entries of one file (https://huggingface.co/docs/safetensors: length, JSON header, data)."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_HEADER):
                raise ValueError("its header does not fit it")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {name: _entry(file, facts, 8 + length, size) for name, facts in header.items()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is truncated or corrupt ({error}); download it again") from error


def _entry(file: Path, facts: dict, base: int, size: int) -> _Entry:
    start, stop = facts["data_offsets"]
    dtype = _DTYPES.get(facts["dtype"])
    if dtype is None:
        raise UserError(f"{file}: holds {facts['dtype']}, which dscompile does not read; give the original model")
    shape = tuple(facts["shape"])
    if not 0 <= start <= stop or base + stop > size:
        raise ValueError(f"{size} bytes, but its tensors need {base + stop}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's shape and size disagree")
    return _Entry(file, dtype, shape, base + start, base + stop)


def _under_model_names(stored: dict[str, _Entry], model: PreTrainedModel) -> dict[str, _Entry | _Converted]:
    """Rename and join a checkpoint's tensors as transformers does when it loads them.

    transformers' renamings first, then at most one conversion of several tensors into one (experts that are stored one
    by one), then the base model's prefix, which some checkpoints lack and others have too many of. Tied weights are
    found under whichever of their names is stored.
    """
    wanted = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    entries: dict[str, _Entry | _Converted] = {}
    parts: dict[str, tuple[WeightConverter, dict[str, list[_Entry]]]] = {}
    for key in sorted(stored, key=_natural):
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        converter, pattern = None, None
        if key not in wanted and name not in wanted:
            converter, name, pattern = _first_conversion(converters, name)
        candidates = (key, name, prefix + name, name.removeprefix(prefix))
        name = next((c for c in candidates if c in wanted), name)
        if converter is None or pattern is None:
            entries[name] = stored[key]
        else:
            parts.setdefault(name, (converter, {}))[1].setdefault(pattern, []).append(stored[key])
    for name, (converter, found) in parts.items():
        entries |= _converted(name, converter, found)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if source not in entries and target in entries:
            entries[source] = entries[target]
    return entries


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts experts.2 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _first_conversion(converters: list[WeightConverter], name: str) -> tuple[WeightConverter | None, str, str | None]:
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return converter, renamed, pattern
    return None, name, None


def _converted(name: str, converter: WeightConverter, parts: dict[str, list[_Entry]]) -> dict[str, _Converted]:
    """The tensors a conversion makes, by name; their shapes are found by converting empty ones."""
    first = next(iter(parts.values()))[0]
    empty = {p: [torch.empty(e.shape, dtype=e.dtype, device="meta") for e in es] for p, es in parts.items()}
    try:
        made = _convert(converter, empty)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{first.file}: the tensors of {name!r} cannot be joined ({reason})") from error
    head = converter.target_patterns[0]
    return {
        name.replace(head, target): _Converted(converter, parts, target, tensor.dtype, tuple(tensor.shape))
        for target, tensor in made.items()
    }


def _convert(converter: WeightConverter, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Apply a conversion's operations, in the order of its source patterns."""
    current: Any = {p: tensors[p] for p in converter.source_patterns if p in tensors}
    for operation in converter.operations:
        current = operation.convert(
            current, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
        )
    return current
