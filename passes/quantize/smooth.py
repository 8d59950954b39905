"""SmoothQuant: x W^T = (x / s) (W s)^T, s folded into the norm or linear that makes x (Xiao et al. 2023)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dscompile.passes import vocabulary
from dscompile.passes.graph import ModelGraph
from dscompile.passes.quantize.calibrate import Trial
from dscompile.passes.quantize.sites import Site, find_sites
from dscompile.passes.recipe import Constant, Scale, ScaleRows
from dscompile.passes.rule import Log

RULE = "x W -> (x / s) (W s)"
# A scale is worth its multiplication where it takes away this much of the error.
WORTH = 0.02


@dataclass(frozen=True)
class LinearError:
    """A quantized linear on the calibration text.

    x: the name of what it reads, the same for linears that share it
    sqnr_db: power of its output over that of the error
    """

    weight: str
    x: str
    exponent: float
    sqnr_db: float


def smooth_linears(
    measure: Callable[[ModelGraph, Sequence[Site]], list[list[Trial]]], errors: list[LinearError]
) -> Callable[[ModelGraph, Log], None]:
    """Return the pass. measure: the trials of each site; errors: filled with one entry per quantized linear."""

    def smooth(graph: ModelGraph, log: Log) -> None:
        sites = find_sites(graph)
        trials = measure(graph, sites)
        exponents = choose_exponents(sites, trials)
        for site, tried in zip(sites, trials, strict=True):
            chosen = next(t for t in tried if t.exponent == exponents[site.layer_class])
            errors.extend(
                LinearError(n.args[1].meta["weight"], site.x.name, chosen.exponent, 10 * math.log10(max(ratio, 1e-30)))
                for n, ratio in zip(site.linears, chosen.sqnr, strict=True)
            )
        for site, tried in zip(sites, trials, strict=True):
            chosen = next(t for t in tried if t.exponent == exponents[site.layer_class])
            if site.refusal:
                log.refused(RULE, site.linears[0], site.refusal)
            elif chosen.exponent:
                fold(graph, site, chosen.scale)
                log.matched(RULE)

    smooth.__name__ = "smooth_linears"
    return smooth


def choose_exponents(sites: Sequence[Site], trials: Sequence[Sequence[Trial]]) -> dict[str, float]:
    """The exponent of each layer class: that of the smallest error summed over its sites, 0 where none is worth it."""
    totals: dict[str, dict[float, float]] = {}
    for site, tried in zip(sites, trials, strict=True):
        errors = {t.exponent: t.error for t in tried}
        total = totals.setdefault(site.layer_class, dict.fromkeys(errors, 0.0))
        # A site that refuses has no smoothing to choose, and then its class has none.
        totals[site.layer_class] = {e: total[e] + errors[e] for e in total if e in errors}
    return {name: _best(total) for name, total in totals.items()}


def _best(total: dict[float, float]) -> float:
    best = min(total, key=total.__getitem__)
    return best if total[best] < (1 - WORTH) * total[0.0] else 0.0


def fold(graph: ModelGraph, site: Site, scale: Tensor) -> None:
    """Divide the site's input by the scale of its producer's channels, exactly: the function does not change."""
    producer, channels = site.producer, site.channels_K
    assert producer is not None and channels is not None
    by, inverse = (
        _constant(graph, f"smooth.{site.x.name}.{name}", value)
        for name, value in (("columns", scale[channels]), ("rows", 1 / scale))
    )
    for linear in site.linears:
        x, w, *bias = linear.args
        scaled = graph.add_weight(f"{w.meta['weight']}*smooth", Scale(graph.recipe(w), by))
        linear.args = (x, scaled, *bias)
    if producer.target is vocabulary.norm:
        x, weight, bias, spec = producer.args
        recipe = Scale(graph.recipe(weight), inverse) if weight is not None else inverse
        weight = graph.add_weight(f"{producer.name}.smooth_weight", recipe)
        if bias is not None:
            bias = graph.add_weight(f"{producer.name}.smooth_bias", Scale(graph.recipe(bias), inverse))
        producer.args = (x, weight, bias, dataclasses.replace(spec, weight=True))
        return
    x, w, *bias = producer.args
    w = graph.add_weight(f"{w.meta['weight']}/smooth", ScaleRows(graph.recipe(w), inverse))
    bias = [graph.add_weight(f"{b.meta['weight']}/smooth", Scale(graph.recipe(b), inverse)) for b in bias]
    producer.args = (x, w, *bias)


def _constant(graph: ModelGraph, name: str, value: Tensor) -> Constant:
    graph.constants[name] = value
    return Constant(name, tuple(value.shape))
