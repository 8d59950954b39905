"""Draw decode steps against their floor by batch size, one panel a model, from results of benchmarks.decode.

python -m benchmarks.plot     (needs the extra "bench")

The floor is the time in which the GPU reads a step's bytes at the bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.summary import ceiling_of, peers

SHOWN = tuple(RESULTS / f"decode-{name}.json" for name in ("gptj-6b", "llama3-8b", "bloom-7b1-short"))

PEERS = {
    "eager": ("transformers eager", "#b0b0b0", "s"),
    "compile": ("transformers, compiled static cache", "#707070", "^"),
}
OURS, INT8, FLOOR = "#0b61a4", "#3a9a5b", "#d1495b"


def main() -> None:
    args = _parse()
    results = [json.loads(path.read_text()) for path in args.results]
    draw(by_model(results), peers(args.results[0].parent), results[0]["machine"], args.png)
    print(args.png)


def by_model(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each model of each run."""
    models: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for n, result in enumerate(results):
        for row in result["models"]:
            models.setdefault((n, row["model"]), []).append(row)
    return list(models.values())


def series(rows: list[dict[str, Any]], others: dict[tuple, float]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (batch, milliseconds of a step): "ours", "int8", "floor" and the peers, of a model's first prompt.

    rows: of one run: the model as it is, then quantized
    """
    row, ceiling = rows[0], ceiling_of(rows)
    ours = row["ours"][0]
    found = {
        "ours": [(b["batch"], b["decode_step_ms"]) for b in ours["batches"]],
        "floor": [(b["batch"], 1e3 * b["bytes_per_step"] / ceiling) for b in ours["batches"]],
    }
    for quantized in rows[1:]:
        if quantized.get("quant_lm_head"):
            found["int8"] = [(b["batch"], b["decode_step_ms"]) for b in quantized["ours"][0]["batches"]]
    for (model, prompt, batch, peer), elapsed in sorted(others.items()):
        if (model, prompt) == (row["model"], ours["prompt_tokens"]):
            found.setdefault(peer, []).append((batch, elapsed))
    return found


def draw(models: list[list[dict[str, Any]]], others: dict[tuple, float], machine: dict[str, Any], path: Path) -> None:
    """Write the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(models), figsize=(4.2 * len(models), 3.8), sharey=True, squeeze=False)
    for axes, rows in zip(panels[0], models, strict=True):
        lines = series(rows, others)
        for name, (label, color, marker) in PEERS.items():
            if name in lines:
                axes.plot(*zip(*lines[name], strict=True), color=color, marker=marker, ms=4, lw=1, label=label)
        axes.plot(*zip(*lines["ours"], strict=True), color=OURS, marker="o", ms=5, lw=2, label="dscompile")
        axes.plot(*zip(*lines["floor"], strict=True), color=FLOOR, ls="--", lw=1.5, label="floor: bytes / bandwidth")
        if "int8" in lines:
            axes.plot(*zip(*lines["int8"], strict=True), color=INT8, marker="o", ms=5, lw=2, label="dscompile, int8")
        for name, above in (("ours", 7), ("int8", -14)):
            for batch, elapsed in lines.get(name, []):
                place = {"xytext": (0, above), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes.annotate(f"{elapsed:.2f}", (batch, elapsed), **place)
        batches = [batch for batch, _ in lines["ours"]]
        axes.set(xscale="log", yscale="log", xlabel="sequences", title=_title(rows[0]))
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.margins(x=0.08)
        axes.set_ylim(bottom=1.0)
        axes.set_yticks([1.5, 2, 3, 4, 5, 7, 10, 20, 40], ["1.5", "2", "3", "4", "5", "7", "10", "20", "40"])
        axes.minorticks_off()
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds of a decode step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(f"{machine.get('gpu')}, torch {machine.get('torch')}", fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)


def _title(row: dict[str, Any]) -> str:
    ours = row["ours"][0]
    first, last = ours["prompt_tokens"], ours["prompt_tokens"] + ours["new_tokens"]
    return f"{row['model']} {row['dtype']}, context {first}-{last}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", default=SHOWN, help="of benchmarks.decode")
    parser.add_argument("--png", type=Path, default=Path("docs/decode.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
