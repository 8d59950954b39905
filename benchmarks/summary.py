"""Fill the tables of README.md and docs/performance.md from the results.

python -m benchmarks.summary README.md docs/performance.md

A table stands between `<!-- table NAME -->` and `<!-- end -->`, where NAME is a key of TABLES.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import RESULTS

STEP = ("dscompile, ms", "floor, ms", "of the bandwidth", "GPU idle")
SHOWN_QUANT = "int8 with the head"
PEERS = {"eager": "eager", "compile": "static cache, compiled"}


class Step(NamedTuple):
    """A decode step as measured.

    quant: what `quantization_of` says; fraction: of the read bandwidth; idle: of the time, None where not measured
    """

    model: str
    dtype: str
    quant: str
    prompt: int
    new: int
    batch: int
    elapsed_ms: float
    floor_ms: float
    fraction: float
    idle: float | None


def steps(results: Iterable[Path]) -> Iterator[Step]:
    """Every decode step of some results."""
    for path in sorted(results):
        rows = json.loads(path.read_text())["models"]
        ceiling = ceiling_of(rows)
        for row in rows:
            for ours in row["ours"]:
                for b in ours["batches"]:
                    floor = 1e3 * b["bytes_per_step"] / ceiling
                    tokens = (ours["prompt_tokens"], ours["new_tokens"], b["batch"])
                    facts = (row["model"], row["dtype"], quantization_of(row), *tokens)
                    yield Step(*facts, b["decode_step_ms"], floor, floor / b["decode_step_ms"], b.get("gpu_idle"))


def ceiling_of(rows: Iterable[dict[str, Any]]) -> float:
    """The read bandwidth of a run in bytes per second: the most of those measured in it."""
    return max(ours["read_bandwidth"] for row in rows for ours in row["ours"])


def quantization_of(row: dict[str, Any]) -> str:
    """How a row of a result is quantized, in words: "" where it is not."""
    options = {"quant_lm_head": " with the head", "static_activations": ", static activations"}
    return row.get("quant", "") + "".join(words for option, words in options.items() if row.get(option))


def peers(folder: Path) -> dict[tuple[str, int, int, str], float]:
    """(model, tokens of prompt, batch, peer) -> milliseconds of a decode step."""
    found = {}
    for path in (folder / "peers.json", *sorted(folder.glob("decode-*.json"))):
        for row in json.loads(path.read_text())["models"] if path.exists() else ():
            for p in row["peers"]:
                if "decode_step_ms" in p:
                    found[row["model"], p["prompt_tokens"], p["batch"], p["peer"]] = p["decode_step_ms"]
    return found


def decode(folder: Path) -> list[str]:
    """Decode steps against their floor and the peers: of models as they are, and of the fastest quantization."""
    lines = _head("", "batch", "context", *STEP, *PEERS.values())
    others = peers(folder)
    for s in sorted(steps(folder.glob("decode-*.json"))):
        if s.quant in ("", SHOWN_QUANT):
            beside = [None if s.quant else others.get((s.model, s.prompt, s.batch, peer)) for peer in PEERS]
            lines.append(_line(*_cells(s), *("" if elapsed is None else f"{elapsed:.1f}" for elapsed in beside)))
    return lines


def int8(folder: Path) -> list[str]:
    """Decode steps of quantized models beside each other."""
    found = (s for s in sorted(steps(folder.glob("decode-*.json"))) if s.quant)
    return [*_head("", "batch", "context", *STEP), *(_line(*_cells(s)) for s in found)]


def _cells(s: Step) -> tuple[object, ...]:
    return (
        " ".join(filter(None, (s.model, s.dtype, s.quant))),
        s.batch,
        f"{s.prompt}-{s.prompt + s.new}",
        f"**{s.elapsed_ms:.2f}**",
        f"{s.floor_ms:.2f}",
        f"{100 * s.fraction:.0f}%",
        "" if s.idle is None else f"{100 * s.idle:.1f}%",
    )


def regions(folder: Path) -> list[str]:
    """Fused against unfused, microseconds in one layer."""
    lines = _head("model", "region", "fused, us", "torch in a graph", "torch, launched one by one")
    for row in _result(folder, "regions")["rows"]:
        graph, launched = (f"{row[f'{how}_us']:.1f} ({row[f'over_{how}']:.1f}x)" for how in ("graph", "launched"))
        lines.append(_line(row["model"], row["region"], f"{row['fused_us']:.1f}", graph, launched))
    return lines


def others(folder: Path) -> list[str]:
    """Everything that is one number."""
    lines = _head("", "measured", "command")
    for name, words, key, unit in (
        ("prefill", "prefill of {tokens} tokens, {model}", "prefill_ms", "ms"),
        ("prefill", "torch.mm of the same linears, {tokens} tokens, {model}", "library_linears_ms", "ms"),
        ("latency", "{prompt_tokens} tokens of prompt, {new_tokens} new ones, one call, {model}", "generate_ms", "ms"),
        ("throughput", "{requests} requests at once, {model}", "output_tokens_per_second", "output tokens/s"),
        ("cold_start", "process start to first token, {model}", "process_to_first_token_s", "s"),
        ("compile_time", "`dscompile` with dummy weights, {cores} cores, {model}", "seconds", "s"),
    ):
        result = _result(folder, name)
        for row in result["rows"]:
            if key in row:
                lines.append(_line(words.format(**row), f"{row[key]:,.1f} {unit}", f"`{result['command']}`"))
    for path in sorted(folder.glob("prompt-*.json")):
        result = json.loads(path.read_text())
        for row in result["models"]:
            words = " ".join(filter(None, (row["model"], quantization_of(row))))
            for ours in row["ours"]:
                elapsed = ours["batches"][0]["prefill_ms"]
                what = f"prefill of {ours['prompt_tokens']} tokens, {words}"
                lines.append(_line(what, f"{elapsed:,.1f} ms", f"`{result['command']}`"))
    return lines


def deterministic(folder: Path) -> list[str]:
    """What --deterministic costs, beside the usual kernels at the same context and commit."""
    lines = _head("", "batch", "decode step, ms", "usual, ms")
    measured = _result(folder, "deterministic")
    same = (p for p in folder.glob("decode-*.json") if _commit(json.loads(p.read_text())) == _commit(measured))
    usual = {(s.model, s.prompt, s.batch): s.elapsed_ms for s in steps(same) if not s.quant}
    for s in steps(folder.glob("deterministic.json")):
        beside = usual.get((s.model, s.prompt, s.batch))
        cells = (f"{s.model} {s.dtype}", s.batch, f"{s.elapsed_ms:.2f}", "" if beside is None else f"{beside:.2f}")
        lines.append(_line(*cells))
    return lines


def quantization(folder: Path) -> list[str]:
    """What a quantization adds to perplexity, in percent: the most of the held-out texts."""
    result = _result(folder, "quantization")
    models = result.get("models", [])
    lines = _head("", *(m["model"] for m in models))
    for run in models[0]["increase_percent"] if models else ():
        lines.append(_line(run, *(f"{max(m['increase_percent'][run].values()):.2f}" for m in models)))
    return lines


def outliers(folder: Path) -> list[str]:
    """The same where a model has outlier channels, beside plain rounding."""
    lines = _head("", "int8", "int8, neither folded nor smoothed")
    for row in _result(folder, "quantization").get("outliers", ()):
        found = (row["increase_percent"][run].values() for run in ("int8", "rounded"))
        lines.append(_line(row["model"], *(f"{max(increases):.2f}" for increases in found)))
    return lines


TABLES = {
    "decode": decode,
    "int8": int8,
    "regions": regions,
    "others": others,
    "deterministic": deterministic,
    "quantization": quantization,
    "outliers": outliers,
}


def fill(text: str, folder: Path = RESULTS) -> str:
    """The text with its tables made anew."""

    def table(found: re.Match) -> str:
        return "\n".join([found[1], "", *TABLES[found[2]](folder), "", found[3]])

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S)


def _commit(result: dict[str, Any]) -> str | None:
    return result.get("machine", {}).get("commit")


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _result(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(fill(page.read_text()))
