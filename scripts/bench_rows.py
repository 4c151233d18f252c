"""What the benchmark has to say, as data: the terminal, the Markdown and the picture show the same.

A row's figure is a ratio wherever there is something to compare: what a reader can take to a
machine of their own. The figures behind it stand beside it.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Aim", "Part", "Plan", "Row", "beside", "compared", "each", "number", "spread"]


@dataclass(frozen=True)
class Plan:
    """How much to measure, and where the files go."""

    folder: str
    rounds: int
    times: int
    """Operations a batch, without fsync; a tenth of that with it."""
    seconds: float
    """How long a crowd works, a round."""
    rows: int
    """Of the backlog."""
    operations: int
    """Of the long life."""
    idle_seconds: float
    crowd: int
    """Waiters, each on a key of its own."""
    step: Callable[[], None]
    """To be called after each of a part's steps."""

    @property
    def fsyncs(self) -> int:
        """Operations a batch, with fsync."""
        return max(1, self.times // 10)


@dataclass(frozen=True)
class Aim:
    """What a figure should be."""

    sign: str
    bound: float
    counts: bool = True
    """False where the machine doesn't have what the aim is about."""

    def is_met(self, figure: float) -> bool | None:
        """None: it doesn't count here."""
        if not self.counts:
            return None
        return figure >= self.bound if self.sign == "≥" else figure <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One thing that was measured; no figures: it couldn't be, and `ours` says why."""

    name: str
    figures: Sequence[float]
    """One a round; their median counts."""
    aim: Aim | None = None
    ours: str = ""
    other: str = ""
    unit: str = ""
    """Of the aim."""
    bar: tuple[str, str, str] | None = None
    """Where it stands in the picture: the panel, the peer, the verb."""
    short: bool = False
    """Whether it stands in the short table too."""

    @property
    def figure(self) -> float | None:
        return statistics.median(self.figures) if self.figures else None

    @property
    def met(self) -> bool | None:
        """None: no aim, or one that doesn't count here."""
        if self.aim is None:
            return None
        return False if self.figure is None else self.aim.is_met(self.figure)

    @property
    def mark(self) -> str:
        return {True: "✓", False: "✗", None: "" if self.aim is None else "–"}[self.met]

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """What the tables show of it."""
        aim = "" if self.aim is None else f"{self.aim}{self.unit}"
        return spread(self.figures), aim, self.mark, self.name, self.ours, self.other


@dataclass
class Part:
    """Rows of one kind, a table."""

    title: str
    figure: str
    """What the figures are: the heading of their column."""
    ours: str
    other: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def headings(self) -> tuple[str, str, str, str, str, str]:
        """Of the rows' cells."""
        return self.figure, "aim", "met", self.title, self.ours, self.other


def beside(
    name: str,
    figures: Sequence[float],
    own: Sequence[float],
    other: Sequence[float],
    aim: Aim | None = None,
    **more: Any,
) -> Row:
    """A row of two things that were measured in turns, with the figures of both."""
    return Row(name, figures, aim, spread(own), spread(other), **more)


def compared(
    name: str,
    own: Sequence[float],
    other: Sequence[float],
    aim: Aim | None = None,
    *,
    short: bool = False,
) -> Row:
    """A row of how many times the other's cost ours is."""
    return beside(name, each(own, other), own, other, aim, short=short)


def each(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round: what else the machine did then has hit both sides."""
    return [over / under for over, under in zip(numerators, denominators, strict=True)]


def number(figure: float) -> str:
    """Three digits, or all before the point."""
    if figure == 0:
        return "0"
    digits = 2 if abs(figure) < 10 else 1 if abs(figure) < 100 else 0
    return f"{figure:,.{digits}f}"


def spread(figures: Iterable[float]) -> str:
    """The median, and where the half in the middle lies."""
    found = list(figures)
    if len(found) < 2:
        return " ".join(map(number, found))
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{number(statistics.median(found))} ({number(low)}–{number(high)})"
