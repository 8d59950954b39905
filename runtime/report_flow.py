"""Which activation goes from which kernel to which, and on which rail it passes the kernels between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ENTRY = -1


@dataclass(frozen=True)
class Kernel:
    """What a kernel reads and writes, by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """An activation from kernel `start` (ENTRY: it comes from outside) to kernel `end`, drawn on rail `lane`."""

    name: str
    start: int
    end: int
    lane: int = 0


@dataclass(frozen=True)
class Flow:
    """The drawing's edges.

    entering: names that come from outside; leaving: names that nothing here reads
    adjacent: per kernel, names it gets from the kernel before (for the first one: from outside)
    skips:    edges that pass at least one kernel; those that overlap have different lanes, 0 nearest to the kernels
    """

    entering: tuple[str, ...]
    leaving: tuple[str, ...]
    adjacent: tuple[tuple[str, ...], ...]
    skips: tuple[Edge, ...]


def flow(kernels: Sequence[Kernel]) -> Flow:
    """Connect each input to the latest earlier kernel that writes it, else to the outside."""
    writer: dict[str, int] = {}
    adjacent: list[tuple[str, ...]] = []
    entering: dict[str, None] = {}
    read: set[tuple[str, int]] = set()
    skips: list[Edge] = []
    for index, kernel in enumerate(kernels):
        here = []
        for name in kernel.inputs:
            start = writer.get(name, ENTRY)
            read.add((name, start))
            if start == ENTRY:
                entering[name] = None
            if start == index - 1:
                here.append(name)
            else:
                skips.append(Edge(name, start, index))
        adjacent.append(tuple(here))
        writer.update(dict.fromkeys(kernel.outputs, index))
    leaving = tuple(name for name, index in writer.items() if (name, index) not in read)
    return Flow(tuple(entering), leaving, tuple(adjacent), _lanes(skips))


def _lanes(edges: Sequence[Edge]) -> tuple[Edge, ...]:
    """Give short edges the inner lanes; two edges share a lane where one ends before the other starts."""
    placed: list[Edge] = []
    for edge in sorted(edges, key=lambda e: (e.end - e.start, e.start)):
        taken = {p.lane for p in placed if p.start < edge.end and edge.start < p.end}
        lane = next(n for n in range(len(placed) + 1) if n not in taken)
        placed.append(Edge(edge.name, edge.start, edge.end, lane))
    return tuple(placed)
