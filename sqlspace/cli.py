"""The command line: each command is a few verbs of a Store, made fit for a shell.

Only `push` makes a store; the others refuse a file that holds none. What is given on the command
line is checked before the file is touched.

Every command but `pull` opens the store with history=None: of several open stores the smallest
history counts, and to look must not cut the history of an application that keeps more.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from . import checkup, terminal
from .arguments import ROW_BYTES, check_headers, check_key, check_size, check_timeout
from .errors import DeadlineError, SpaceError
from .store import Store, open, open_existing

__all__ = ["commands", "run"]

# A batch of `pull --all` is lost if nobody reads it any more, and stands in memory: no more
# payloads than this, and one at a time if they are larger than that.
_BATCH_ENTRIES = 256
_BATCH_BYTES = 1 << 20

_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


def run() -> None:
    """What the program does; ends by `SystemExit`."""
    terminal.prepare()
    commands.main(prog_name="sqlspace")


# -- arguments and options that several commands share


def _checked(check: Callable[[Any], Any]) -> Callable[..., Any]:
    """A callback of click: the value, if the library's own check passes it."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            return None if value is None else check(value)
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from None

    return callback


def _seconds(value: float) -> float:
    check_timeout(value, "it")
    return value


def _number_or_all(text: str) -> int | None:
    if text != "all" and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"it must be a number or all, not {text!a}")
    return None if text == "all" else int(text)


def _named(headers: Iterable[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for header in headers:
        name, equals, value = header.partition("=")
        if not name or not equals:
            raise ValueError(f"it must be NAME=VALUE, not {header!a}")
        if name in named:
            raise ValueError(f"{name!a} is given twice")
        named[name] = value
    return named


def _examples(*lines: str) -> str:
    """For a command's help."""
    return "\b\n" + "\n  ".join(("Examples:", *lines))


_database = click.argument("database", metavar="DATABASE")
_key = click.argument("key", callback=_checked(check_key))
_as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, for a program.")


def _many(command: Callable[..., None]) -> Callable[..., None]:
    """The options of how many, handed on as `limit`; None is one, with no newline behind it."""

    @click.option(
        "-n", "--limit", type=click.IntRange(min=1), help="Up to so many, a newline after each."
    )
    @click.option("--all", "every", is_flag=True, help="All, a newline after each.")
    @functools.wraps(command)
    def wrapped(*, limit: int | None, every: bool, **others: Any) -> None:
        if every and limit is not None:
            raise click.UsageError("--limit and --all don't go together")
        command(limit=sys.maxsize if every else limit, **others)

    return wrapped


def _opening(command: Callable[..., None]) -> Callable[..., None]:
    """The options of opening, handed on as `opening`."""

    @click.option(
        "--allow-network",
        is_flag=True,
        help="Open a file on a network file system; only one machine may use it.",
    )
    @click.option(
        "--busy-timeout",
        type=float,
        callback=_checked(_seconds),
        metavar="SECONDS",
        default=30.0,
        show_default=True,
        help="Give up (exit 3) when others hold the write lock for longer.",
    )
    @functools.wraps(command)
    def wrapped(*, allow_network: bool, busy_timeout: float, **others: Any) -> None:
        opening = {"allow_network": allow_network, "busy_timeout": busy_timeout}
        command(opening=opening, **others)

    return wrapped


def _opened(command: Callable[..., None]) -> Callable[..., None]:
    """The options of opening; DATABASE, which must be a store, is handed on as `store`."""

    @_opening
    @functools.wraps(command)
    def wrapped(
        *, database: str, opening: dict[str, Any], history: int | None = None, **others: Any
    ) -> None:
        with open_existing(database, history=history, **opening) as store:
            command(store=store, **others)

    return wrapped


# -- the commands


@click.group(
    "sqlspace",
    cls=terminal.Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_examples("sqlspace push queue.db mail 'hello'", "sqlspace pull queue.db mail")
    + "\n\nExit codes: 0 done, 1 nothing there or timed out, 2 misuse, 3 the store failed; "
    "130 after Ctrl-C, 141 when nobody reads the output any more.",
)
@click.version_option(package_name="sqlspace")
@click.pass_context
def commands(context: click.Context) -> None:
    """Queues in one SQLite file: keys with entries, first in, first out.

    Any number of programs may use the file at the same time.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(terminal.MISUSE)


@commands.command(
    epilog=_examples(
        "sqlspace push queue.db mail 'hello' --header from=me",
        "tail -f app.log | sqlspace push queue.db log --lines",
    )
)
@_database
@_key
@click.argument("payload", required=False)
@click.option(
    "--header",
    "headers",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_checked(_named),
    help="Repeatable.",
)
@click.option("--lines", is_flag=True, help="Push each line of stdin, without its newline.")
@click.option("--seq", "tell", is_flag=True, help="Write the entry's number.")
@click.option("--no-sync", is_flag=True, help="Faster; a power cut may lose the newest entries.")
@_opening
def push(
    *,
    database: str,
    key: str,
    payload: str | None,
    headers: dict[str, str],
    lines: bool,
    tell: bool,
    no_sync: bool,
    opening: dict[str, Any],
) -> None:
    """Add an entry behind all others of KEY.

    Makes DATABASE if it isn't there.

    Without PAYLOAD it is stdin, whole, as it is: a newline at its end belongs to it. A PAYLOAD that
    begins with a dash stands after --. Writes nothing, unless told --seq.

    With --lines what has come by now goes into one transaction, so a slow source is pushed line by
    line and a fast one in large batches; if one fails, those before it are in.
    """
    if lines and (payload is not None or headers):
        raise click.UsageError("--lines reads stdin, and goes with neither PAYLOAD nor --header")
    source = terminal.source() if payload is None else None
    data = b""
    if not lines:
        data = os.fsencode(payload or "") if source is None else source.read(ROW_BYTES + 1)
        check_size(key, data, check_headers(headers))
    with open(database, sync=not no_sync, history=None, **opening) as store:
        if lines:
            _push_lines(store, key, tell=tell)
        else:
            seq = store.push(key, data, headers=headers)
            if tell:
                terminal.write_line(str(seq))


def _push_lines(store: Store, key: str, *, tell: bool) -> None:
    done = 0
    try:
        for batch in terminal.lines():
            seqs = store.push_many(key, batch)
            done += len(batch)
            if tell:
                terminal.write_line("\n".join(map(str, seqs)))
    except (SpaceError, ValueError) as error:
        if done:
            error.args = (f"{error}; the first {done:,} lines were pushed", *error.args[1:])
        raise


@commands.command(
    epilog=_examples(
        "sqlspace pull queue.db mail --timeout 10 > message",
        "sqlspace pull queue.db jobs --all --json | jq -r .payload",
    )
)
@_database
@_key
@click.option("--wait", is_flag=True, help="Wait for an entry, for ever unless told --timeout.")
@click.option(
    "--timeout",
    type=float,
    callback=_checked(_seconds),
    metavar="SECONDS",
    help="Wait for one, so many seconds at most.",
)
@_many
@click.option(
    "--history",
    callback=_checked(_number_or_all),
    metavar="NUMBER|all",
    default="10000",
    show_default=True,
    help="How many entries taken the file remembers, over all keys; the smallest number of all "
    "programs that have it open counts.",
)
@_as_json
@_opened
def pull(
    *, store: Store, key: str, wait: bool, timeout: float | None, limit: int | None, as_json: bool
) -> None:
    """Take the first entry of KEY.

    Writes its payload as it is, with no newline behind it.

    Never waits unless told --wait or --timeout: if nothing is there, exit 1. With --limit or --all
    it waits for the first only, and takes what is there then. With --json a line for each.

    An entry that was taken is out of the file. One that can't be written (the disk is full, nobody
    reads the pipe, Ctrl-C) is put back; with --limit and --all a batch of 1 MB or 256 entries may
    be lost then.
    """
    seconds = timeout if wait or timeout is not None else 0.0
    if limit is None:
        _pull_one(store, key, seconds, as_json=as_json)
        return
    if seconds != 0:
        store.wait(key, seconds)
    _pull_many(store, key, limit, as_json=as_json)


def _pull_one(store: Store, key: str, seconds: float | None, *, as_json: bool) -> None:
    terminal.writable()
    grab = store._wait_and_take([key], seconds, None)  # noqa: SLF001  # pull, but able to go back
    payload = grab.head.payload
    try:
        terminal.write(_in_json(key, payload) + b"\n" if as_json else payload)
    except BaseException:
        grab.restore()
        raise


def _pull_many(store: Store, key: str, limit: int, *, as_json: bool) -> None:
    taken, batch = 0, 1
    while taken < limit:
        terminal.writable()
        payloads = store.pull_many(key, min(batch, limit - taken))
        if not payloads:
            break
        taken += len(payloads)
        lines = [_in_json(key, payload) for payload in payloads] if as_json else payloads
        terminal.write(b"".join(line + b"\n" for line in lines))
        # What comes next is guessed from what came last.
        small = sum(map(len, payloads)) < _BATCH_BYTES // 2
        batch = min(2 * batch, _BATCH_ENTRIES) if small else 1
    if not taken:
        raise DeadlineError


def _in_json(key: str, payload: bytes) -> bytes:
    return json.dumps({"key": key, **terminal.spelled(payload)}, ensure_ascii=False).encode()


@commands.command(
    epilog=_examples("sqlspace peek queue.db mail", "sqlspace peek queue.db mail --all --json")
)
@_database
@_key
@_many
@_as_json
@_opened
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
    for entry in itertools.islice(ready, limit or 1):
        found = True
        if as_json:
            terminal.write_json({**dataclasses.asdict(entry), **terminal.spelled(entry.payload)})
        else:
            terminal.write(entry.payload + b"\n")
    if not found:
        raise DeadlineError


@commands.command("len", epilog=_examples("sqlspace len queue.db mail"))
@_database
@_key
@_opened
def length(*, store: Store, key: str) -> None:
    """Write how many live entries KEY holds.

    0 is an answer too, and exit 0.
    """
    terminal.write_line(str(store.len(key)))


@commands.command(epilog=_examples("sqlspace keys queue.db"))
@_database
@_as_json
@_opened
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


@commands.command(epilog=_examples("sqlspace stats queue.db", "watch sqlspace stats queue.db"))
@_database
@_as_json
@_opened
def stats(*, store: Store, as_json: bool) -> None:
    """Write counts, ages and sizes, key by key.

    And how large the file is, how much of it is free, how long its history.
    """
    found = store.stats()
    if as_json:
        terminal.write_json(dataclasses.asdict(found))
    else:
        terminal.write_stats(found)


@commands.command(epilog=_examples("sqlspace history queue.db mail | tail"))
@_database
@_key
@_as_json
@_opened
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


@commands.command(epilog=_examples("sqlspace compact queue.db"))
@_database
@_as_json
@_opened
def compact(*, store: Store, as_json: bool) -> None:
    """Make the file as small as it can be.

    Forgets the history, and gives free pages back to the system. Safe at any time; others wait
    meanwhile, about 1 s for 100 MB.
    """
    done = store.compact()
    if as_json:
        terminal.write_json(dataclasses.asdict(done))
    else:
        before, after = terminal.size(done.bytes_before), terminal.size(done.bytes_after)
        terminal.write_line(f"{before} before, {after} after")


@commands.command(epilog=_examples("sqlspace backup queue.db queue-monday.db"))
@_database
@click.argument("target")
@_opened
def backup(*, store: Store, target: str) -> None:
    """Copy DATABASE to TARGET, while it is in use.

    TARGET must not be there yet.
    """
    store.backup(target)


@commands.command(epilog=_examples("sqlspace check queue.db"))
@_database
@_as_json
@_opening
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
