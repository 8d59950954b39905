"""The tables of the README, from the results.

python -m benchmarks.summary
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

HEAD = (
    "| model | batch | context | dscompile, ms | floor, ms | of the bandwidth | eager, ms | compiled static cache, ms |"
)


def main() -> None:
    for lines in (decode(), regions(), others()):
        print("\n".join(lines), end="\n\n")


def decode(folder: Path = RESULTS) -> list[str]:
    """Decode steps against their floor, with the peers of the same run."""
    lines = [HEAD, "|---|---|---|---|---|---|---|---|"]
    for path in sorted(folder.glob("decode*.json")):
        for row in json.loads(path.read_text())["models"]:
            for ours in row["ours"]:
                lines += [_decode_line(row, ours, batch) for batch in ours["batches"]]
    return lines


def _decode_line(row: dict[str, Any], ours: dict[str, Any], batch: dict[str, Any]) -> str:
    def peer(name: str) -> str:
        for found in row["peers"]:
            same = (found["peer"], found["batch"], found["prompt_tokens"])
            if same == (name, batch["batch"], ours["prompt_tokens"]) and "decode_step_ms" in found:
                return f"{found['decode_step_ms']:.1f}"
        return ""

    context = f"{ours['prompt_tokens']}-{ours['prompt_tokens'] + ours['new_tokens']}"
    floor = 1e3 * batch["bytes_per_step"] / ours["read_bandwidth"]
    cells = [f"{row['model']} {row['dtype']}", str(batch["batch"]), context, f"**{batch['decode_step_ms']:.2f}**"]
    cells += [f"{floor:.2f}", f"{100 * batch['bandwidth_fraction']:.0f}%", peer("eager"), peer("compile")]
    return "| " + " | ".join(cells) + " |"


def regions(folder: Path = RESULTS) -> list[str]:
    """Fused against unfused, microseconds in one layer."""
    lines = ["| model | region | fused, us | torch in a graph | torch, launched |", "|---|---|---|---|---|"]
    for row in _rows(folder, "regions"):
        graph, launched = (f"{row[f'{how}_us']:.1f} ({row[f'over_{how}']:.1f}x)" for how in ("graph", "launched"))
        lines.append(f"| {row['model']} | {row['region']} | {row['fused_us']:.1f} | {graph} | {launched} |")
    return lines


def others(folder: Path = RESULTS) -> list[str]:
    """Everything that is one number."""
    lines = ["| | measured | command |", "|---|---|---|"]
    for name, words, key, unit in (
        ("prefill", "prefill of {tokens} tokens, {model}", "prefill_ms", "ms"),
        ("prefill", "the library's GEMMs of the same linears alone", "library_linears_ms", "ms"),
        (
            "latency",
            "{prompt_tokens} tokens of prompt, {new_tokens} new ones, one call, {model}",
            "generate_ms",
            "ms",
        ),
        ("throughput", "{requests} requests at once, {model}", "output_tokens_per_second", "output tokens/s"),
        ("cold_start", "process start to first token, {model}", "process_to_first_token_s", "s"),
        ("compile_time", "`dscompile` with dummy weights, {cores} cores, {model}", "seconds", "s"),
    ):
        command = f"`python -m benchmarks.{name}`"
        for row in _rows(folder, name):
            lines.append(f"| {words.format(**row)} | {row[key]:,.1f} {unit} | {command} |")
    return lines


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found.get("rows", [])


if __name__ == "__main__":
    main()
