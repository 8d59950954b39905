"""Layers of different visibility: each group keeps the blocks that can still be seen, and frees the others."""

from __future__ import annotations

import pytest

from dscompile.runtime.cpu_executor import CpuExecutor
from dscompile.runtime.engine import Engine
from tests.runtime.models import make_model

PROMPT, NEW, PAGE = 9, 40, 4


@pytest.mark.parametrize(
    "options, visible",
    [({"windows": (0, 6)}, {6: 6}), ({"windows": (3, 9)}, {3: 3, 9: 9}), ({"chunk": 10}, {0: 10}), ({}, {})],
    ids=["window", "two windows", "chunks", "all"],
)
def test_blocks_that_no_query_sees_again_are_freed(options, visible):
    model = make_model(page_size=PAGE, **options)
    engine = Engine(CpuExecutor(model.plan, model.weights))
    request = engine.add_request(list(range(1, PROMPT + 1)), max_new_tokens=NEW, ignore_eos=True)
    most = [0] * len(model.plan.kv_groups)
    while not request.done:
        engine.step()
        used = [a.num_used for a in engine.scheduler.tables.allocators]
        if len(request.sequence.tokens) > PROMPT + 1:
            most = [max(pair) for pair in zip(most, used, strict=True)]
    for group, blocks in zip(model.plan.kv_groups, most, strict=True):
        if group.window in visible:
            # The keys in sight may begin and end in the middle of a block; the step in flight may need one more.
            assert blocks <= -(-visible[group.window] // PAGE) + 2
        else:
            assert blocks == -(-(PROMPT + NEW) // PAGE) or blocks == -(-(PROMPT + NEW - 1) // PAGE)
    assert all(a.num_used == 0 for a in engine.scheduler.tables.allocators)
