"""A plan bound to the memory of one GPU: every step's launches, for steps of any size and for each captured size."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch

from dscompile.runtime import ops
from dscompile.runtime.cuda_memory import Arena, ScratchMemory
from dscompile.runtime.cuda_state import DeviceState
from dscompile.runtime.errors import UserError
from dscompile.runtime.executor import StepInputs
from dscompile.runtime.kernels import Bindings, BoundKernel, BoundLibrary, KernelTable, Sizes, choose_case
from dscompile.runtime.kv_cache import KVPool
from dscompile.runtime.plan import Aten, Attention, KeepRows, Plan, Ref, Sample, Step


class BoundStep:
    """One step of the plan over fixed addresses; its launches are bound when a case is first needed."""

    def __init__(self, owner: BoundPlan, step: Step, layout: dict[str, int] | None) -> None:
        self._owner, self._step, self.name = owner, step, step.name
        self._layout = layout
        self.keeps_rows = isinstance(step.spec, KeepRows)
        self._program = owner.plan.programs[step.program]
        self._cases: dict[int, list[BoundKernel | BoundLibrary]] = {}
        self._bindings = Bindings(self._address, self._tensor)

    @property
    def bounds(self) -> set[int]:
        """Counts of rows from which on another case may fit than for one row less."""
        cases = self._program.cases
        return {case.min_tokens for case in cases} | {case.max_tokens + 1 for case in cases if case.max_tokens}

    @property
    def contexts(self) -> set[int]:
        """Contexts beyond which another case may fit."""
        return {case.max_context for case in self._program.cases if case.max_context}

    def launches(self, sizes: Sizes, decode: bool) -> Seq[BoundLaunch]:
        """What runs the step at these sizes."""
        case = choose_case(self._program, sizes.T, decode, sizes.context)
        if case is None:
            raise UserError(f"the plan has no launch for step {self._step.name} at {sizes.T} rows; compile it again")
        if id(case) not in self._cases:
            self._cases[id(case)] = [self._owner.table.bind(launch, self._bindings) for launch in case.launches]
        return self._cases[id(case)]

    def _ref(self, kind: str, role: str) -> Ref:
        refs = self._step.inputs if kind == "in" else self._step.outputs
        return refs[role]

    def _address(self, name: str) -> int:
        kind, _, role = name.partition(".")
        owner, spec = self._owner, self._step.spec
        match kind:
            case "in" | "out":
                return owner.address(self._ref(kind, role), self._layout)
            case "w":
                return owner.weights[self._step.weights[role]].data_ptr()
            case "scratch":
                return owner.scratch.address(self._step.program, role)
            case "step":
                return owner.state.address(role, spec.group if isinstance(spec, Attention) else 0)
            case "kv" if isinstance(spec, Attention):
                return owner.pools[spec.group].keys[spec.index].data_ptr()
        raise UserError(f"the plan passes {name!r} to a kernel of step {self._step.name}, which this runtime lacks")

    def _tensor(self, name: str) -> torch.Tensor:
        kind, _, role = name.partition(".")
        match kind:
            case "in" | "out":
                return self._owner.view(self._ref(kind, role), self._layout)
            case "w":
                return self._owner.weights[self._step.weights[role]]
            case "scratch":
                return self._owner.scratch.view(self._step.program, role)
        raise UserError(f"the plan passes {name!r} to a library call of step {self._step.name}")


class AtenStep:
    """A step that torch executes, outside the vocabulary; bound to views anew when the number of rows changes."""

    keeps_rows = False
    bounds: frozenset[int] = frozenset()
    contexts: frozenset[int] = frozenset()

    def __init__(self, owner: BoundPlan, step: Step, layout: dict[str, int] | None) -> None:
        self._owner, self._step, self._layout, self.name = owner, step, layout, step.name
        self._rows = -1
        self._run: ops.Run | None = None

    def launches(self, sizes: Sizes, decode: bool) -> Seq[BoundLaunch]:
        return (self,)

    def launch(self, sizes: Sizes, stream: int) -> None:
        rows = sizes.rows(self._owner.plan.buffers[self._step.outputs["y"].buffer].rows)
        if rows != self._rows:
            inputs, outputs = (
                {role: self._owner.view(ref, self._layout)[:rows] for role, ref in refs.items()}
                for refs in (self._step.inputs, self._step.outputs)
            )
            weights = {role: self._owner.weights[name] for role, name in self._step.weights.items()}
            self._run, self._rows = ops.bind(self._step.spec, inputs, outputs, weights), rows
        assert self._run is not None
        self._run(_NO_INPUTS)


_NONE = torch.empty(0)
_NO_INPUTS = StepInputs(_NONE, _NONE, _NONE, _NONE, [], [], [], [])  # an ATen call reads none of them


BoundLaunch = BoundKernel | BoundLibrary | AtenStep


class Stretch:
    """Steps over the same rows, launched one after another. What they launch between two bounds is looked up once."""

    def __init__(self, steps: Seq[BoundStep | AtenStep]) -> None:
        self._steps = steps
        self._bounds = sorted({bound for step in steps for bound in step.bounds})
        self._contexts = sorted({context for step in steps for context in step.contexts})
        self._launches: dict[tuple[int, bool, int], list[BoundLaunch]] = {}
        self._sizes: Sizes | None = None

    def launch(self, sizes: Sizes, decode: bool, stream: int) -> None:
        context = bisect_left(self._contexts, sizes.context) if sizes.context else -1
        key = bisect_right(self._bounds, sizes.T), decode, context
        if key not in self._launches:
            self._launches[key] = [bound for step in self._steps for bound in step.launches(sizes, decode)]
        if sizes != self._sizes:
            self._sizes = sizes  # kept while it stays equal: kernels take another object for other sizes
        for bound in self._launches[key]:
            bound.launch(self._sizes, stream)


class Sequential:
    """Steps launched one after another; those behind a KeepRows only for the rows that get logits."""

    def __init__(self, steps: Seq[BoundStep | AtenStep]) -> None:
        keeps = [step.keeps_rows for step in steps]
        first = keeps.index(True) if True in keeps else len(steps)
        self._all_rows = Stretch(steps[:first])
        self._keep_rows = Stretch(steps[first : first + 1])
        self._kept_rows = Stretch(steps[first + 1 :])

    def launch(self, sizes: Sizes, decode: bool, stream: int) -> None:
        self._all_rows.launch(sizes, decode, stream)
        if not sizes.R:
            return
        if sizes.R < sizes.T:
            self._keep_rows.launch(sizes, decode, stream)
            sizes = replace(sizes, T=sizes.R)
        self._kept_rows.launch(sizes, decode, stream)


class BoundPlan:
    """The plan over its memory. Activations of a captured size are packed for that size; those of other steps keep
    the layout for the most rows, so that their addresses do not depend on the step."""

    def __init__(
        self,
        plan: Plan,
        weights: dict[str, torch.Tensor],
        table: KernelTable,
        arenas: dict[str, Arena],
        scratch: ScratchMemory,
        state: DeviceState,
        pools: list[KVPool],
    ) -> None:
        self.plan, self.weights, self.table = plan, weights, table
        self.arenas, self.scratch, self.state, self.pools = arenas, scratch, state, pools
        self._eager: dict[str | None, Sequential] = {}

    def eager(self, program: str | None = None) -> Sequential:
        """The steps of the model, or one program of the step itself ("step.advance"), for any number of rows."""
        if program not in self._eager:
            self._eager[program] = Sequential(self._bind(program, None))
        return self._eager[program]

    def sized(self, rows: int, program: str | None = None, only: Collection[str] | None = None) -> Sequential:
        """The same for exactly `rows` tokens, sequences and rows of logits. only: names of the steps to take."""
        bound = self._bind(program, {"T": rows, "R": rows})
        return Sequential([step for step in bound if only is None or step.name in only])

    def _bind(self, program: str | None, layout: dict[str, int] | None) -> list[BoundStep | AtenStep]:
        if program is not None:
            return [BoundStep(self, self._own_step(program), layout)]
        steps = [step for step in self.plan.steps if not isinstance(step.spec, Sample)]
        return [(BoundStep if self._has_program(s) else AtenStep)(self, s, layout) for s in steps]

    def _has_program(self, step: Step) -> bool:
        if not step.program and not isinstance(step.spec, Aten):
            raise UserError(f"the plan has no kernels for step {step.name}; compile it for a GPU target")
        return bool(step.program)

    def _own_step(self, program: str) -> Step:
        if program not in self.plan.programs:
            raise UserError(f"the plan has no program {program}; compile it for a GPU target")
        sampling = next((step for step in self.plan.steps if isinstance(step.spec, Sample)), None)
        inputs = sampling.inputs if sampling is not None else {}
        return Step(program, Sample(), (), inputs=inputs, program=program)

    def address(self, ref: Ref, layout: dict[str, int] | None) -> int:
        arena = self.arenas[self.plan.buffers[ref.buffer].rows]
        return arena.address(ref, self._rows(ref, layout))

    def view(self, ref: Ref, layout: dict[str, int] | None) -> torch.Tensor:
        arena = self.arenas[self.plan.buffers[ref.buffer].rows]
        return arena.view(ref, self._rows(ref, layout))

    def _rows(self, ref: Ref, layout: dict[str, int] | None) -> int:
        symbol = self.plan.buffers[ref.buffer].rows
        return layout[symbol] if layout is not None else self.arenas[symbol].rows
