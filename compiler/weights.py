"""The stage that writes weights: evaluates the plan's recipes from the checkpoint, or makes random ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dscompile.compiler.checkpoint import Checkpoint
from dscompile.compiler.dummy import dummy_maker, keep_constants
from dscompile.compiler.progress import Progress
from dscompile.compiler.shards import num_bytes, write_shards
from dscompile.passes.lower.lower import Lowered
from dscompile.passes.recipe import Constant, Recipe, Source, evaluate, operands
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Plan


def write_weights(
    directory: Path,
    lowered: Lowered,
    constants: dict[str, Tensor],
    checkpoint: Checkpoint | None,
    dummy: str | None,
    progress: Progress,
) -> Plan:
    """Write the weights' shards and return the plan that goes with them.

    constants:  values of the recipes' Constant leaves;  checkpoint: of their Source leaves, None if dummy
    dummy:      None, "generated" (only constants are written) or "stored"
    Raises UserError where a tensor is missing or the disk has too little room.
    """
    plan = keep_constants(lowered.plan, lowered.recipes)
    if checkpoint is not None:
        checkpoint.require(leaf for recipe in lowered.recipes.values() for leaf in _source_leaves(recipe))

    def from_recipe(name: str) -> Tensor:
        return evaluate(lowered.recipes[name], lookup)

    def lookup(leaf: Source | Constant) -> Tensor:
        if isinstance(leaf, Constant):
            return constants[leaf.name]
        assert checkpoint is not None, f"{leaf.name} without a checkpoint"
        return checkpoint.read(leaf.name)

    stored = {n: w for n, w in plan.weights.items() if dummy != "generated" or not w.init}
    make: Callable[[str], Tensor] = from_recipe
    if dummy == "stored":
        random = dummy_maker(plan)
        make = lambda name: random(name) if plan.weights[name].init else from_recipe(name)  # noqa: E731
    total = sum(map(num_bytes, stored.values()))
    free = shutil.disk_usage(directory).free
    if total > free:
        raise UserError(f"{directory.parent}: the disk is full: {total} bytes are needed, {free} are free")
    progress.start("weights", total, "bytes")
    write_shards(directory / "weights", stored, make, progress.advance)
    progress.finish()
    return plan


def _source_leaves(recipe: Recipe) -> list[Source]:
    if isinstance(recipe, Source):
        return [recipe]
    return [leaf for part in operands(recipe) for leaf in _source_leaves(part)]
