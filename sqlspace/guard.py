"""Python's own sqlite3 must not open a file that a Store of this process has open.

It is another SQLite library than apsw's, and they don't know of each other. When one of them closes
the file, the system drops all POSIX locks that the process has on it: the Store's as well. Then
another process writes where the Store is writing, and a push is acknowledged and lost.

So from the first opening of a Store on, an audit hook sees each `sqlite3.connect` of the process
and refuses those of an open Store's file. It only stats the path: to open the file, and close it,
would be the very accident. What it can't see: files that sqlite3 had open before the Store was,
ATTACH, and other SQLite libraries. For them it stays a rule: one file, one library a process.

An audit hook can't be removed, and is called for every event of the process, flock and fcntl among
them: four in each push, 2 µs of 33. So a process that has no sqlite3 gets none, but for a finder of
modules that puts it in when sqlite3 is imported. The hook is one comparison for all other events,
and one look at an empty dict while no Store is open.
"""

import contextlib
import os
import sys
from typing import Any
from urllib.parse import unquote_to_bytes

from .errors import StoreError

__all__ = ["Guard"]

_EVENT = "sqlite3.connect"
_BESIDE = (b"-wal", b"-shm")  # as a database it is somebody's mistake; SQLite locks the -shm, too


class Guard:
    """One Store's file is open in this process, until `release`.

    Args:
        file: Its device and inode; None guards nothing.
    """

    def __init__(self, file: tuple[int, int] | None = None) -> None:
        if file is not None:
            if _import not in sys.meta_path:
                sys.meta_path.insert(0, _import)
            if not _MODULES.isdisjoint(sys.modules):
                _install()
            _guarded[self] = file

    def release(self) -> None:
        """Guard it no more; idempotent."""
        _guarded.pop(self, None)


# The files that are open, as often as they are. Each change is one step of a dict: no lock that a
# fork, or a signal's handler that closes a store, could find taken.
_guarded: dict[Guard, tuple[int, int]] = {}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == _EVENT and _guarded:
        for path in _paths(arguments[0]):
            if _identify(path) in _guarded.values():
                raise StoreError(
                    f"{os.fsdecode(path)}: a Store of this process has this file open. Python's "
                    "sqlite3 is another SQLite library than the Store's: when it closes the file, "
                    "the Store's locks are gone and entries are lost. Connect with apsw (push_on "
                    "takes its connections), or use sqlite3 in another process"
                )


_uninstalled = [_audit]
_MODULES = {"sqlite3", "_sqlite3"}  # the first comes first, mostly


def _install() -> None:
    with contextlib.suppress(IndexError):  # it is there already
        sys.addaudithook(_uninstalled.pop())


class _Import:
    """Finds no module, but notices who looks for sqlite3."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        if name in _MODULES:
            _install()


_import: Any = _Import()


def _paths(database: object) -> list[bytes]:
    """The files that `sqlite3.connect(database)` may open, whether it takes it for a URI or not."""
    try:
        # A PathLike is asked twice, then: here and by sqlite3, which also complains of what is bad.
        name = os.fsencode(database)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001
        return []
    if name in (b"", b":memory:"):
        return []
    paths = [name]
    if name.startswith(b"file:"):
        paths.append(_path_of(name))
    for suffix in _BESIDE:
        paths += [path.removesuffix(suffix) for path in paths if path.endswith(suffix)]
    return paths


def _path_of(uri: bytes) -> bytes:
    """As SQLite reads it."""
    path = uri.removeprefix(b"file:").partition(b"#")[0].partition(b"?")[0]
    if path.startswith(b"//"):  # an authority, which must be empty or localhost
        path = b"/" + path[2:].partition(b"/")[2]
    return unquote_to_bytes(path).partition(b"\0")[0]


def _identify(path: bytes) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # not there; a NUL in it
        return None
    return found.st_dev, found.st_ino
