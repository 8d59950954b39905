"""Runs a graph on text, each weight loaded when its node runs, and tries every smoothing on what the linears read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.passes.graph import ModelGraph, is_weight
from dscompile.passes.quantize.scheme import Scheme
from dscompile.passes.quantize.sites import Site
from dscompile.passes.recipe import Constant, Source, evaluate
from dscompile.runtime.errors import UserError

SAMPLED_ROWS = 512
Lookup = Callable[[Source | Constant], Tensor]


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
    An activation is kept, for all windows, until its last reader has run; a weight only while its node runs.
    Raises UserError naming a weight or an input that holds NaN or infinity.
    """

    def lookup(leaf: Source | Constant) -> Tensor:
        return graph.constants[leaf.name] if isinstance(leaf, Constant) else read(leaf.name)

    by_input = {site.x: i for i, site in enumerate(sites)}
    trials: list[list[Trial]] = [[] for _ in sites]
    for node, values in _run(graph, set(by_input), windows, lookup):
        site = sites[by_input[node]]
        weights = [evaluate(graph.recipe(n.args[1]), lookup).float() for n in site.linears]
        trials[by_input[node]] = _trials(site, values, weights, scheme)
        progress()
    return trials


def _run(graph: ModelGraph, wanted: set[fx.Node], windows: Sequence[Sequence[int]], lookup: Lookup):
    """Yield each wanted node with its value for every window, in order."""
    remaining = _readers(wanted)
    tokens = [torch.tensor([w]) for w in windows]
    positions = [torch.arange(len(w))[None] for w in windows]
    known: dict[fx.Node, list[Any]] = {graph.tokens: tokens, graph.positions: positions}
    for node in graph.graph.nodes:
        if node not in remaining:
            continue
        if node.op == "call_function":
            weights = {n: evaluate(graph.recipe(n), lookup) for n in node.all_input_nodes if is_weight(n)}
            weights = {n: w.float() if w.is_floating_point() else w for n, w in weights.items()}
            known[node] = [_call(node, weights, known, i) for i in range(len(windows))]
            for source in set(node.all_input_nodes) & known.keys():
                remaining[source] -= 1
                if not remaining[source]:
                    del known[source]
        if node in wanted:
            yield node, known[node]


def _call(node: fx.Node, weights: dict[fx.Node, Tensor], known: dict[fx.Node, list[Any]], window: int) -> Any:
    find = lambda n: weights[n] if n in weights else known[n][window]  # noqa: E731
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), find)
    return node.target(*args, **kwargs)


def _readers(wanted: set[fx.Node]) -> dict[fx.Node, int]:
    """The wanted nodes and all that they are computed from, each with how many of these read it."""
    needed: dict[fx.Node, int] = {}
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed[node] = 0
        stack += node.all_input_nodes
    for node in needed:
        for source in node.all_input_nodes:
            needed[source] += 1
    return needed


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
    rounded = scheme.input(x / s)
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
