"""The command line: each command is a few verbs of a Store, made fit for a shell.

Payloads are raw bytes on stdin and stdout; nothing else goes to stdout. Whatever goes wrong is one
line on stderr and an exit code, in `_Commands`, the one place that maps errors to them. Only `push`
makes a file. What is given on the command line is checked before the file is touched.

Every command but `pull` opens the store with history=None: of several open stores the smallest
history counts, and to look must not cut the history of an application that keeps more.
"""

import base64
import contextlib
import dataclasses
import errno
import functools
import io
import json
import logging
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO, Literal

import apsw
import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import connection, schema
from . import open as open_store
from .arguments import ROW_BYTES, check_headers, check_key, check_size, check_timeout
from .errors import DeadlineError, SpaceError, StoreError
from .mounts import network_file_system
from .records import Entry
from .store import Store

__all__ = ["commands", "run"]

DONE, NOTHING, MISUSE, FAILED = 0, 1, 2, 3
# As a shell tells of a program that a signal ended: 128 and the signal's number.
INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE

SELECT_KEYS = """
SELECT DISTINCT CAST(key AS BLOB) FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE state < 3
"""
COUNT_BAD_HEADERS = "SELECT count(*) FROM sqlspace_entries WHERE NOT json_valid(headers)"
# More than 10 say no more than 10.
CHECK_INTEGRITY = "PRAGMA integrity_check(10)"

_READ_BYTES = 1 << 20
# A batch of `pull --all` is lost if nobody reads it any more, and stands in memory: no more
# payloads than this, and one at a time if they are larger than that.
_BATCH_ENTRIES = 256
_BATCH_BYTES = 1 << 20
_MUCH_FREE_BYTES = 1 << 20
_SHELL_SECONDS = 10.0


# -- errors and exit codes


class _Commands(click.Group):
    """The command line: runs a command, and turns what it raises into a line and a code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run; ends by `SystemExit`."""
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except click.UsageError as error:
            names = error.ctx.command_path if error.ctx is not None else "sqlspace"
            code = _complain(f"{error.format_message()} ({names} --help says more)", MISUSE)
        sys.exit(code if isinstance(code, int) else DONE)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; the exit code."""
        code = DONE
        try:
            super().invoke(ctx)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the way out is short
            code = _discard_output(INTERRUPTED)
        except BrokenPipeError:
            code = _discard_output(PIPE_CLOSED)
        except DeadlineError:
            code = NOTHING
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # ValueErrors, but the file's
            code = _complain(f"the file holds what sqlspace doesn't write: {error}", FAILED)
        except (ValueError, TypeError) as error:
            code = _complain(str(error), MISUSE)
        except (SpaceError, MemoryError) as error:
            code = _complain(str(error) or "out of memory", FAILED)
        except OSError as error:
            where = error.filename or "standard input or output"
            code = _discard_output(_complain(f"{where}: {error.strerror}", FAILED))
        return code


def _complain(message: str, code: int) -> int:
    """One line on stderr, whatever the message; returns the code."""
    line = " ".join(f"sqlspace: {message}".split("\n"))
    with contextlib.suppress(OSError):
        click.echo(_printable(line), err=True)
    return code


def _discard_output(code: int) -> int:
    """Have the interpreter's last flush say nothing about a stdout that is broken."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return code


class _Log(logging.Handler):
    """What the library logs, as lines like those of the errors."""

    def emit(self, record: logging.LogRecord) -> None:
        _complain(record.getMessage(), DONE)


def run() -> None:
    """What the program does; ends by `SystemExit`."""
    # If one of the three is closed, a file of the store would get its number, and the output.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    logging.getLogger("sqlspace").addHandler(_Log())
    commands.main(prog_name="sqlspace")


# -- input and output


def _output() -> int | None:
    """The descriptor of stdout, if somebody is there to read it; None: it is none of the system's.

    Raises:
        BrokenPipeError, OSError: before anything is taken that would be lost.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        number = sys.stdout.fileno()
    except OSError:  # a test's
        return None
    poll = select.poll()
    poll.register(number, 0)
    for _, events in poll.poll(0):
        if events & select.POLLERR:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    return number


def _write(data: bytes) -> None:
    """Write all of it, or raise; Python's own stdout, unbuffered, writes half without a word."""
    number = _output()
    if number is None:
        sys.stdout.buffer.write(data)
        return
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(number, left) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(number, select.POLLOUT)
            poll.poll()


def _write_line(text: str) -> None:
    _write(f"{text}\n".encode(errors="backslashreplace"))


def _write_json(value: Any) -> None:
    _write_line(json.dumps(value, ensure_ascii=False))


def _write_table(table: Table) -> None:
    """A table for a person: as wide as the terminal, or, without one, as wide as it needs."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    text = io.StringIO()
    width = shutil.get_terminal_size().columns if terminal else 10_000
    Console(file=text, width=width, force_terminal=terminal).print(table)
    for line in text.getvalue().splitlines():
        _write_line(line.rstrip())


def _input() -> BinaryIO:
    if sys.stdin is None:
        raise click.UsageError("there is no standard input to read a payload from")
    with contextlib.suppress(OSError):  # a read that doesn't block looks like the end
        os.set_blocking(sys.stdin.fileno(), True)
    return sys.stdin.buffer


def _lines(source: BinaryIO) -> Iterator[list[bytes]]:
    """The lines of stdin without their newlines, in batches: those that have come by now."""
    parts: list[bytes] = []  # of a line whose end hasn't come yet
    size = 0
    read = getattr(source, "read1", source.read)
    while chunk := read(_READ_BYTES):
        *lines, rest = chunk.split(b"\n")
        if lines:
            yield [b"".join((*parts, lines[0])), *lines[1:]]
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if size > ROW_BYTES:
            raise ValueError(f"a line must be less than {ROW_BYTES:,} bytes")
    if size:
        yield [b"".join(parts)]


def _spelled(payload: bytes) -> dict[str, str]:
    """A payload in JSON: text if it is UTF-8, else base64, and which of the two."""
    try:
        return {"payload": payload.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"payload": base64.b64encode(payload).decode(), "encoding": "base64"}


def _entry(entry: Entry) -> dict[str, Any]:
    return {**dataclasses.asdict(entry), **_spelled(entry.payload)}


def _printable(text: str) -> str:
    """With no character that a terminal would obey."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _size(size: int) -> str:
    """Bytes for a person."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _age(seconds: float) -> str:
    """Seconds for a person, in the two largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{max(seconds, 0.0):.1f} s"
    length, unit, part, smaller = next(
        scale
        for scale in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))
        if whole >= scale[0]
    )
    return f"{whole // length} {unit} {whole % length // part} {smaller}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


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


def _examples(*lines: str) -> str:
    """For a command's help."""
    return "\b\n" + "\n  ".join(("Examples:", *lines))


_database = click.argument("database", metavar="DATABASE")
_key = click.argument("key", callback=_checked(check_key))
_as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, for a program.")
_limit = click.option(
    "-n", "--limit", type=click.IntRange(min=1), help="Up to so many, a newline after each."
)
_every = click.option("--all", "every", is_flag=True, help="All, a newline after each.")


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
    def wrapped(allow_network: bool, busy_timeout: float, **others: Any) -> None:
        opening = {"allow_network": allow_network, "busy_timeout": busy_timeout}
        command(opening=opening, **others)

    return wrapped


def _open(
    database: str, opening: Mapping[str, Any], history: int | None = None, **others: Any
) -> Store:
    """Open a store that is there; StoreError if it isn't."""
    try:
        found = os.stat(database)
    except OSError as error:
        raise StoreError(f"{database}: {error.strerror}") from error
    if stat.S_ISREG(found.st_mode) and not found.st_size:
        raise StoreError(f"{database}: the file is empty; a push would make it a store")
    return open_store(database, history=history, **opening, **others)


# -- the commands


@click.group(
    "sqlspace",
    cls=_Commands,
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
        context.exit(MISUSE)


@commands.command(
    epilog=_examples(
        "sqlspace push queue.db mail 'hello' --header from=me",
        "tail -f app.log | sqlspace push queue.db log --lines",
    )
)
@_database
@_key
@click.argument("payload", required=False)
@click.option("--header", "headers", metavar="NAME=VALUE", multiple=True, help="Repeatable.")
@click.option("--lines", is_flag=True, help="Push each line of stdin, without its newline.")
@click.option("--seq", "tell", is_flag=True, help="Write the entry's number.")
@click.option("--no-sync", is_flag=True, help="Faster; a power cut may lose the newest entries.")
@_opening
def push(
    *,
    database: str,
    key: str,
    payload: str | None,
    headers: tuple[str, ...],
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
    named = _named(headers)
    if lines:
        source = _input()
        with open_store(database, sync=not no_sync, history=None, **opening) as store:
            _push_lines(store, key, _lines(source), tell=tell)
        return
    data = os.fsencode(payload) if payload is not None else _input().read(ROW_BYTES + 1)
    check_size(key, data, check_headers(named))
    with open_store(database, sync=not no_sync, history=None, **opening) as store:
        seq = store.push(key, data, headers=named)
    if tell:
        _write_line(str(seq))


def _named(headers: Iterable[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for header in headers:
        name, equals, value = header.partition("=")
        if not name or not equals:
            raise click.UsageError(f"--header wants NAME=VALUE, not {header!a}")
        if name in named:
            raise click.UsageError(f"--header gives {name!a} twice")
        named[name] = value
    return named


def _push_lines(store: Store, key: str, batches: Iterator[list[bytes]], *, tell: bool) -> None:
    done = 0
    try:
        for batch in batches:
            seqs = store.push_many(key, batch)
            done += len(batch)
            if tell:
                _write_line("\n".join(map(str, seqs)))
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
@_limit
@_every
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
@_opening
def pull(
    *,
    database: str,
    key: str,
    wait: bool,
    timeout: float | None,
    limit: int | None,
    every: bool,
    history: int | None,
    as_json: bool,
    opening: dict[str, Any],
) -> None:
    """Take the first entry of KEY.

    Writes its payload as it is, with no newline behind it.

    Never waits unless told --wait or --timeout: if nothing is there, exit 1. With --limit or --all
    it waits for the first only, and takes what is there then. With --json a line for each.

    An entry that was taken is out of the file. One that can't be written (the disk is full, nobody
    reads the pipe, Ctrl-C) is put back; with --limit and --all a batch of 1 MB or 256 entries may
    be lost then.
    """
    _check_many(limit, every)
    seconds = timeout if wait or timeout is not None else 0.0
    with _open(database, opening, history) as store:
        if limit is None and not every:
            _pull_one(store, key, seconds, as_json=as_json)
            return
        if seconds != 0:
            store.wait(key, seconds)
        _pull_many(store, key, sys.maxsize if limit is None else limit, as_json=as_json)


def _check_many(limit: int | None, every: bool) -> None:
    if every and limit is not None:
        raise click.UsageError("--limit and --all don't go together")


def _taken(key: str, payload: bytes) -> bytes:
    return json.dumps({"key": key, **_spelled(payload)}, ensure_ascii=False).encode()


def _pull_one(store: Store, key: str, seconds: float | None, *, as_json: bool) -> None:
    _output()
    head = store._wait_and_take([key], seconds, None)  # noqa: SLF001  # pull, but able to go back
    try:
        _write(_taken(key, head[2]) + b"\n" if as_json else head[2])
    except BaseException:
        store._put_back(head)  # noqa: SLF001
        raise


def _pull_many(store: Store, key: str, limit: int, *, as_json: bool) -> None:
    taken, batch = 0, 1
    while taken < limit:
        _output()
        payloads = store.pull_many(key, min(batch, limit - taken))
        if not payloads:
            break
        taken += len(payloads)
        lines = [_taken(key, payload) for payload in payloads] if as_json else payloads
        _write(b"".join(line + b"\n" for line in lines))
        # What comes next is guessed from what came last.
        small = sum(map(len, payloads)) < _BATCH_BYTES // 2
        batch = min(2 * batch, _BATCH_ENTRIES) if small else 1
    if not taken:
        raise DeadlineError("nothing was there")


@commands.command(
    epilog=_examples("sqlspace peek queue.db mail", "sqlspace peek queue.db mail --all --json")
)
@_database
@_key
@_limit
@_every
@_as_json
@_opening
def peek(
    *,
    database: str,
    key: str,
    limit: int | None,
    every: bool,
    as_json: bool,
    opening: dict[str, Any],
) -> None:
    """Write what a pull of KEY would take.

    Takes nothing. If nothing is there, exit 1. With --limit and --all the entries behind it too, in
    their order. With --json a line for each, with its number, headers and times.
    """
    _check_many(limit, every)
    many = every or limit is not None
    left = sys.maxsize if every else limit or 1
    with _open(database, opening) as store:
        if not many and not as_json:
            payload = store.peek(key)
            if payload is None:
                raise DeadlineError("nothing was there")
            _write(payload)
            return
        found = False
        for entry in store.entries(key):
            if entry.state != "ready":
                continue
            found = True
            if as_json:
                _write_json(_entry(entry))
            else:
                _write(entry.payload + b"\n")
            left -= 1
            if not left:
                break
        if not found:
            raise DeadlineError("nothing was there")


@commands.command("len", epilog=_examples("sqlspace len queue.db mail"))
@_database
@_key
@_opening
def length(*, database: str, key: str, opening: dict[str, Any]) -> None:
    """Write how many live entries KEY holds.

    0 is an answer too, and exit 0.
    """
    with _open(database, opening) as store:
        _write_line(str(store.len(key)))


@commands.command(epilog=_examples("sqlspace keys queue.db"))
@_database
@_as_json
@_opening
def keys(*, database: str, as_json: bool, opening: dict[str, Any]) -> None:
    """Write the keys that hold entries.

    Sorted, one a line; with --json one list.
    """
    with _open(database, opening) as store:
        found = store.keys()
    if as_json:
        _write_json(found)
        return
    terminal = sys.stdout is not None and sys.stdout.isatty()
    for key in found:
        _write_line(_printable(key) if terminal else key)


@commands.command(epilog=_examples("sqlspace stats queue.db", "watch sqlspace stats queue.db"))
@_database
@_as_json
@_opening
def stats(*, database: str, as_json: bool, opening: dict[str, Any]) -> None:
    """Write counts, ages and sizes, key by key.

    And how large the file is, how much of it is free, how long its history.
    """
    with _open(database, opening) as store:
        found = store.stats()
    if as_json:
        _write_json(dataclasses.asdict(found))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", overflow="fold")
    for name in ("ready", "leased", "delayed", "dead", "oldest", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, sums in found.keys.items():
        live = sums.ready + sums.leased + sums.delayed
        counts = (sums.ready, sums.leased, sums.delayed, sums.dead)
        table.add_row(
            Text(_printable(key)),
            *(f"{count:,}" for count in counts),
            _age(sums.oldest_age) if live else "",
            _size(sums.bytes),
        )
    _write_table(table)
    free = found.free_pages
    _write_line(f"file        {_size(found.file_bytes)}")
    _write_line(f"-wal        {_size(found.wal_bytes)}")
    _write_line(f"free pages  {free:,} ({_size(free * found.page_bytes)})")
    _write_line(f"tombstones  {found.tombstones:,}")


@commands.command(epilog=_examples("sqlspace history queue.db mail | tail"))
@_database
@_key
@_as_json
@_opening
def history(*, database: str, key: str, as_json: bool, opening: dict[str, Any]) -> None:
    """Write what was taken from KEY.

    As far as the file remembers it, the oldest taking first. A line for each: number, outcome, when
    pushed, when taken (UTC), with tabs between; with --json an object each, times in Unix seconds.
    """
    with _open(database, opening) as store:
        for stone in store.history(key):
            if as_json:
                _write_json(dataclasses.asdict(stone))
            else:
                times = _moment(stone.pushed_at), _moment(stone.taken_at)
                _write_line("\t".join((str(stone.seq), stone.outcome, *times)))


@commands.command(epilog=_examples("sqlspace compact queue.db"))
@_database
@_as_json
@_opening
def compact(*, database: str, as_json: bool, opening: dict[str, Any]) -> None:
    """Make the file as small as it can be.

    Forgets the history, and gives free pages back to the system. Safe at any time; others wait
    meanwhile, about 1 s for 100 MB.
    """
    with _open(database, opening) as store:
        done = store.compact()
    if as_json:
        _write_json(dataclasses.asdict(done))
    else:
        _write_line(f"{_size(done.bytes_before)} before, {_size(done.bytes_after)} after")


@commands.command(epilog=_examples("sqlspace backup queue.db queue-monday.db"))
@_database
@click.argument("target")
@_opening
def backup(*, database: str, target: str, opening: dict[str, Any]) -> None:
    """Copy DATABASE to TARGET, while it is in use.

    TARGET must not be there yet.
    """
    with _open(database, opening) as store:
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
    for finding in _look_at(os.path.realpath(database), opening):
        findings.append(finding)
        if not as_json:
            level = click.style(f"{finding.level:8}", fg=_COLORS[finding.level])
            terminal = sys.stdout is not None and sys.stdout.isatty()
            line = f"{level} {finding.subject}: {_printable(finding.text)}"
            _write_line(line if terminal else click.unstyle(line))
    counts = {
        "problems": sum(finding.level == "problem" for finding in findings),
        "warnings": sum(finding.level == "warning" for finding in findings),
    }
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        _write_json({"database": database, **counts, "findings": listed})
    if counts["problems"]:
        click.get_current_context().exit(FAILED)


# -- what `check` looks at

_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Finding:
    level: Literal["ok", "warning", "problem"]
    subject: str
    text: str


def _look_at(path: str, opening: Mapping[str, Any]) -> Iterator[_Finding]:
    """All findings; the file is opened only if there is nothing wrong with its place."""
    yield from _look_at_versions()
    try:
        found = os.stat(path)
    except OSError as error:
        yield _Finding("problem", "file", f"{path}: {error.strerror}")
        return
    sound = True
    for finding in (
        *_look_at_place(path, found, allow_network=opening["allow_network"]),
        *_look_at_permissions(path, found),
    ):
        yield finding
        sound = sound and finding.level != "problem"
    if not found.st_size:
        yield _Finding("problem", "store", "the file is empty; a push would make it a store")
    elif not sound:
        yield _Finding("warning", "store", "not opened; solve the problems above, and check again")
    else:
        wal = path + "-wal"
        yield _look_at_wal(os.stat(wal).st_size if os.path.exists(wal) else 0)
        yield from _look_into(path, opening)


def _look_at_versions() -> Iterator[_Finding]:
    needed = "3.51.3"
    yield _Finding(
        "ok",
        "SQLite",
        f"{apsw.sqlite_lib_version()} inside apsw; other programs that write with one before "
        f"{needed} must say PRAGMA wal_autocheckpoint=0 first",
    )
    program = shutil.which("sqlite3")
    if program is None:
        return
    try:
        command = [program, "--version"]
        told = subprocess.run(  # noqa: S603  # what the user's own shell would run
            command, capture_output=True, check=True, timeout=_SHELL_SECONDS, text=True
        ).stdout
        version = told.split()[0]
        numbers = tuple(map(int, version.split(".")))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        yield _Finding("warning", "sqlite3", f"{program} doesn't tell its version")
        return
    if numbers >= tuple(map(int, needed.split("."))):
        yield _Finding("ok", "sqlite3", f"{program} is {version}")
    else:
        yield _Finding(
            "warning",
            "sqlite3",
            f"{program} is {version}, with the WAL-reset bug, which can lose commits: "
            "say PRAGMA wal_autocheckpoint=0 in it before it writes",
        )


def _look_at_place(path: str, found: os.stat_result, *, allow_network: bool) -> Iterator[_Finding]:
    if not stat.S_ISREG(found.st_mode):
        yield _Finding("problem", "file", f"{path} is not a regular file")
        return
    yield _Finding("ok", "file", f"{path}, {_size(found.st_size)}")
    kind = network_file_system(path)
    if kind is None:
        yield _Finding("ok", "file system", "a local one, as far as the system tells")
    else:
        yield _Finding(
            "warning" if allow_network else "problem",
            "file system",
            f"a network one ({kind}), where the -wal's shared memory doesn't work: move the file "
            "to a local disk; --allow-network opens it if only this machine uses it",
        )
    if found.st_nlink > 1:
        yield _Finding(
            "problem",
            "hard links",
            f"the file has {found.st_nlink} names; under each, SQLite keeps a -wal of its own, and "
            f"entries get lost: remove all but one (find -inum {found.st_ino} shows them)",
        )
    else:
        yield _Finding("ok", "hard links", "none")


def _look_at_permissions(path: str, found: os.stat_result) -> Iterator[_Finding]:
    findings = [*_look_at_access(path, found), *_look_at_directory(os.path.dirname(path))]
    for beside in (path + "-wal", path + "-shm"):
        try:
            its = os.stat(beside)
        except OSError:
            continue
        findings.extend(_look_at_access(beside, its))
        if its.st_uid != found.st_uid:
            shared = its.st_gid == found.st_gid and its.st_mode & 0o060 == 0o060
            findings.append(
                _Finding(
                    "warning" if shared else "problem",
                    "permissions",
                    f"{beside} belongs to {_user(its.st_uid)}, the database to "
                    f"{_user(found.st_uid)}, who may be locked out: chown it",
                )
            )
        if stat.S_IMODE(its.st_mode) != stat.S_IMODE(found.st_mode):
            findings.append(
                _Finding(
                    "warning",
                    "permissions",
                    f"{beside} is {stat.filemode(its.st_mode)}, the database "
                    f"{stat.filemode(found.st_mode)}: chmod it alike",
                )
            )
    if not findings:
        text = f"{stat.filemode(found.st_mode)} {_user(found.st_uid)}"
        findings.append(_Finding("ok", "permissions", text))
    yield from findings


def _look_at_access(path: str, found: os.stat_result) -> Iterator[_Finding]:
    if not os.access(path, os.R_OK | os.W_OK):
        yield _Finding(
            "problem",
            "permissions",
            f"{path} can't be read and written by {_user(os.geteuid())}: "
            f"it is {stat.filemode(found.st_mode)} and belongs to {_user(found.st_uid)}",
        )
    if found.st_mode & stat.S_IWOTH:
        yield _Finding("problem", "permissions", f"everybody may write to {path}: chmod o-rw it")
    elif found.st_mode & stat.S_IROTH:
        yield _Finding("warning", "permissions", f"everybody may read {path}: chmod o-r it")


def _look_at_directory(directory: str) -> Iterator[_Finding]:
    mode = os.stat(directory).st_mode
    if not os.access(directory, os.W_OK | os.X_OK):
        yield _Finding(
            "problem",
            "permissions",
            f"{directory}/ can't be written to by {_user(os.geteuid())}; the -wal belongs there",
        )
    if mode & stat.S_IWOTH:
        yield _Finding(
            "warning" if mode & stat.S_ISVTX else "problem",
            "permissions",
            f"everybody may make files in {directory}/"
            + (": keep the database elsewhere" if mode & stat.S_ISVTX else ", and replace yours"),
        )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _look_at_wal(size: int) -> _Finding:
    bound = connection._WAL_BYTES  # noqa: SLF001
    if size <= bound:
        return _Finding("ok", "-wal", f"{_size(size)}, at most {_size(bound)} is usual")
    return _Finding(
        "warning",
        "-wal",
        f"{_size(size)}, more than the usual {_size(bound)}: a reader that never ends keeps it "
        "from being used again, or one transaction was large; sqlspace compact cuts it",
    )


def _look_into(path: str, opening: Mapping[str, Any]) -> Iterator[_Finding]:
    try:
        with _open(path, opening) as store:
            yield from _look_at_content(store)
    except StoreError as error:
        yield _Finding("problem", "store", str(error))


def _look_at_content(store: Store) -> Iterator[_Finding]:
    read = store._database.read  # noqa: SLF001  # whose connection for browsing can't write
    version = read(schema.SELECT_VERSION)[0][0]
    yield _Finding("ok", "schema", f"version {version}, as sqlspace made it")
    told = [str(line) for (line,) in read(CHECK_INTEGRITY)]
    if told == ["ok"]:
        yield _Finding("ok", "integrity", "SQLite finds no damage")
    else:
        yield _Finding(
            "problem",
            "integrity",
            "SQLite finds damage: stop all who use the file, keep it and its -wal, and restore a "
            "backup or try .recover of the sqlite3 shell: " + "; ".join(told),
        )
        return
    nameless = [key for (key,) in read(SELECT_KEYS) if not _is_nameable(key)]
    if nameless:
        spelled = f"CAST(x'{nameless[0].hex()}' AS TEXT)"
        yield _Finding(
            "problem",
            "keys",
            f"{len(nameless):,} that no verb can name, made by other programs, the first "
            f"{spelled}: give its entries another in the sqlite3 shell (table sqlspace_entries)",
        )
    else:
        yield _Finding("ok", "keys", "all are valid")
    if broken := read(COUNT_BAD_HEADERS)[0][0]:
        yield _Finding("problem", "headers", f"those of {broken:,} entries are no JSON")
    found = store.stats()
    free = found.free_pages * found.page_bytes
    text = f"{found.free_pages:,} ({_size(free)})"
    if free > max(_MUCH_FREE_BYTES, found.file_bytes // 2):
        text += ", more than half of the file: sqlspace compact gives them back"
        yield _Finding("warning", "free pages", text)
    else:
        yield _Finding("ok", "free pages", text)


def _is_nameable(key: bytes) -> bool:
    try:
        check_key(key.decode())
    except ValueError:
        return False
    return True
