"""The fusion report as one self-contained page: the layer drawn as its kernels in dataflow order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template

from dscompile.runtime.report import LayerClass, Node, Region, Report, Verification
from dscompile.runtime.report_flow import Edge, Kernel, flow
from dscompile.runtime.report_text import (
    class_title,
    format_bytes,
    launches_by_range,
    quantization_facts,
    verification_line,
)

DASH = "\u2013"
ANCHORS = frozenset({"linear", "attention", "moe", "embedding", "embed", "sample"})
WHAT = {
    "embed": "token embedding",
    "norm": "normalisation",
    "attn_in": "normalisation and QKV projection",
    "attention": "rotary, cache append, attention",
    "attn_out": "output projection and residual",
    "mlp_in": "normalisation, up-projection, activation",
    "mlp_out": "down-projection and residual",
    "moe": "routed experts",
    "head": "final normalisation and vocabulary projection",
    "sample": "choice of the next token",
}


def write_html(report: Report, path: Path) -> None:
    """Write the page to a file. Raises OSError where it cannot be written."""
    path.write_text(render_html(report), encoding="utf-8")


def render_html(report: Report) -> str:
    """The page. It loads nothing: no script, font, image or style from anywhere."""
    template = files("dscompile.runtime").joinpath("report.html").read_text(encoding="utf-8")
    name = str(report.model.get("name", "Fusion report"))
    return Template(template).substitute(
        title=escape(name),
        facts=_facts(report),
        summary=_summary(report),
        model="\n".join(_model(report)),
        table=_launch_table(report),
        refusals=_refusals(report),
        verification=_verification(report.verification),
        quantization=_quantization(report),
    )


def _facts(report: Report) -> str:
    facts = [report.model.get(key) for key in ("architecture", "dtype", "target")]
    return "".join(f"<span>{escape(str(fact))}</span>" for fact in facts if fact)


def _summary(report: Report) -> str:
    layer_classes = [c for c in report.classes if c.layers]
    layers = sum(len(c.layers) for c in layer_classes)
    steps = [(c, region) for c in layer_classes for _, region in c.steps()]
    nodes = sum(c.count * len(region.nodes) for c, region in steps)
    kernels = sum(c.count * _first_count(region) for c, region in steps)
    unit = "launches" if any(region.kernels for _, region in steps) else "plan steps"
    misses = sum(len(c.near_misses) for c in report.classes)
    figures = [
        (str(layers), f"layers in {len(layer_classes)} {'class' if len(layer_classes) == 1 else 'classes'}"),
        (f"{nodes}\u2009\u2192\u2009{kernels}", f"nodes in the layers to {unit}"),
        (format_bytes(report.bytes_saved()), "of activation traffic saved per token"),
        (str(misses), "near miss" if misses == 1 else "near misses"),
        (str(len(report.fallbacks)), "fallback" if len(report.fallbacks) == 1 else "fallbacks"),
        (report.verification.status, "verification"),
    ]
    return "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in figures)


def _first_count(region: Region) -> int:
    """Launches in the smallest range of tokens; one step of the plan where no kernels were asked for."""
    counts = launches_by_range(region)
    return counts[0][1] if counts else 1


def _model(report: Report) -> Iterable[str]:
    """The whole model from tokens to tokens: what precedes the layers, each class, what follows."""
    top = max((r.bytes_saved for c in report.classes for r in c.regions), default=0)
    for layer_class in report.classes:
        before, _ = _split(layer_class)
        if before:
            yield _section("Before the layers", "", before, top)
    for layer_class in report.classes:
        if layer_class.layers:
            title, times = class_title(layer_class).split(", ")[0], layer_class.count
            yield _section(title, f"\u00d7\u2009{times}", list(layer_class.steps()), top, repeated=True)
    for layer_class in report.classes:
        _, after = _split(layer_class)
        if after:
            yield _section("After the layers", "", after, top)


Steps = Sequence[tuple[tuple[str, ...], Region]]


def _split(layer_class: LayerClass) -> tuple[Steps, Steps]:
    """The steps outside the layers that precede them (up to the last embedding), and the rest."""
    if layer_class.layers:
        return [], []
    steps = list(layer_class.steps())
    cut = max((i + 1 for i, (names, _) in enumerate(steps) if "embed" in names), default=0)
    return steps[:cut], steps[cut:]


def _section(title: str, times: str, steps: Steps, top: int, repeated: bool = False) -> str:
    drawn = flow([Kernel(region.inputs, region.outputs) for _, region in steps])
    lanes = 1 + max((edge.lane for edge in drawn.skips), default=-1)
    cells = [_skip(edge, lanes) for edge in drawn.skips]
    if drawn.entering:
        cells.append(_terminal(drawn.entering, 1, lanes, "in"))
    for index, (names, region) in enumerate(steps):
        # What enters is named at the top already.
        names_shown = drawn.adjacent[index] if index else ()
        cells.append(_wire(names_shown, 2 * index + 2, lanes, drawn=bool(drawn.adjacent[index])))
        cells.append(_card(names, region, 2 * index + 3, lanes, top))
    if drawn.leaving:
        cells.append(_wire((), 2 * len(steps) + 2, lanes))
        cells.append(_terminal(drawn.leaving, 2 * len(steps) + 3, lanes, "out"))
    badge = f'<span class="times">{escape(times)}</span>' if times else ""
    style = f"--lanes:{lanes}"
    return (
        f'<section class="stage{" repeated" if repeated else ""}"><h3>{escape(title)}{badge}</h3>'
        f'<div class="flow" style="{style}">{"".join(cells)}</div></section>'
    )


def _terminal(names: Sequence[str], row: int, lanes: int, kind: str) -> str:
    shown = "".join(f"<code>{escape(name)}</code>" for name in names)
    return f'<div class="terminal {kind}" style="grid-row:{row};grid-column:{lanes + 1}">{shown}</div>'


def _wire(names: Sequence[str], row: int, lanes: int, drawn: bool = True) -> str:
    """The line from one kernel to the next, with the activations that take it."""
    shown = "".join(f"<code>{escape(name)}</code>" for name in names)
    kind = "wire" if drawn else "wire none"
    return f'<div class="{kind}" style="grid-row:{row};grid-column:{lanes + 1}">{shown}</div>'


def _skip(edge: Edge, lanes: int) -> str:
    """The rail of an activation that passes kernels by. Row of kernel i: 2 i + 3; of what enters: 1."""
    start, end = 2 * edge.start + 3, 2 * edge.end + 3
    column = lanes - edge.lane
    style = f"grid-row:{start}/{end};grid-column:{column}/{lanes + 1}"
    label = escape(edge.name)
    entry = " entry" if edge.start < 0 else ""
    return f'<div class="skip{entry}" style="{style}" title="{label}"><code>{label}</code></div>'


def _card(names: Sequence[str], region: Region, row: int, lanes: int, top: int) -> str:
    what = "; ".join(WHAT[name] for name in names if name in WHAT)
    title = "".join(f"<b>{escape(name)}</b>" for name in names)
    return (
        f'<article class="kernel" style="grid-row:{row};grid-column:{lanes + 1}">'
        f"<header><h4>{title}</h4><p>{escape(what)}</p></header>"
        f'<ol class="nodes">{"".join(_nodes(region.nodes))}</ol>'
        f"{_figures(region, top)}{_details(region)}</article>"
    )


def _nodes(nodes: Sequence[Node]) -> Iterable[str]:
    """Nodes in dataflow order; neighbours of one operator (q, k, v) share a chip."""
    for op, run in groupby(nodes, key=lambda node: node.op):
        group = list(run)
        count = f"<i>\u00d7{len(group)}</i>" if len(group) > 1 else ""
        shapes = list(dict.fromkeys(_shape(node) for node in group if node.shape))
        kind = ' class="anchor"' if op.split(".")[0] in ANCHORS else ""
        names = escape(", ".join(node.name for node in group))
        size = f"<small>{escape(' · '.join(shapes))}</small>" if shapes else ""
        yield f'<li{kind} title="{names}"><span>{escape(op)}{count}</span>{size}</li>'


def _shape(node: Node) -> str:
    """ "[1, T, 4096]" -> "T x 4096"; the leading one is the row of all running sequences."""
    return node.shape.replace("[1, ", "[").strip("[]").replace(", ", "\u2009\u00d7\u2009")


def _figures(region: Region, top: int) -> str:
    share = 100 * region.bytes_saved / top if top else 0
    figures = [("saved per token", format_bytes(region.bytes_saved) if region.bytes_saved else DASH)]
    counts = sorted({n for _, n in launches_by_range(region)})
    if counts:
        launches = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}{DASH}{counts[-1]}"
        figures.append(("launch" if counts == [1] else "launches", launches))
    if region.time_us:
        tokens, time = next(iter(region.time_us.items()))
        figures.append((f"time at T = {escape(tokens)}", f"{time:.1f}\u2009\u00b5s"))
    cells = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures)
    return (
        f'<dl class="figures">{cells}</dl><div class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></div>'
    )


def _details(region: Region) -> str:
    rows = [f"<dt>rule</dt><dd><code>{escape(region.rule)}</code></dd>"]
    for label, names in (("reads", region.inputs), ("writes", region.outputs)):
        if names:
            rows.append(f"<dt>{label}</dt><dd>{_codes(names)}</dd>")
    if region.nodes:
        rows.append(f"<dt>nodes</dt><dd>{_codes(node.name for node in region.nodes)}</dd>")
    for tokens, kernels in _merged(region):
        rows.append(f"<dt>T = {escape(tokens)}</dt><dd>{_codes(kernels)}</dd>")
    return f"<details><summary>{escape(region.rule)}</summary><dl>{''.join(rows)}</dl></details>"


def _merged(region: Region) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Launches by range of tokens, ranges with the same kernels on one line."""
    ranges: dict[tuple[str, ...], list[str]] = {}
    for tokens, kernels in region.kernels.items():
        ranges.setdefault(kernels, []).append(tokens)
    return [(", ".join(tokens), kernels) for kernels, tokens in ranges.items()]


def _codes(names: Iterable[str]) -> str:
    return " ".join(f"<code>{escape(name)}</code>" for name in names)


def _launch_table(report: Report) -> str:
    """Launches by token count and measured time, for every step of every class."""
    times = list(dict.fromkeys(t for c in report.classes for r in c.regions for t in r.time_us))
    if not any(r.kernels for c in report.classes for r in c.regions):
        return '<p class="quiet">No kernels were generated for this target: the runtime executes every step itself.</p>'
    head = "".join(f"<th>\u00b5s, T = {escape(t)}</th>" for t in times)
    rows = []
    for layer_class in report.classes:
        rows.append(f'<tr class="group"><th colspan="{2 + len(times)}">{escape(class_title(layer_class))}</th></tr>')
        for names, region in layer_class.steps():
            counts = ", ".join(f"{n} <small>{_when(tokens)}</small>" for tokens, n in launches_by_range(region))
            cells = f"<td>{counts or DASH}</td>" + "".join(f"<td>{_time(region, t)}</td>" for t in times)
            rows.append(f"<tr><th><code>{escape(' + '.join(names))}</code></th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="launches"><thead><tr><th>step</th><th>launches</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _when(tokens: str) -> str:
    return f"at T = {escape(tokens)}" if tokens[:1].isdigit() else f"in {escape(tokens)}"


def _time(region: Region, tokens: str) -> str:
    return f"{region.time_us[tokens]:.1f}" if tokens in region.time_us else DASH


def _refusals(report: Report) -> str:
    items = []
    for layer_class in report.classes:
        for miss in layer_class.near_misses:
            where = escape(class_title(layer_class).split(", ")[0].lower())
            items.append(_refusal("near miss", miss.rule, miss.node, miss.reason, where))
    for fallback in report.fallbacks:
        items.append(_refusal("fallback", fallback.op, fallback.node, fallback.reason, "executed by torch"))
    if not items:
        return '<p class="quiet">Nothing refused: every node is inside a region, and no rule came close and failed.</p>'
    return f'<ul class="refusals">{"".join(items)}</ul>'


def _refusal(kind: str, rule: str, node: str, reason: str, where: str) -> str:
    return (
        f'<li class="{kind.replace(" ", "-")}"><p class="kind">{kind}</p><div><p class="reason">{escape(reason)}</p>'
        f"<p><code>{escape(rule)}</code> at <code>{escape(node)}</code>, {where}</p></div></li>"
    )


def _verification(verification: Verification) -> str:
    rows = []
    for check in verification.checks:
        share = min(100.0, 100 * check.error / check.limit) if check.limit else 100.0
        kind = "" if check.passed else ' class="miss"'
        rows.append(
            f"<tr{kind}><th>{escape(check.name)}</th><td>{check.error:.2e}</td><td>{check.limit:.2e}</td>"
            f'<td class="meter"><i style="width:{share:.1f}%"></i></td></tr>'
        )
    table = (
        '<div class="scroll"><table class="checks"><thead><tr><th>comparison</th><th>error</th><th>limit</th>'
        f"<th>share of the limit</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        if rows
        else ""
    )
    note = f'<p class="quiet">{escape(verification.note)}</p>' if verification.note else ""
    status = f'<p class="status {escape(verification.status)}">{escape(verification_line(verification))}.</p>'
    return status + table + note


def _quantization(report: Report) -> str:
    if not report.quantization:
        return ""
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in quantization_facts(report))
    linears = "".join(
        f"<tr><td>{escape(e['weight'])}</td><td>{e['sqnr_db']:.1f} dB</td><td>{e['exponent']:.1f}</td>"
        f"<td>{kind}</td></tr>"
        for key, kind in (("kept", "kept as it is"), ("linears", "quantized"))
        for e in report.quantization.get(key, ())
    )
    head = "<tr><th>weight</th><th>signal to error</th><th>smoothing exponent</th><th></th></tr>"
    table = f"<table>{head}{linears}</table>" if linears else ""
    return f'<section><h2>Quantization</h2><dl class="facts">{facts}</dl>{table}</section>'
