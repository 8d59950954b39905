"""The fusion report on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dscompile.runtime.report import LayerClass, NearMiss, Region, Report, Verification

WORST_LINEARS = 5


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report; where the output is no terminal, in a width that keeps a region on one line."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 130), highlight=False)
    for part in _parts(report):
        console.print(part)


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def layer_ranges(layers: Iterable[int]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs = groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0])
    spans = [[layer for _, layer in run] for _, run in runs]
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans)


def class_title(layer_class: LayerClass) -> str:
    """ "Layers 0-31, 32 times", or "Outside the layers"."""
    if not layer_class.layers:
        return "Outside the layers"
    noun = "Layers" if len(layer_class.layers) > 1 else "Layer"
    times = "once" if layer_class.count == 1 else f"{layer_class.count} times"
    return f"{noun} {layer_ranges(layer_class.layers)}, {times}"


def ops_taken(region: Region) -> list[tuple[str, int]]:
    """The operators a region took, in order, runs of one operator counted: [("norm", 1), ("linear", 3)]."""
    return [(op, len(list(run))) for op, run in groupby(node.op for node in region.nodes)]


def launches_by_range(region: Region) -> list[tuple[str, int]]:
    """Token ranges with the number of launches in each, neighbours with equal numbers merged: [("1", 1), ("2+", 2)].

    Short contexts are named where they take another number.
    """
    merged: list[tuple[str, int]] = []
    for tokens, names in region.kernels.items():
        any_context, short, _ = tokens.partition(", context")
        if short and len(region.kernels.get(any_context, ())) == len(names):
            continue
        span = _span(merged[-1][0], tokens) if merged and merged[-1][1] == len(names) else None
        if span:
            merged[-1] = (span, len(names))
        else:
            merged.append((tokens, len(names)))
    return merged


def summary_lines(report: Report) -> list[str]:
    """Two lines: classes and regions; near misses, fallbacks and bytes saved."""
    layers = sum(len(c.layers) for c in report.classes)
    classes = sum(bool(c.layers) for c in report.classes)
    per_layer = max((len(list(c.steps())) for c in report.classes if c.layers), default=0)
    misses = sum(len(c.near_misses) for c in report.classes)
    return [
        f"{_count(layers, 'layer')} in {_count(classes, 'class', 'classes')}, {_count(per_layer, 'region')} per layer",
        f"{_count(misses, 'near miss', 'near misses')}, {_count(len(report.fallbacks), 'fallback')}, "
        f"{format_bytes(report.bytes_saved())} of activation traffic saved per token",
    ]


def verification_line(verification: Verification) -> str:
    """One sentence: passed, failed or skipped, against what, where."""
    parts = [f"Verification {verification.status}"]
    if verification.against:
        parts.append(f"{verification.model or 'the model'} against {verification.against}")
    if verification.device:
        parts.append(f"on {verification.device}, kernels {verification.kernels}")
    return ": ".join(parts[:2]) + "".join(f", {p}" for p in parts[2:])


def accuracy_lines(report: Report) -> list[str]:
    """One sentence: what quantization costs in perplexity; none where nothing is quantized."""
    found = report.quantization
    if not found:
        return []
    schemes = [found["scheme"]] * (found["scheme"] != "none") + ["an int8 cache"] * (found["kv_dtype"] == "int8")
    what = " and ".join(schemes)
    if "increase_percent" not in found:
        return [f"Accuracy of {what} not measured: there is no text"]
    before, after = found["perplexity_before"], found["perplexity_after"]
    growth = f"{found['increase_percent']:+.2f} % (limit {found['max_increase_percent']:g} %)"
    return [f"Perplexity {before:.2f} -> {after:.2f} with {what}: {growth}"]


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _heading(report)
    for layer_class in report.classes:
        yield Text()
        yield Text(class_title(layer_class), style="bold")
        yield Padding(_regions(layer_class), (0, 0, 0, 2))
        if layer_class.near_misses:
            yield Padding(_near_misses(layer_class.near_misses), (0, 0, 0, 2))
    yield Text()
    if not any(region.kernels for c in report.classes for region in c.regions):
        yield Text.assemble(("Kernels ", "bold"), "none for this target: the runtime executes each region itself")
    yield _fallbacks(report)
    yield _verification(report.verification)
    if report.quantization:
        yield _quantization(report)


def _heading(report: Report) -> Text:
    facts = [str(report.model[key]) for key in ("architecture", "dtype", "target") if report.model.get(key)]
    title = str(report.model.get("name", "Fusion report"))
    return Text.assemble((title, "bold"), ("  " + "  ".join(facts), "dim"), "\n", "\n".join(summary_lines(report)))


def _regions(layer_class: LayerClass) -> Table:
    """A row per step. Launches and time have columns only where there are any."""
    launched = any(region.kernels for region in layer_class.regions)
    timed = any(region.time_us for region in layer_class.regions)
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", pad_edge=False)
    for column in ("region", "rule", "nodes taken", *(["launches by tokens"] if launched else [])):
        table.add_column(column)
    for column in ("saved/token", *(["time"] if timed else [])):
        table.add_column(column, justify="right")
    for names, region in layer_class.steps():
        row = [
            Text(" + ".join(names), style="cyan"),
            Text(region.rule),
            Text(" ".join(op if n == 1 else f"{op}\u00d7{n}" for op, n in ops_taken(region))),
        ]
        if launched:
            row.append(Text(_launches(region)))
        row.append(Text(format_bytes(region.bytes_saved) if region.bytes_saved else "-"))
        if timed:
            row.append(Text(_time(region)))
        table.add_row(*row)
    return table


def _launches(region: Region) -> str:
    counts = launches_by_range(region)
    if not counts:
        return "-"
    if len(counts) == 1:
        return f"{counts[0][1]}"
    return "  ".join(f"{tokens}: {n}" for tokens, n in counts)


def _span(first: str, last: str) -> str | None:
    """("2-4", "5+") -> "2+"; None for ranges that are not of numbers, such as "prefill"."""
    parts = [re.fullmatch(r"(\d+)(?:-(\d+)|(\+))?", tokens) for tokens in (first, last)]
    if not (parts[0] and parts[1]):
        return None
    low, high = parts[0][1], parts[1][2] or parts[1][1]
    return f"{low}+" if parts[1][3] else f"{low}-{high}"


def _time(region: Region) -> str:
    if not region.time_us:
        return "-"
    tokens, microseconds = next(iter(region.time_us.items()))
    return f"{microseconds:.1f} us (T={tokens})"


def _near_misses(misses: tuple[NearMiss, ...]) -> Group:
    lines = [Text.assemble((f"{m.rule} ", "yellow"), ("at ", "dim"), m.node, (": ", "dim"), m.reason) for m in misses]
    return Group(Text("Near misses", style="dim"), *lines)


def _fallbacks(report: Report) -> RenderableType:
    if not report.fallbacks:
        return Text.assemble(("Fallbacks ", "bold"), "none")
    lines = [Text.assemble("  ", (f.op, "yellow"), f" {f.node}: {f.reason}") for f in report.fallbacks]
    return Group(Text("Fallbacks, executed by torch", style="bold"), *lines)


def _verification(verification: Verification) -> Group:
    style = {"passed": "green", "failed": "red"}.get(verification.status, "yellow")
    lines = [Text(verification_line(verification), style=style)]
    width = max((len(c.name) for c in verification.checks), default=0)
    for check in verification.checks:
        mark = "ok" if check.passed else "MISS"
        lines.append(Text(f"  {check.name:<{width}}  {check.error:.2e}  limit {check.limit:.2e}  {mark}"))
    if verification.note:
        lines.append(Text(f"  {verification.note}", style="dim"))
    return Group(*lines)


def quantization_facts(report: Report) -> list[tuple[str, str]]:
    """What the quantization section says besides its tables of linears: [("perplexity before", "10.2"), ...]."""
    facts = {key: value for key, value in report.quantization.items() if key not in ("linears", "kept")}
    return [(key.replace("_", " "), str(value)) for key, value in facts.items()]


def _quantization(report: Report) -> Group:
    lines = [Text("Quantization", style="bold")]
    lines += [Text.assemble((f"  {key} ", "dim"), value) for key, value in quantization_facts(report)]
    worst = report.quantization.get("linears", [])[:WORST_LINEARS]
    if worst:
        lines.append(Text("  signal to error of the worst linears", style="dim"))
    lines += [Text(f"    {e['sqnr_db']:5.1f} dB  exponent {e['exponent']:.1f}  {e['weight']}") for e in worst]
    kept = report.quantization.get("kept", ())
    if kept:
        lines.append(Text("  kept as they are", style="dim"))
    lines += [Text(f"    {e['sqnr_db']:5.1f} dB  {e['weight']}") for e in kept]
    return Group(*lines)


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
