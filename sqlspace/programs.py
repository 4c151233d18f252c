"""A program that is run for one entry: what it is given, and how it ended.

The payload is its stdin, and what is to be said of the entry stands in its environment. When it is
run, and what becomes of the entry then, is decided elsewhere.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
from typing import BinaryIO

from .delivery import Delivery

__all__ = ["check_program", "fate", "is_unfit", "start"]

# The program itself is wrong, and not what it is given, nor the machine.
_UNFIT = {errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EPERM, errno.ELOOP}


def check_program(name: str) -> str:
    """Refuse what can't be started."""
    if shutil.which(name) is None:
        raise ValueError(f"there is no program {name!a} that could be started")
    return name


def is_unfit(error: OSError) -> bool:
    """Whether it tells that the program can't be started at all."""
    return error.errno in _UNFIT


def start(argv: list[str], delivery: Delivery) -> subprocess.Popen[bytes]:
    """Start it for an entry.

    Raises:
        OSError: it can't be started, or there is no room for the payload in the folder of temporary
            files; its `filename` is what couldn't be had.
    """
    with _stdin(delivery.payload) as stdin:
        try:
            return subprocess.Popen(argv, stdin=stdin, env=_environment(delivery))  # noqa: S603
        except OSError as error:
            error.filename = argv[0]
            raise


def fate(code: int) -> str | None:
    """How it failed, by its exit code; None: it didn't."""
    if code == 0:
        return None
    return f"ended with {code}" if code > 0 else f"was ended by {_name(-code)}"


def _stdin(payload: bytes) -> BinaryIO:
    """A file, not a pipe: who doesn't read it keeps nobody waiting, and breaks nothing."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller's `with`
    try:
        file.write(payload)
        file.seek(0)
    except OSError as error:
        file.close()
        error.filename = tempfile.gettempdir()
        raise
    return file


def _environment(delivery: Delivery) -> dict[bytes, bytes]:
    """Ours, and what is to be said of the entry, in UTF-8 whatever the locale."""
    # Somebody else's SQL can have made headers that are no characters; as JSON they can be spelled.
    headers = json.dumps(delivery.headers, ensure_ascii=False, separators=(",", ":"))
    return {
        **os.environb,
        b"SQLSPACE_ID": delivery.id.encode(),
        b"SQLSPACE_KEY": delivery.key.encode(),
        b"SQLSPACE_SEQ": b"%d" % delivery.seq,
        b"SQLSPACE_ATTEMPTS": b"%d" % delivery.attempts,
        b"SQLSPACE_HEADERS": headers.encode(errors="backslashreplace"),
    }


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
