"""The commands that look: they change nothing, and cut no application's history."""

import dataclasses
import itertools
import sys
from typing import Any

import click

from sqlspace import checkup
from sqlspace.errors import DeadlineError
from sqlspace.store import Store

from . import options, terminal, top

__all__ = ["COMMANDS"]

_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command(
    epilog=options.examples(
        "sqlspace peek queue.db mail", "sqlspace peek queue.db mail --all --json"
    )
)
@options.database
@options.key
@options.many
@options.as_json
@options.opened
def peek(*, store: Store, key: str, limit: int | None, as_json: bool) -> None:
    """Write what a pull of KEY would take.

    Takes nothing. If nothing is there, exit 1. With --limit and --all the entries behind it too, in
    their order. With --json a line for each, with its number, headers and times.
    """
    if limit is None and not as_json:
        payload = store.peek(key)
        if payload is None:
            raise DeadlineError
        terminal.write(payload)
        return
    found = False
    ready = (entry for entry in store.entries(key) if entry.state == "ready")
    for entry in itertools.islice(ready, min(limit or 1, sys.maxsize)):
        found = True
        if as_json:
            terminal.write_entry(entry)
        else:
            terminal.write(entry.payload + b"\n")
    if not found:
        raise DeadlineError


@click.command("len", epilog=options.examples("sqlspace len queue.db mail"))
@options.database
@options.key
@options.opened
def length(*, store: Store, key: str) -> None:
    """Write how many live entries KEY holds.

    0 is an answer too, and exit 0.
    """
    terminal.write_line(str(store.len(key)))


@click.command(epilog=options.examples("sqlspace keys queue.db"))
@options.database
@options.as_json
@options.opened
def keys(*, store: Store, as_json: bool) -> None:
    """Write the keys that hold entries.

    Sorted, one a line; with --json one list.
    """
    found = store.keys()
    if as_json:
        terminal.write_json(found)
        return
    for key in found:
        terminal.write_line(terminal.printable(key) if terminal.is_there() else key)


@click.command(epilog=options.examples("sqlspace stats queue.db", "watch sqlspace stats queue.db"))
@options.database
@options.as_json
@options.opened
def stats(*, store: Store, as_json: bool) -> None:
    """Write counts, ages and sizes, key by key.

    And how large the file is, how much of it is free, how long its history.
    """
    found = store.stats()
    if as_json:
        terminal.write_json(dataclasses.asdict(found))
    else:
        terminal.write_stats(found)


@click.command(epilog=options.examples("sqlspace history queue.db mail | tail"))
@options.database
@options.key
@options.as_json
@options.opened
def history(*, store: Store, key: str, as_json: bool) -> None:
    """Write what was taken from KEY.

    As far as the file remembers it, the oldest taking first. A line for each: number, outcome, when
    pushed, when taken (UTC), with tabs between; with --json an object each, times in Unix seconds.
    """
    for stone in store.history(key):
        if as_json:
            terminal.write_json(dataclasses.asdict(stone))
        else:
            times = terminal.moment(stone.pushed_at), terminal.moment(stone.taken_at)
            terminal.write_line("\t".join((str(stone.seq), stone.outcome, *times)))


@click.command(epilog=options.examples("sqlspace check queue.db"))
@options.database
@options.as_json
@options.opening
def check(*, database: str, as_json: bool, opening: dict[str, Any]) -> None:
    """Look for what is wrong with DATABASE.

    And with its place and its surroundings; changes nothing, reads the whole file. Each finding is
    ok, a warning, or a problem, and says what to do; exit 3 if there is a problem.
    """
    findings = []
    for finding in checkup.look(database, **opening):
        findings.append(finding)
        if not as_json:
            level = f"{finding.level:8}"
            if terminal.is_there():
                level = click.style(level, fg=_COLORS[finding.level])
            text = terminal.printable(finding.text)
            terminal.write_line(f"{level} {finding.subject}: {text}")
    counts = {
        "problems": sum(finding.level == "problem" for finding in findings),
        "warnings": sum(finding.level == "warning" for finding in findings),
    }
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        terminal.write_json({"database": database, **counts, "findings": listed})
    if counts["problems"]:
        click.get_current_context().exit(terminal.FAILED)


@click.command(
    "top", epilog=options.examples("sqlspace top queue.db", "sqlspace top queue.db --once")
)
@options.database
@click.option(
    "--interval",
    type=float,
    callback=options.checked(top.check_interval),
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="Between two looks; longer, if a look takes more than a tenth of that.",
)
@click.option(
    "--once", is_flag=True, help="Write the keys once, and end; so if no terminal is there."
)
@options.opened
def top_(*, store: Store, interval: float, once: bool) -> None:
    """Watch the keys, the fullest and the busiest first, until q or Ctrl-C.

    How many entries are ready, leased, delayed or dead letters; how many came in and went out, each
    second since the look before; the age of the oldest. A rate with a + is the least that it was:
    entries came and went without a trace, by clear, put, remove, or with a short --history.
    """
    if once or not terminal.is_capable():
        top.write_once(store, interval)
    else:
        click.get_current_context().exit(top.watch(store, interval))


COMMANDS = (check, history, keys, length, peek, stats, top_)
