"""Where two experts score within a rounding error of each other, either choice passes, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from dscompile.compiler.near_ties import AMPLITUDE, PROBES, decided_positions
from dscompile.compiler.reference import perturbed_logits, reference_logits
from dscompile.compiler.source import find_model
from dscompile.compiler.verify import Measured, compare
from tests.compiler.tiny import save_model

CPU = torch.device("cpu")
EPSILON = torch.finfo(torch.float16).eps
LIMIT = 60


def _texts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (1, 5, 17, 33, 48)]


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A model with experts, texts, its logits, and the same where rounding errors chose another expert once."""
    directory = tmp_path_factory.mktemp("routed")
    vocab = save_model("hy_v3", directory, torch.float16).config.vocab_size
    source, texts = find_model(directory), _texts(vocab)
    exact = reference_logits(source, texts, "float32", LIMIT, CPU)
    runs = list(perturbed_logits(source, texts, 0.5 * EPSILON, 24, LIMIT, CPU))[PROBES:]
    furthest = max(runs, key=lambda run: _distance(run, exact))
    assert _distance(furthest, exact) > 20 * min(_distance(run, exact) for run in runs), "no expert changed"
    return source, texts, exact, furthest


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return (torch.cat(a) - torch.cat(b)).norm().item()


def _passes(source, texts, logits: list[torch.Tensor], experts: bool) -> tuple[bool, str]:
    measured = Measured(logits, [rows[-4:] for rows in logits], [[] for _ in texts])
    checks, note = compare(measured, texts, source, "float16", LIMIT, CPU, experts)
    return all(check.passed for check in checks), note


def test_another_choice_between_equals_passes(routed):
    source, texts, _, flipped = routed
    assert _passes(source, texts, flipped, experts=False) == (False, "")
    passed, note = _passes(source, texts, flipped, experts=True)
    assert passed
    assert note.endswith("of 104 positions, where two experts score alike, were left out")


def test_what_every_choice_misses_fails(routed):
    source, texts, exact, _ = routed
    assert not _passes(source, texts, [rows * 1.02 for rows in exact], experts=True)[0]


def test_later_positions_of_a_text_are_undecided_too(routed):
    source, texts, exact, _ = routed
    decided = decided_positions(source, texts, exact, "float16", LIMIT, CPU)
    assert 0 < sum(int((~kept).sum()) for kept in decided) < 52
    assert all((kept[1:] <= kept[:-1]).all() for kept in decided)


def test_a_model_without_experts_decides_everything(tmp_path):
    vocab = save_model("llama", tmp_path, torch.float16).config.vocab_size
    source, texts = find_model(tmp_path), _texts(vocab)
    exact = reference_logits(source, texts, "float32", LIMIT, CPU)
    assert all(kept.all() for kept in decided_positions(source, texts, exact, "float16", LIMIT, CPU))


def test_probes_move_the_logits_by_about_a_rounding_error(tmp_path):
    vocab = save_model("llama", tmp_path, torch.float16).config.vocab_size
    source, texts = find_model(tmp_path), _texts(vocab)
    exact = reference_logits(source, texts, "float32", LIMIT, CPU)
    rounded = reference_logits(source, texts, "float16", LIMIT, CPU)
    (moved,) = perturbed_logits(source, texts, AMPLITUDE * EPSILON, 1, LIMIT, CPU)
    assert 1 < _distance(moved, exact) / _distance(rounded, exact) < 4
