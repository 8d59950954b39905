"""The report of a compilation: what was fused, what was not and why, and how the result compares with the original."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dscompile.runtime.errors import UserError


@dataclass(frozen=True)
class Node:
    """A node of the normalised graph that a region took in. shape: its value's, such as "[1, T, 4096]"."""

    name: str
    op: str
    shape: str = ""


@dataclass(frozen=True)
class Region:
    """One region of a layer class, as the fusion rules built it.

    name:          embed norm attn_in attention attn_out mlp_in mlp_out moe head sample
    step:          the step of the plan that executes it; a packed linear is listed under each name it covers, and
                   those records share one step
    nodes:         what it took in, in dataflow order
    kernels:       range of tokens in a step ("1", "2-4", "65+", "1, context to 257") -> launches, in order; empty
                   without a GPU target
    inputs, outputs: names of the activations it reads and writes
    bytes_saved:   activation bytes per token that the unfused nodes would have written and read again, in one layer
    time_us:       range of tokens -> microseconds measured in one layer; empty where no GPU was at hand
    """

    name: str
    rule: str
    nodes: tuple[Node, ...] = ()
    kernels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    bytes_saved: int = 0
    time_us: dict[str, float] = field(default_factory=dict)
    step: str = ""


@dataclass(frozen=True)
class NearMiss:
    """A rule that matched a shape at `node` and refused: the first predicate that failed, in words."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class LayerClass:
    """Layers with one graph. `layers` holds their indices; it is empty for what stands outside the layers."""

    count: int
    layers: tuple[int, ...]
    regions: tuple[Region, ...]
    near_misses: tuple[NearMiss, ...] = ()

    def steps(self) -> Iterator[tuple[tuple[str, ...], Region]]:
        """Yield each step once with every name its region is listed under."""
        names: dict[str, list[str]] = {}
        first: dict[str, Region] = {}
        for index, region in enumerate(self.regions):
            key = region.step or f"#{index}"
            names.setdefault(key, []).append(region.name)
            first.setdefault(key, region)
        for key, region in first.items():
            yield tuple(names[key]), region


@dataclass(frozen=True)
class Fallback:
    """A node that no region could take: torch executes it."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Check:
    """One comparison with the original: an error that must not exceed its limit, both RMS(err)/RMS(ref)."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Verification:
    """How the artifact compares with the original model.

    status:  "passed", "failed" or "skipped"
    model:   what was compared: the model itself, or its two-layer stand-in
    against: the reference, such as "transformers 5.17.0 eager, float32"
    device:  where the artifact ran;  kernels: "executed" or "not executed"
    note:    why it was skipped, or what the reader should know
    """

    status: str = "skipped"
    model: str = ""
    against: str = ""
    device: str = ""
    kernels: str = "not executed"
    checks: tuple[Check, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The whole report. The JSON form has exactly these keys, at every level."""

    classes: tuple[LayerClass, ...]
    fallbacks: tuple[Fallback, ...] = ()
    verification: Verification = field(default_factory=Verification)
    quantization: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def bytes_saved(self) -> int:
        """Activation bytes per token not moved, over the whole model."""
        return sum(c.count * region.bytes_saved for c in self.classes for _, region in c.steps())

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """Raise KeyError or TypeError if the data is not a report."""
        return Report(
            classes=tuple(_layer_class(c) for c in data["classes"]),
            fallbacks=tuple(Fallback(**f) for f in data["fallbacks"]),
            verification=_verification(data["verification"]),
            quantization=data["quantization"],
            model=data.get("model", {}),
        )


def read_report(artifact: Path) -> Report:
    """Read report.json of an artifact. Raises UserError if there is none or it cannot be read."""
    path = artifact / "report.json"
    try:
        return Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{artifact}: no report.json here; give the directory that dscompile wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a report ({error}); compile the model again") from error


def _layer_class(data: dict[str, Any]) -> LayerClass:
    return LayerClass(
        count=data["count"],
        layers=tuple(data["layers"]),
        regions=tuple(_region(r) for r in data["regions"]),
        near_misses=tuple(NearMiss(**m) for m in data["near_misses"]),
    )


def _region(data: dict[str, Any]) -> Region:
    nodes = tuple(Node(**n) for n in data["nodes"])
    lists = {key: tuple(data.get(key, ())) for key in ("inputs", "outputs")}
    kernels = {tokens: tuple(names) for tokens, names in data["kernels"].items()}
    return Region(**{**data, **lists, "nodes": nodes, "kernels": kernels})


def _verification(data: dict[str, Any]) -> Verification:
    return Verification(**{**data, "checks": tuple(Check(**c) for c in data.get("checks", ()))})
