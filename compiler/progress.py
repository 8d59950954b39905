"""How a compilation reports what it is doing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One stage runs at a time. unit: "bytes", or what is counted; total: None where it is not known beforehand."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        pass

    def advance(self, amount: int = 1) -> None:
        pass

    def finish(self) -> None:
        pass
