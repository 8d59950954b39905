"""The ring of shared memory against the float64 formula: order of copies and products, prologues and epilogues."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dscompile.codegen import linear_kernels, ring_kernels
from dscompile.codegen.select import programs_for
from dscompile.codegen.tuned_table import RingConfig
from dscompile.runtime.plan import Linear
from tests.codegen import oracle
from tests.codegen.interpreted import gluon
from tests.codegen.interpreted.harness import TOLERANCE, context, operands, run
from tests.codegen.interpreted.test_linear import HEADS, SPECS, tensors_for
from tests.helpers import rms_ratio

K = 256

gluon.install()


def wide(spec: Linear) -> Linear:
    """The spec with whole blocks of columns."""
    return replace(spec, in_features=K)


def check(spec: Linear, rows: int) -> None:
    torch.manual_seed(rows)
    tensors = tensors_for(spec, rows, rows, torch.float16)
    check_templates(spec, tensors, rows)
    run(spec, tensors, {}, {"T": rows, "B": rows})
    for role, expected in oracle.linear(spec, tensors).items():
        assert rms_ratio(tensors[role], expected) <= TOLERANCE[torch.float16], role


def check_templates(spec: Linear, tensors: dict[str, torch.Tensor], rows: int) -> None:
    """The kernel of tiles that `rows` take is the ring's, but for logits of many rows without an epilogue."""
    program, _ = programs_for(spec, operands(tensors), context())
    case = next(c for c in program.cases if c.min_tokens <= rows and (not c.max_tokens or rows <= c.max_tokens))
    target = case.launches[-1].target
    plain = spec.rows == "R" and rows > 64 and not (spec.bias or spec.softcap or spec.scale != 1.0)
    assert target == "mm" if plain else target.startswith("linear_ring_")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [3, 17, 40])
def test_linear(name: str, rows: int) -> None:
    check(wide(SPECS[name]), rows)


@pytest.mark.parametrize("name", ["plain", "gated", "packed", "layer"])
@pytest.mark.parametrize("stages,splits,block_k", [(2, 3, 64), (3, 2, 64), (4, 1, 128), (8, 2, 128)])
def test_rings_of_every_length(
    name: str, stages: int, splits: int, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RingConfig(64, 8, block_k, stages=stages, splits=splits)
    monkeypatch.setattr(linear_kernels, "ring_config", lambda *_: config)
    check(wide(SPECS[name]), 6)


@pytest.mark.parametrize("name", ["plain", "gated", "packed", "layer"])
@pytest.mark.parametrize("height,block_t", [(48, 8), (80, 16), (96, 64)])
def test_tiles_of_every_height(name: str, height: int, block_t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RingConfig(height, block_t, 64, stages=3)
    monkeypatch.setattr(linear_kernels, "ring_config", lambda *_: config)
    check(wide(SPECS[name]), 6)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.norm is None])
@pytest.mark.parametrize("rows", [128, 65])
@pytest.mark.parametrize("splits", [2, 4])
def test_every_program_that_shares_a_tile_finishes_some_tokens(
    name: str, splits: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RingConfig(64, 128, 64, stages=3, splits=splits)
    monkeypatch.setattr(linear_kernels, "ring_config", lambda *_: config)
    check(wide(SPECS[name]), rows)


@pytest.mark.parametrize("name,splits", [("layer", 2), ("gated", 2), ("plain", 3), ("residuals", 3)])
def test_the_last_finishes_tiles_with_a_norm_or_of_uneven_shares(
    name: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RingConfig(64, 128, 64, stages=3, splits=splits)
    monkeypatch.setattr(linear_kernels, "ring_config", lambda *_: config)
    check(replace(SPECS[name], in_features=384), 6)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [19, 3, 140])
def test_head(name: str, rows: int) -> None:
    torch.manual_seed(0)
    spec = wide(HEADS[name])
    tensors = tensors_for(spec, rows, rows, torch.float16)
    check_templates(spec, tensors, rows)
    run(spec, tensors, {}, {"T": rows, "B": 1, "R": rows})
    expected = oracle.linear(spec, tensors)["out.y0"]
    assert rms_ratio(tensors["out.y0"], expected) <= TOLERANCE[torch.float16]


def test_only_hopper_takes_the_ring() -> None:
    spec = wide(SPECS["plain"])
    tensors = operands(tensors_for(spec, 3, 3, torch.float16))
    assert ring_kernels.takes_ring(spec, tensors, context())
    assert not ring_kernels.takes_ring(spec, tensors, context(targets=("sm_80", "sm_90")))
    for columns in (64, 200):
        assert not ring_kernels.takes_ring(replace(spec, in_features=columns), tensors, context())
    unaligned = {**tensors, "in.x": replace(tensors["in.x"], aligned=False)}
    assert not ring_kernels.takes_ring(spec, unaligned, context())
