"""The screen of `sqlspace top`: keys, depths and rates, looked at again and again.

What a look costs: `Store.stats` a look at each live entry, the rates one at each entry that came or
went since the look before. So each of the two is followed by a rest ten times as long as it took;
neither blocks a writer.

Rates over the file are exact: seqs and takings are numbered without gaps. Those of a key are
counted in the rows that are there, and entries can come and go without leaving any (`clear`, `put`,
`remove`, a short history, `compact`): when the sum is less than the whole, each is only known to be
no less.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sqlspace import upkeep
from sqlspace.connection import Connection
from sqlspace.records import KeyStats, Stats
from sqlspace.store import Store

from . import terminal
from .signals import Signals

__all__ = ["check_interval", "is_end", "keyboard", "watch", "write_once"]

SELECT_LAST_SEQ = "SELECT ifnull(max(seq), 0) FROM sqlspace_entries"
SELECT_PUSHED = """
SELECT CAST(key AS BLOB) FROM sqlspace_entries WHERE seq > ?1 AND seq <= ?2
"""
SELECT_TAKEN = """
SELECT CAST(key AS BLOB) FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
 WHERE taken_no > ?1 AND taken_no <= ?2 AND taken_no IS NOT NULL
"""

_SHORTEST_SECONDS = 0.1
_REST = 10  # a rest after a look, in looks
_NOTHING = KeyStats(ready=0, leased=0, delayed=0, dead=0, oldest_age=0.0, bytes=0)


def check_interval(seconds: float) -> float:
    """Seconds between two looks."""
    if not _SHORTEST_SECONDS <= seconds < math.inf:
        raise ValueError(f"it must be {_SHORTEST_SECONDS:g} seconds or more, and finite")
    return seconds


# -- looking


@dataclass(frozen=True, slots=True)
class _Flow:
    """What moved between two looks, in one direction."""

    total: int = 0
    by_key: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # 0: there was no look before

    def rate(self, key: str | None = None) -> str:
        """Per second; of all keys unless one is named."""
        if not self.seconds:
            return "-"
        number = self.total if key is None else self.by_key[key]
        rate = number / self.seconds
        text = f"{rate:.1f}" if 0 < rate < 99.95 else _count(round(rate))
        more = key is not None and self.by_key.total() < self.total
        return f"{text}+" if more else text


@dataclass(frozen=True, slots=True)
class _Flows:
    """What moved since the look before, and up to where."""

    at: float  # monotonic
    last_seq: int
    last_taken: int
    pushed: _Flow = field(default_factory=_Flow)
    taken: _Flow = field(default_factory=_Flow)


def _flows(store: Store, before: _Flows | None) -> _Flows:
    at = time.monotonic()

    def step(connection: Connection) -> tuple[int, int, Counter[Any], Counter[Any]]:
        last_seq: Any = connection.execute(SELECT_LAST_SEQ).get
        last_taken: Any = connection.execute(upkeep.SELECT_LAST_TAKEN).get
        if before is None:
            return last_seq, last_taken, Counter(), Counter()
        since = before.last_taken if before.last_taken <= last_taken else 0  # compact begins anew
        pushed: Any = connection.execute(SELECT_PUSHED, (before.last_seq, last_seq)).fetchall()
        taken: Any = connection.execute(SELECT_TAKEN, (since, last_taken)).fetchall()
        return last_seq, last_taken, Counter(k for (k,) in pushed), Counter(k for (k,) in taken)

    database = store._database  # noqa: SLF001  # its connection for browsing
    last_seq, last_taken, pushed, taken = database.browse(step)
    if before is None:
        return _Flows(at, last_seq, last_taken)
    seconds = at - before.at
    new = last_taken - before.last_taken
    return _Flows(
        at=at,
        last_seq=last_seq,
        last_taken=last_taken,
        pushed=_Flow(last_seq - before.last_seq, _named(pushed), seconds),
        taken=_Flow(new if new >= 0 else last_taken, _named(taken), seconds),
    )


def _named(counted: Counter[bytes]) -> Counter[str]:
    return Counter({key.decode(errors="backslashreplace"): n for key, n in counted.items()})


@dataclass(frozen=True, slots=True)
class _Look:
    """A store at one moment, and since the moment before."""

    stats: Stats
    flows: _Flows
    flows_rest: float
    stats_rest: float
    stats_due: float

    def rows(self) -> list[tuple[str, KeyStats]]:
        """The keys, the fullest and the busiest by turns: either may be what is looked for."""
        pushed, taken = self.flows.pushed.by_key, self.flows.taken.by_key
        depths = {key: _held(entries) + entries.dead for key, entries in self.stats.keys.items()}
        keys = sorted({*depths, *pushed, *taken} - {""})
        places: dict[str, int] = {}
        by_depth = sorted(keys, key=lambda key: -depths.get(key, 0))
        by_moves = sorted((pushed + taken).items(), key=lambda moved: (-moved[1], moved[0]))
        for place, key in enumerate(by_depth):
            places[key] = 2 * place
        for place, (key, _) in enumerate(by_moves):
            if key:
                places[key] = min(places[key], 2 * place + 1)
        keys.sort(key=lambda key: places[key])
        return [(key, self.stats.keys.get(key, _NOTHING)) for key in keys]


def _held(entries: KeyStats) -> int:
    return entries.ready + entries.leased + entries.delayed


def _look(store: Store, interval: float, before: _Look | None) -> _Look:
    """Look at the flows each time, and at the rest only if that was long enough ago."""
    begun = time.monotonic()
    flows = _flows(store, before.flows if before is not None else None)
    ended = time.monotonic()
    flows_rest = max(interval, _REST * (ended - begun))
    if before is not None and ended < before.stats_due:
        return dataclasses.replace(before, flows=flows, flows_rest=flows_rest)
    stats = store.stats()
    stats_rest = _REST * (time.monotonic() - ended)
    # A look that is due a little later than the flows are is taken with them.
    due = time.monotonic() + stats_rest - _SHORTEST_SECONDS / 2
    return _Look(stats, flows, flows_rest, stats_rest, due)


# -- drawing


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    rank: int  # where there is no room for all, those of the lowest rank stay
    cell: Callable[[_Look, str, KeyStats], str]


_COLUMNS = (
    _Column("ready", 0, lambda _look, _key, entries: _count(entries.ready)),
    _Column("leased", 4, lambda _look, _key, entries: _count(entries.leased)),
    _Column("delayed", 6, lambda _look, _key, entries: _count(entries.delayed)),
    _Column("dead", 3, lambda _look, _key, entries: _count(entries.dead)),
    _Column("in/s", 1, lambda look, key, _entries: look.flows.pushed.rate(key)),
    _Column("out/s", 2, lambda look, key, _entries: look.flows.taken.rate(key)),
    _Column("oldest", 5, lambda _look, _key, entries: _age(entries)),
    _Column("bytes", 7, lambda _look, _key, entries: terminal.size(entries.bytes)),
)
_KEY_COLUMNS = 16  # so much room its name has at least, before there is a column more
_GAP = 2
_LOW_LINES = 10  # of a screen that has no room for more of the head than its first line


def _count(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.2f}M"


def _age(entries: KeyStats) -> str:
    return terminal.age(entries.oldest_age) if _held(entries) else ""


def _head(path: str, look: _Look) -> list[Text]:
    keys = look.stats.keys.values()
    sums = f"{_count(sum(entries.ready for entries in keys))} ready, "
    sums += f"{_count(sum(entries.leased for entries in keys))} leased, "
    sums += f"{_count(sum(entries.delayed for entries in keys))} delayed"
    if dead := sum(entries.dead for entries in keys):
        sums += f"; {_count(dead)} of them dead letters"
    stats = look.stats
    sizes = f"file {terminal.size(stats.file_bytes)}, -wal {terminal.size(stats.wal_bytes)}, "
    sizes += f"free {terminal.size(stats.free_pages * stats.page_bytes)}, "
    sizes += f"{_count(stats.tombstones)} tombstones"
    moved = f"in {look.flows.pushed.rate()}/s, out {look.flows.taken.rate()}/s"
    return [
        Text(f"{terminal.printable(path)}  {time.strftime('%H:%M:%S')}", "bold"),
        Text(f"{moved}: {sums}"),
        Text(sizes),
        Text(""),
    ]


def _table(look: _Look, rows: list[tuple[str, KeyStats]], width: int) -> Table:
    """As many columns as there is room for, the names of the keys cut if need be."""
    texts = {
        column: [column.cell(look, key, entries) for key, entries in rows] for column in _COLUMNS
    }
    left = width
    shown = set()
    for column in sorted(_COLUMNS, key=lambda column: column.rank):
        needed = _GAP + max(map(len, [column.title, *texts[column]]))
        if left - needed < _KEY_COLUMNS:
            break
        left -= needed
        shown.add(column)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    table.add_column("key", overflow="ellipsis", no_wrap=True, max_width=left)
    columns = [column for column in _COLUMNS if column in shown]
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for index, (key, entries) in enumerate(rows):
        table.add_row(
            Text(terminal.printable(key)),  # not a str: rich would obey its [marks]
            *(Text(texts[column][index]) for column in columns),
            style="red" if entries.dead else "",
        )
    return table


def _screen(path: str, look: _Look, told: str, size: tuple[int, int]) -> Group:
    """All that fits into so many columns and lines, the last line at the end of it."""
    width, height = size
    rows = look.rows()
    lines: list[RenderableType] = [*_head(path, look)]
    if height < _LOW_LINES:
        del lines[1:]
    room = max(1, height - len(lines) - 2)  # but for the table's head and the last line
    hidden = rows[room - 1 :] if len(rows) > room else []
    lines.append(_table(look, rows[: len(rows) - len(hidden)], width))
    if hidden:
        held = sum(_held(entries) for _, entries in hidden)
        lines.append(Text(f"… and {len(hidden):,} keys more, with {_count(held)} entries"))
    rest = f"q ends; rates each {look.flows_rest:.1f} s, "
    rest += f"depths each {max(look.flows_rest, look.stats_rest):.1f} s"
    lines.append(Text(terminal.printable(told or rest), "dim"))
    for line in lines:
        if isinstance(line, Text):
            line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def write_once(store: Store, interval: float) -> None:
    """Write all keys, with their rates over one interval."""
    first = _look(store, interval, None)
    time.sleep(interval)
    look = _look(store, interval, dataclasses.replace(first, stats_due=0.0))
    width = terminal.width()
    for line in _head(store.path, look):
        terminal.write_line(line.plain)
    for text in terminal.drawn(_table(look, look.rows(), width), width):
        terminal.write_line(text)


def watch(store: Store, interval: float) -> int:
    """Draw it again and again, until q or Ctrl-C; the exit code."""
    told: list[str] = []
    look = _look(store, interval, None)
    # In UTF-8 whatever the locale, as all that we write.
    with (
        open(
            sys.stdout.fileno(), "w", encoding="utf-8", errors="backslashreplace", closefd=False
        ) as out,
        Signals([signal.SIGWINCH]) as signals,
        terminal.log_kept(told),
        keyboard() as keys,
        Live(
            console=Console(file=out),
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live,
    ):
        while True:
            due = time.monotonic() + look.flows_rest
            while (left := due - time.monotonic()) > 0:
                last = told[-1] if told else ""
                size = live.console.size
                live.update(_screen(store.path, look, last, size), refresh=True)
                pressed = signals.sleep(left, *keys)
                if signals.stop == signal.SIGINT or (pressed and is_end(keys[0])):
                    return terminal.DONE
                if signals.stop is not None:
                    return terminal.SIGNALED + signals.stop
            look = _look(store, interval, look)


@contextlib.contextmanager
def keyboard() -> Iterator[list[int]]:
    """Have stdin, if it is a terminal, tell of each key at once, and none of them be shown."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield []
        return
    number = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(number)
        tty.setcbreak(number)
        ours = termios.tcgetattr(number)
        # Ctrl-Z would leave the shell with our screen.
        ours[6][termios.VSUSP] = os.fpathconf(number, "PC_VDISABLE").to_bytes()
        termios.tcsetattr(number, termios.TCSANOW, ours)
    except termios.error as error:
        raise OSError(*error.args) from error
    try:
        yield [number]
    finally:
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(number, termios.TCSAFLUSH, before)


def is_end(number: int) -> bool:
    """Whether q is among the keys that were pressed, or the terminal is gone."""
    keys = os.read(number, 1024)
    return not keys or b"q" in keys.lower()
