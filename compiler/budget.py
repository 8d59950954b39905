"""The accuracy budget: where quantization costs more than it may, the worst linears stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dscompile.passes.quantize.smooth import LinearError
from dscompile.runtime.errors import UserError

NAMED = 3
# The part of all linears that the first round keeps; every further round keeps twice as many, at most half of them.
FIRST_ROUND = 16
LAST_ROUND = 2


@dataclass(frozen=True)
class Kept:
    """What a round keeps as it is. rounds: (linears kept, percent that perplexity grew) of those before it."""

    linears: tuple[LinearError, ...] = ()
    rounds: tuple[tuple[int, float], ...] = ()

    @property
    def names(self) -> set[str]:
        return {e.weight for e in self.linears}


NONE = Kept()


class BudgetMissed(UserError):
    """Perplexity grew by `percent`, more than `budget`. errors: of the quantized linears."""

    def __init__(self, options: str, percent: float, budget: float, errors: list[LinearError], kept: Kept) -> None:
        worst = ", ".join(f"{e.weight} ({e.sqnr_db:.0f} dB)" for e in worst_first(errors)[:NAMED])
        advice = f"the linears with the largest errors are {worst}" if worst else "leave it out"
        most = f" with the {len(kept.linears)} worst linears left as they are" if kept.linears else ""
        super().__init__(
            f"{options} raises perplexity by {percent:.2f} %{most}, more than the {budget:g} % of "
            f"max_perplexity_increase; {advice}"
        )
        self.percent, self.errors, self.kept = percent, errors, kept

    def keep_more(self) -> Kept:
        """What the next round keeps. Raises the exception itself where half of the linears are no longer enough."""
        total = len(self.errors) + len(self.kept.linears)
        wanted = 2 * len(self.kept.linears) or max(1, total // FIRST_ROUND)
        if not self.errors or wanted > total // LAST_ROUND:
            raise self
        linears = list(self.kept.linears)
        for error in worst_first(self.errors):
            if len(linears) >= wanted:
                break
            # Linears of one input are packed into one, which takes equal types.
            linears += [e for e in self.errors if e.x == error.x and e not in linears]
        return Kept(tuple(linears), (*self.kept.rounds, (len(self.kept.linears), self.percent)))


def worst_first(errors: Iterable[LinearError]) -> list[LinearError]:
    """By their signal over error."""
    return sorted(errors, key=lambda e: e.sqnr_db)
