"""Where nothing mixes tokens any more, only the rows of logits are left to compute."""

from __future__ import annotations

from dscompile.runtime.plan import Attention, Buffer, Embed, KeepRows, Ref, Step

NAME = "keep_rows"


def place_keep_rows(steps: tuple[Step, ...], buffers: dict[str, Buffer]) -> tuple[Step, ...]:
    """Return the steps of a model that generates with a KeepRows as early as may be: behind the last attention, and
    behind the last embedding, which reads a step's tokens or positions.

    It takes all columns of every buffer that was written until then and is read later.
    """
    first = 1 + max(i for i, step in enumerate(steps) if isinstance(step.spec, Attention | Embed))
    before, behind = steps[:first], steps[first:]
    written = {ref.buffer for step in before for ref in step.outputs.values()}
    read = dict.fromkeys(ref.buffer for step in behind for ref in step.inputs.values() if ref.buffer in written)
    inputs = {f"x{i}": Ref(name, 0, buffers[name].cols) for i, name in enumerate(read)}
    return (*before, Step(NAME, KeepRows(), (NAME,), inputs=inputs), *behind)
