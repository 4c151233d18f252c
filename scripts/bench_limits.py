"""What the machine itself takes for the least that can be done."""

import os
import tempfile
from multiprocessing.connection import Connection

from bench_rows import Part, Plan, Row
from bench_sides import PROCESSES, Batch, microseconds

APPEND = bytes(4096)
flush = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def fsync_milliseconds(folder: str, times: int) -> float:
    """A bare fdatasync of an append, on average."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return microseconds(appending(file.fileno()), times) / 1e3


def appending(descriptor: int) -> Batch:
    """A write and an fdatasync at a file's end, so many times."""

    def append(times: int) -> None:
        for _ in range(times):
            os.write(descriptor, APPEND)
            flush(descriptor)

    return append


def overwriting(descriptor: int) -> Batch:
    """The same in place, as SQLite does in a -wal that has reached its size."""

    def overwrite(times: int) -> None:
        for _ in range(times):
            os.pwrite(descriptor, APPEND, 0)
            flush(descriptor)

    return overwrite


def limits(plan: Plan) -> list[Part]:
    """An append and an overwriting with an fsync, and a way between processes."""
    part = Part("The machine's own limits", "µs", "", "")
    hear, say = PROCESSES.Pipe()
    echo = PROCESSES.Process(target=_echo, args=(say,), daemon=True)
    echo.start()
    say.close()

    def round_trip(times: int) -> None:
        for _ in range(times):
            hear.send_bytes(b"!")
            hear.recv_bytes()

    with tempfile.TemporaryFile(dir=plan.folder) as file:
        descriptor = file.fileno()
        batches = {
            "write 4 KB at the end of a file, and fdatasync": appending(descriptor),
            "write 4 KB in place, and fdatasync": overwriting(descriptor),
            "a byte to another process and one back, through a pipe": round_trip,
        }
        found: dict[str, list[float]] = {name: [] for name in batches}
        round_trip(10)
        for _ in range(plan.rounds):
            for name, batch in batches.items():
                found[name].append(microseconds(batch, plan.fsyncs))
    hear.close()
    echo.join()
    part.rows += [Row(name, figures) for name, figures in found.items()]
    plan.step()
    return [part]


def _echo(connection: Connection) -> None:
    try:
        while True:
            connection.send_bytes(connection.recv_bytes())
    except EOFError:
        return
