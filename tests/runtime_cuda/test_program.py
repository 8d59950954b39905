"""Which launches a step of some size makes, with launches that only record."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dscompile.runtime.cuda_program import BoundStep, Sequential
from dscompile.runtime.errors import UserError
from dscompile.runtime.kernels import Sizes, choose_case
from dscompile.runtime.plan import Case, KeepRows, Launch, Program, Sample, Step


def program(*cases: tuple) -> Program:
    """Cases (name, least, most, decode, longest context) of one launch each, a kernel of that name."""
    return Program(tuple(Case(least, most, (Launch("kernel", n, ()),), *rest) for n, least, most, *rest in cases))


PROGRAMS = {
    "norm": program(("one", 1, 1, True, 100), ("few", 1, 16), ("many", 17, 0)),
    "keep": program(("keep", 1, 0)),
    "head": program(("row", 1, 4, True), ("tile", 1, 0)),
}


class Record:
    """Binds launches to a list of (kernel, T, stream)."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, int]] = []
        self.num_bound = 0

    def bind(self, launch: Launch, bindings: object) -> SimpleNamespace:
        self.num_bound += 1
        return SimpleNamespace(launch=lambda sizes, stream: self.made.append((launch.target, sizes.T, stream)))


def sequential(record: Record) -> Sequential:
    owner = SimpleNamespace(plan=SimpleNamespace(programs=PROGRAMS), table=record)
    specs = {"norm": Sample(), "keep": KeepRows(), "head": Sample()}
    return Sequential([BoundStep(owner, Step(name, spec, (), program=name), None) for name, spec in specs.items()])


def test_launches_are_those_of_the_cases_that_fit_whatever_was_launched_before():
    record = Record()
    steps = sequential(record)
    counts = (1, 2, 4, 5, 16, 17, 3000)
    for T in (*counts, *reversed(counts)):
        for decode in (True, False):
            for context in (0, 1, 100, 101, 5000):
                sizes = Sizes(T, 1, 1, 8, context)
                expected = [("norm", T), *([("keep", T)] if T > 1 else []), ("head", 1)]
                cases = [choose_case(PROGRAMS[name], rows, decode, context) for name, rows in expected]
                kernels = [case.launches[0].target for case in cases]
                steps.launch(sizes, decode, 7)
                assert record.made == [(k, rows, 7) for k, (_, rows) in zip(kernels, expected, strict=True)]
                record.made.clear()
    assert record.num_bound == 6, "a case is bound once"


def test_rows_without_logits_are_dropped_where_the_plan_says_so():
    record = Record()
    steps = sequential(record)
    for R in (0, 3, 9, 3, 0):
        steps.launch(Sizes(9, 3, R, 8), False, 0)
        behind = {0: [], 3: [("keep", 9, 0), ("tile", 3, 0)], 9: [("tile", 9, 0)]}[R]
        assert record.made == [("few", 9, 0), *behind]
        record.made.clear()


def test_a_count_that_no_case_fits_is_refused(monkeypatch):
    few = replace(PROGRAMS["head"], cases=PROGRAMS["head"].cases[:1])
    monkeypatch.setitem(PROGRAMS, "head", few)
    with pytest.raises(UserError, match="no launch for step head at 5 rows"):
        sequential(Record()).launch(Sizes(5, 5, 5, 8), True, 0)
