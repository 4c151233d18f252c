"""What reaches the terminal: payloads, lines, complaints, exit codes.

Payloads are raw bytes on stdin and stdout, and nothing else goes to stdout. Whatever goes wrong is
one line on stderr and an exit code, in `Commands`, the one place that maps errors to them. No
character that a terminal would obey gets into a line of ours. Nothing here knows a store.
"""

import base64
import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sqlspace.arguments import ROW_BYTES
from sqlspace.errors import DeadlineError, LeaseError, SpaceError
from sqlspace.records import Entry, Stats

__all__ = [
    "COMMAND_FAILED",
    "DONE",
    "FAILED",
    "MISUSE",
    "NOTHING",
    "SIGNALED",
    "Commands",
    "age",
    "complain",
    "drawn",
    "is_capable",
    "is_there",
    "lines",
    "log_kept",
    "moment",
    "prepare",
    "printable",
    "shortened",
    "size",
    "source",
    "spelled",
    "width",
    "writable",
    "write",
    "write_entry",
    "write_json",
    "write_line",
    "write_stats",
]

DONE, NOTHING, MISUSE, FAILED = 0, 1, 2, 3
COMMAND_FAILED = 123  # one that we ran for an entry; as xargs has it
# As a shell tells of a program that a signal ended: 128 and the signal's number.
SIGNALED = 128
INTERRUPTED, PIPE_CLOSED = SIGNALED + signal.SIGINT, SIGNALED + signal.SIGPIPE

_READ_BYTES = 1 << 20
_UNBOUNDED_COLUMNS = 10_000
_SHORT = 60  # characters of a payload in a list


# -- errors and exit codes


class Commands(click.Group):
    """The command line: runs a command, and turns what it raises into a line and a code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run; ends by `SystemExit`."""
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except click.UsageError as error:
            names = error.ctx.command_path if error.ctx is not None else "sqlspace"
            code = complain(f"{error.format_message()} ({names} --help says more)", MISUSE)
        except click.Abort:
            code = INTERRUPTED
        except OSError as error:  # of --help
            code = _discard_output(complain(f"standard output: {error.strerror}", FAILED))
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
        except UnicodeDecodeError as error:  # a ValueError, but the file's
            code = complain(f"the file holds what sqlspace doesn't write: {error}", FAILED)
        except (ValueError, TypeError) as error:
            code = complain(str(error), MISUSE)
        except (SpaceError, MemoryError) as error:
            code = complain(str(error) or "out of memory", FAILED)
        except OSError as error:
            where = error.filename or "standard input or output"
            code = _discard_output(complain(f"{where}: {error.strerror}", FAILED))
        return code


def complain(message: str, code: int = DONE) -> int:
    """One line on stderr, whatever the message; returns the code."""
    line = printable("sqlspace: " + message.replace("\n", " "))
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
    return code


def _discard_output(code: int) -> int:
    """Have the interpreter's last flush say nothing about a stdout that is broken."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return code


class _Log(logging.Handler):
    """What the library logs, as lines like those of the errors.

    But for a lost lease: the settling raises it too, and it is told then.
    """

    kept: list[str] | None = None  # where they go, rather than to stderr

    def emit(self, record: logging.LogRecord) -> None:
        if any(isinstance(argument, LeaseError) for argument in record.args or ()):
            return
        if self.kept is None:
            complain(record.getMessage())
        else:
            self.kept[:] = [record.getMessage()]


_log = _Log()


@contextlib.contextmanager
def log_kept(last: list[str]) -> Iterator[None]:
    """Keep the last of the library's lines in `last`, while stderr shows a screen."""
    _log.kept = last
    try:
        yield
    finally:
        _log.kept = None


def prepare() -> None:
    """Make the process fit for a shell, before a command runs."""
    # If one of the three is closed, a file of the store would get its number, and the output.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    logging.getLogger("sqlspace").addHandler(_log)


# -- output


def is_there() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def is_capable() -> bool:
    """Whether stdout is a terminal on which a screen can be drawn."""
    return is_there() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def writable() -> int | None:
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
    if any(events & select.POLLERR for _, events in poll.poll(0)):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    return number


def write(data: bytes) -> None:
    """Write all of it, or raise; Python's own stdout, unbuffered, writes half without a word."""
    number = writable()
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


def write_line(text: str) -> None:
    """Write a line in UTF-8, whatever the locale."""
    write(f"{text}\n".encode(errors="backslashreplace"))


def write_json(value: Any) -> None:
    """Write a value as a line of JSON."""
    write_line(json.dumps(value, ensure_ascii=False))


def write_entry(entry: Entry) -> None:
    """Write all of an entry as a line of JSON."""
    write_json({**dataclasses.asdict(entry), **spelled(entry.payload)})


def width() -> int:
    """The columns of the terminal; where there is none, as many as anybody needs."""
    return shutil.get_terminal_size().columns if is_there() else _UNBOUNDED_COLUMNS


def drawn(table: Table, columns: int) -> list[str]:
    """A table's lines."""
    text = io.StringIO()
    Console(file=text, width=columns, force_terminal=is_there()).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def write_stats(found: Stats) -> None:
    """Write them for a person: as wide as the terminal; without one as wide as they need."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", overflow="fold")
    for name in ("ready", "leased", "delayed", "dead", "oldest", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, sums in found.keys.items():
        live = sums.ready + sums.leased + sums.delayed
        counts = (sums.ready, sums.leased, sums.delayed, sums.dead)
        table.add_row(
            Text(printable(key)),  # not a str: rich would obey its [marks]
            *(f"{count:,}" for count in counts),
            age(sums.oldest_age) if live else "",
            size(sums.bytes),
        )
    for line in drawn(table, width()):
        write_line(line)
    free = found.free_pages
    write_line(f"file        {size(found.file_bytes)}")
    write_line(f"-wal        {size(found.wal_bytes)}")
    write_line(f"free pages  {free:,} ({size(free * found.page_bytes)})")
    write_line(f"tombstones  {found.tombstones:,}")


# -- input


def source() -> BinaryIO:
    """Where payloads are read from: stdin."""
    if sys.stdin is None:
        raise click.UsageError("there is no standard input to read a payload from")
    with contextlib.suppress(OSError):  # a read that doesn't block looks like the end
        os.set_blocking(sys.stdin.fileno(), True)
    return sys.stdin.buffer


def lines() -> Iterator[list[bytes]]:
    """The lines of stdin without their newlines, in batches: those that have come by now."""
    stdin = source()
    read = getattr(stdin, "read1", stdin.read)
    parts: list[bytes] = []  # of a line whose end hasn't come yet
    held = 0
    while chunk := read(_READ_BYTES):
        *complete, rest = chunk.split(b"\n")
        if complete:
            yield [b"".join((*parts, complete[0])), *complete[1:]]
            parts, held = [], 0
        parts.append(rest)
        held += len(rest)
        if held > ROW_BYTES:
            raise ValueError(f"a line must be less than {ROW_BYTES:,} bytes")
    if held:
        yield [b"".join(parts)]


# -- how things are spelled


def spelled(payload: bytes) -> dict[str, str]:
    """A payload in JSON: text if it is UTF-8, else base64, and which of the two."""
    try:
        return {"payload": payload.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"payload": base64.b64encode(payload).decode(), "encoding": "base64"}


def printable(text: str) -> str:
    """The text with no character that a terminal would obey."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shortened(payload: bytes) -> str:
    """How a payload begins, for a person."""
    beginning = payload[: 4 * _SHORT]
    text = beginning.decode(errors="backslashreplace")
    whole = len(beginning) == len(payload) and len(text) <= _SHORT
    return text if whole else text[:_SHORT] + "…"


def size(number: int) -> str:
    """Bytes for a person."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{number} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def age(seconds: float) -> str:
    """Seconds for a person, in the two largest units."""
    whole = int(seconds)
    for length, unit, part, smaller in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{max(seconds, 0.0):.1f} s"


def moment(seconds: float) -> str:
    """Unix seconds as a date and time in UTC; as they are, if no calendar has them."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    except (ValueError, OverflowError):
        return f"{seconds:.6f}"
