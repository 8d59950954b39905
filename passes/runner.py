"""Runs the pipeline: times each pass, checks the invariants after it, writes the graph when asked to."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dscompile.passes.evaluate import NoValue
from dscompile.passes.graph import ModelGraph
from dscompile.passes.rule import Log
from dscompile.passes.show import show
from dscompile.runtime.errors import UserError

Pass = Callable[[ModelGraph, Log], None]


@dataclass(frozen=True)
class Phase:
    """Passes that make the same promise about numerics."""

    name: str
    passes: tuple[Pass, ...]


@dataclass
class PassRecord:
    """One pass as it ran: nodes before and after, milliseconds, what its rules matched and refused."""

    phase: str
    name: str
    nodes_before: int
    nodes_after: int
    milliseconds: float
    log: Log = field(default_factory=Log)


def run_pipeline(
    graph: ModelGraph,
    pipeline: Iterable[Phase],
    dump_dir: Path | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[PassRecord]:
    """Run the phases in order on the graph, in place. With dump_dir, NN_pass.py and NN_pass.diff show each change."""
    records: list[PassRecord] = []
    text = show(graph) if dump_dir else ""
    if dump_dir:
        dump_dir.mkdir(parents=True, exist_ok=True)
        (dump_dir / "00_traced.py").write_text(text)
    for phase in pipeline:
        for one in phase.passes:
            progress(one.__name__)
            record = PassRecord(phase.name, one.__name__, len(graph.graph.nodes), 0, 0.0)
            start = time.perf_counter()
            try:
                one(graph, record.log)
            except NoValue as reason:
                raise UserError(f"{one.__name__}: {reason}; report the architecture") from reason
            graph.drop_dead()
            record.milliseconds = (time.perf_counter() - start) * 1e3
            record.nodes_after = len(graph.graph.nodes)
            check_invariants(graph, one.__name__)
            records.append(record)
            if dump_dir:
                text = _dump(dump_dir, f"{len(records):02d}_{one.__name__}", text, show(graph))
    if dump_dir:
        (dump_dir / "passes.txt").write_text(table(records))
    return records


def check_invariants(graph: ModelGraph, after: str) -> None:
    """Every node has a value, the graph lints, every weight has exactly one recipe."""
    graph.graph.lint()
    for node in graph.graph.nodes:
        assert node.op == "output" or "val" in node.meta, f"{after}: {node.name} has no meta['val']"
    weights = [n.meta["weight"] for n in graph.graph.nodes if "weight" in n.meta]
    assert len(weights) == len(set(weights)), f"{after}: a weight has two placeholders"
    assert set(weights) == set(graph.recipes), f"{after}: recipes and weights differ"


def table(records: list[PassRecord]) -> str:
    """The passes as text: nodes before and after, time, matches, refusals with reasons."""
    lines = [f"{'phase':<12}{'pass':<28}{'nodes':>13}{'ms':>9}  matches"]
    for r in records:
        matches = ", ".join(f"{rule} x{count}" for rule, count in r.log.matches.items())
        lines.append(
            f"{r.phase:<12}{r.name:<28}{r.nodes_before:>6} ->{r.nodes_after:>4}{r.milliseconds:>9.1f}  {matches}"
        )
        lines += [f"{'':<12}  refused {m.rule} at {m.node}: {m.reason}" for m in r.log.near_misses]
    return "\n".join(lines) + "\n"


def _dump(directory: Path, name: str, before: str, after: str) -> str:
    if before != after:
        (directory / f"{name}.py").write_text(after)
        diff = difflib.unified_diff(before.splitlines(True), after.splitlines(True), "before", "after", n=1)
        (directory / f"{name}.diff").write_text("".join(diff))
    return after
