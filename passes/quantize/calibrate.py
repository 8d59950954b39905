"""Tries every smoothing on what the linears read when a graph runs on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dscompile.passes.graph import ModelGraph
from dscompile.passes.quantize.scheme import Scheme
from dscompile.passes.quantize.sites import Site
from dscompile.passes.quantize.walk import leaves, walk
from dscompile.passes.recipe import evaluate
from dscompile.runtime.errors import UserError

SAMPLED_ROWS = 512


@dataclass(frozen=True)
class Trial:
    """One exponent at one site.

    scale: the scale per channel of the producer (ones for exponent 0)
    error: mean over output channels of noise / power, which no scaling of a channel changes
    sqnr:  power / noise of each linear
    """

    exponent: float
    scale: Tensor
    error: float
    sqnr: tuple[float, ...]


@torch.no_grad()
def calibrate(
    graph: ModelGraph,
    sites: Sequence[Site],
    windows: Sequence[Sequence[int]],
    read: Callable[[str], Tensor],
    scheme: Scheme,
    progress: Callable[[], Any] = lambda: None,
) -> list[list[Trial]]:
    """The trials of each site: exponent 0 first, and the scheme's others where the site has a producer.

    windows:  token ids, each a text of its own;  read: returns checkpoint tensors by name
    progress: called once per site
    Raises UserError naming a weight or an input that holds NaN or infinity.
    """
    lookup = leaves(graph, read)
    by_linear = {site.linears[0]: i for i, site in enumerate(sites)}
    trials: list[list[Trial]] = [[] for _ in sites]
    for node, values in walk(graph, {site.linears[0]: (site.x,) for site in sites}, windows, lookup):
        site = sites[by_linear[node]]
        weights = [evaluate(graph.recipe(n.args[1]), lookup).float() for n in site.linears]
        trials[by_linear[node]] = _trials(site, [x for (x,) in values], weights, scheme)
        progress()
    return trials


def _trials(site: Site, values: list[Tensor], weights: list[Tensor], scheme: Scheme) -> list[Trial]:
    names = [n.args[1].meta["weight"] for n in site.linears]
    for name, weight in zip(names, weights, strict=True):
        if not weight.isfinite().all():
            raise UserError(f"{name}: holds NaN or infinity, which int8 cannot express; repair the checkpoint")
    largest_K = torch.stack([v.abs().amax((0, 1)) for v in values]).amax(0).float()
    if not largest_K.isfinite().all():
        raise UserError(f"the input of {names[0]} holds NaN or infinity on the calibration text; repair the checkpoint")
    rows = sum(v.shape[1] for v in values)
    every = max(1, rows // SAMPLED_ROWS)
    x = torch.cat([v[0] for v in values])[::every].float()
    exponents = scheme.exponents if site.producer is not None else (0.0,)
    return [_trial(site, e, x, largest_K, weights, scheme) for e in exponents]


def _trial(site: Site, exponent: float, x: Tensor, largest_K: Tensor, weights: list[Tensor], scheme: Scheme) -> Trial:
    channels = torch.arange(len(largest_K)) if site.channels_K is None else site.channels_K
    scale = smoothing_scale(largest_K, _columns(weights), channels, exponent)
    s = scale[channels]
    rounded = scheme.input(x / s, (largest_K / s).max())
    errors, sqnr = [], []
    for weight in weights:
        exact = x @ weight.t()
        noise = (rounded @ scheme.weight(weight * s).t() - exact).square().sum(0)
        power = exact.square().sum(0)
        errors.append((noise / power)[power > 0])
        sqnr.append((power.sum() / noise.sum().clamp_min(1e-30)).item())
    error = torch.cat(errors)
    return Trial(exponent, scale, error.mean().item() if len(error) else 0.0, tuple(sqnr))


def _columns(weights: list[Tensor]) -> Tensor:
    """The largest of each column, of rows that are first divided by their own largest: their size is the scale's."""
    parts = [w.abs() / w.abs().amax(1, keepdim=True).clamp_min(1e-30) for w in weights]
    return torch.cat(parts).amax(0)


def smoothing_scale(inputs_K: Tensor, columns_K: Tensor, channels_K: Tensor, exponent: float) -> Tensor:
    """s = max|x|^a / max|w|^(1 - a) per channel of the producer (Xiao et al. 2023); 1 where either is zero, or a is.

    inputs_K, columns_K: largest of each channel of the input and column of the weights
    channels_K:          the producer's channel of each
    """
    size = int(channels_K.max()) + 1
    if exponent == 0:
        return torch.ones(size)
    x, w = (torch.zeros(size).scatter_reduce_(0, channels_K, v, "amax") for v in (inputs_K, columns_K))
    dead = (x < 1e-20) | (w < 1e-20)
    scale = x.pow(exponent) / w.pow(1 - exponent)
    scale = scale / scale[~dead].log().mean().exp() if not dead.all() else scale
    return torch.where(dead, 1.0, scale).clamp(1e-4, 1e4)
