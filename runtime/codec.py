"""Frozen dataclasses to JSON and back, strictly: an unknown, missing or ill-typed field is an error with its path."""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class FormatError(ValueError):
    """The data does not have the shape its type asks for."""


_hints = cache(get_type_hints)


def encode(value: Any) -> Any:
    """Return JSON data for a dataclass, leaving out fields that hold their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if not _is_default(value, f)
        }
        return {"op": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    return value


def decode(kind: Any, data: Any, path: str = "") -> Any:
    """Build a value of type `kind` (dataclass, union of dataclasses, tuple, dict, Literal or scalar) from JSON data."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, path)
    if origin is Literal:
        if data not in args:
            raise FormatError(f"{path}: {data!r} is none of {', '.join(map(repr, args))}")
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, path)
    if origin is tuple or kind is tuple:
        _expect(list, data, path)
        items = args[:1] * len(data) if len(args) == 2 and args[1] is ... else args
        if not args:
            return _freeze(data)
        if len(items) != len(data):
            raise FormatError(f"{path}: expected {len(items)} items, found {len(data)}")
        return tuple(decode(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(items, data, strict=True)))
    if origin is dict:
        _expect(dict, data, path)
        return {k: decode(args[1], v, f"{path}.{k}") for k, v in data.items()}
    if kind is float and type(data) is int:
        return float(data)
    _expect(kind, data, path)
    return data


def _decode_union(kinds: tuple, data: Any, path: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    options = [k for k in kinds if k is not type(None)]
    if len(options) == 1:
        return decode(options[0], data, path)
    tag = data.get("op") if isinstance(data, dict) else None
    for option in options:
        if getattr(option, "__name__", None) == tag:
            return decode(option, data, path)
    raise FormatError(f"{path}: op {tag!r} is not known to this runtime")


def _decode_dataclass(kind: Any, data: Any, path: str) -> Any:
    _expect(dict, data, path)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if data.get("op", kind.__name__) != kind.__name__:
        raise FormatError(f"{path}: expected {kind.__name__}, found {data['op']!r}")
    for name in data.keys() - fields.keys() - {"op"}:
        raise FormatError(f"{path}.{name}: unknown field")
    for name, f in fields.items():
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name not in data and not has_default:
            raise FormatError(f"{path}.{name}: missing")
    hints = _hints(kind)
    return kind(**{name: decode(hints[name], data[name], f"{path}.{name}") for name in fields if name in data})


def _is_default(owner: Any, f: dataclasses.Field) -> bool:
    value = getattr(owner, f.name)
    if f.default_factory is not dataclasses.MISSING:
        return value == f.default_factory()
    return f.default is not dataclasses.MISSING and type(value) is type(f.default) and value == f.default


def _expect(kind: type, data: Any, path: str) -> None:
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise FormatError(f"{path}: expected {kind.__name__}, found {type(data).__name__}")


def _freeze(data: Any) -> Any:
    return tuple(_freeze(v) for v in data) if isinstance(data, list) else data
