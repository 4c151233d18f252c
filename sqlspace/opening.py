"""What `sqlspace.open` was told, checked, before anything is touched."""

import os
from typing import Literal

import apsw

from .arguments import check_flag, check_int, check_timeout, kind, shown
from .connection import Options
from .errors import StoreError

__all__ = ["check_path", "options"]

_LONGEST_BUSY_SECONDS = 1_000_000.0  # SQLite counts them in milliseconds, as an int


def options(
    path: object,
    *,
    sync: object,
    history: int | None,
    embed: bool,
    mode: int,
    busy_timeout: float,
    allow_network: bool,
    vfs: str | None,
    create: bool,
) -> Options:
    """What the caller wants, checked."""
    if history is not None:
        history = min(check_int(history, "history", 0), 1 << 53)
    mode = check_int(mode, "mode", 0)
    if mode > 0o777 or mode & 0o600 != 0o600:
        given = f"{mode:#o}" if mode < 1 << 30 else shown(mode)
        raise ValueError(f"mode must let the owner read and write, at most 0o777, not {given}")
    seconds = check_timeout(busy_timeout, "busy_timeout")
    if busy_timeout is None:
        raise TypeError("busy_timeout must be seconds as a number, not None")
    if vfs is not None:
        if not isinstance(vfs, str):
            raise TypeError(f"vfs must be str or None, not {kind(vfs)}")
        if vfs not in apsw.vfs_names():
            raise ValueError(f"vfs must name a VFS that is registered, not {shown(vfs)}")
    return Options(
        path=check_path(path),
        sync=_check_sync(sync),
        history=history,
        embed=check_flag(embed, "embed"),
        mode=mode,
        busy_timeout=min(
            _LONGEST_BUSY_SECONDS if seconds is None else seconds, _LONGEST_BUSY_SECONDS
        ),
        allow_network=check_flag(allow_network, "allow_network"),
        vfs=vfs,
        create=create,
    )


def _check_sync(sync: object) -> bool | Literal["group"]:
    if sync is True or sync is False:
        return sync
    if not isinstance(sync, str):
        raise TypeError(f"sync must be True, False or 'group', not {kind(sync)}")
    if sync != "group":
        raise ValueError(f"sync must be True, False or 'group', not {shown(sync)}")
    return "group"


def check_path(path: object) -> str:
    """An absolute path, symbolic links resolved."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be str or os.PathLike, not {kind(path)}")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path must be a path of str, not of {kind(text)}")
    text = str.__str__(text)  # a subclass may say that it is another
    if text in ("", ":memory:"):
        raise ValueError(f"path must name a file, not {text!r}; in memory there is sqlspace.Local")
    if "\0" in text:
        raise ValueError(f"path must not hold a NUL character: {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path holds a lone surrogate: {shown(text)}") from None
    try:
        return os.path.realpath(text)
    except OSError as error:
        raise StoreError(f"{text}: {error.strerror}") from error
