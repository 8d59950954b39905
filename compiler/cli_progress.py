"""Progress of a compilation on a terminal: a bar per stage; in a log, a line per stage."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from dscompile.runtime.report_text import format_bytes


class ConsoleProgress:
    """Shows stages as they start, advance and finish. One stage runs at a time; use it in a `with` statement.

    units: "bytes" is written as KiB, MiB ...; anything else after the count, such as "3/24 kernels".
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), _Amount(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task: Task | None = None
        self._began = 0.0

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        """Begin a stage of `total` units, None where it is not known."""
        task = self._bars.add_task(stage, total=total, unit=unit)
        self._task = next(t for t in self._bars.tasks if t.id == task)
        self._began = time.perf_counter()

    def advance(self, amount: int = 1) -> None:
        """Add to what the stage has done."""
        if self._task:
            self._bars.advance(self._task.id, amount)

    def finish(self) -> None:
        """End the stage: its bar becomes a line."""
        if self._task is None:
            return
        task, self._task = self._task, None
        amount = _amount(task.completed or task.total or 0, None, task.fields["unit"])
        seconds = time.perf_counter() - self._began
        self._console.print(f"  {task.description:<14}{amount:<20}{seconds:8.1f} s", highlight=False, style="dim")
        self._bars.remove_task(task.id)


class _Amount(ProgressColumn):
    """Done and total, in the stage's unit."""

    def render(self, task: Task) -> Text:
        return Text(_amount(task.completed, task.total, task.fields["unit"]))


def _amount(done: float, total: float | None, unit: str) -> str:
    if not done and not total:
        return ""
    show = format_bytes if unit == "bytes" else lambda n: f"{n:.0f}"
    suffix = "" if unit == "bytes" or not unit else f" {unit}"
    return f"{show(done)}{f' / {show(total)}' if total is not None else ''}{suffix}"
