"""Forks: how every database of the process stands still meanwhile, and the child begins anew.

The child inherits SQLite's table of locks, but not the locks. So every database stands still,
outside of SQLite, while its process forks, and the child closes all that it has inherited before it
opens anything: then SQLite forgets the table.
"""

import collections
import itertools
import mmap
import operator
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import apsw

from . import doorbell, identity
from .waiting import surely

__all__ = ["Forking", "acquire", "databases", "detach", "opening", "release_all"]

# From sqlite3.h
_SHM_REGION_BYTES = 32_768
_XSHMMAP = 13  # its place in a sqlite3_io_methods

_MAP_FIXED = 0x10  # from <sys/mman.h>


class Forking(Protocol):
    """What a fork needs of a database; each of these is idempotent."""

    def before_fork(self) -> None:
        """Stand still."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Let go what is the parent's."""


opening = threading.Lock()
databases: weakref.WeakSet[Forking] = weakref.WeakSet()
_at_rest: list[Forking] = []
_opening_held: list[threading.Lock] = []


def acquire(held: list[threading.Lock], lock: threading.Lock) -> None:
    """Take a lock, and note it: in one C call, so that no interrupt comes in between."""
    held.extend(filter(_ACQUIRE, (lock,)))


def release_all(held: list[threading.Lock]) -> None:
    """Release what was taken, the last first; likewise, and idempotent."""
    while held:
        _DONE.extend(map(_RELEASE, map(held.pop, (-1,))))


_ACQUIRE = operator.methodcaller("acquire")
_RELEASE = operator.methodcaller("release")
_DONE: collections.deque[None] = collections.deque(maxlen=0)


# What these raise, Python only reports, and forks. So each is done to its end, whatever a signal's
# handler raises in the middle of it.


def _before_fork() -> None:
    _finish(_stand_still)


def _after_fork_in_parent() -> None:
    _finish(_go_on)


def _after_fork_in_child() -> None:
    _finish(_begin_anew)


def _finish(step: Callable[[], None]) -> None:
    try:
        interrupt = surely(step)
    except BaseException:  # on the way into it or out of it
        surely(step)
        raise
    if interrupt is not None:
        raise interrupt


def _stand_still() -> None:
    while True:
        # A database's locks come before opening, as in a reopening.
        for database in sorted(set(databases).difference(_at_rest), key=id):
            database.before_fork()
            _at_rest.append(database)
        if not _opening_held:
            acquire(_opening_held, opening)
        if set(databases) <= set(_at_rest):
            return
        release_all(_opening_held)


def _go_on() -> None:
    while _at_rest:
        _at_rest[-1].after_fork_in_parent()
        _at_rest.pop()
    release_all(_opening_held)


def _begin_anew() -> None:
    global opening  # noqa: PLW0603
    doorbell.forget()
    identity.forget()
    for database in list(databases):
        database.after_fork_in_child()
    _at_rest.clear()
    _opening_held.clear()
    opening = threading.Lock()


def detach(connection: apsw.Connection) -> None:
    """In a forked child: have what SQLite writes into the -shm from now on be the child's alone.

    To roll back what was open at the fork, SQLite clears from it what it takes for its own frames.
    They are the parent's: a transaction that had outgrown the page cache ended in "malformed", and
    of 12 that the parent committed meanwhile one was lost. To have the parent wait until the child
    had let go helped the latter only.
    """
    import ctypes  # noqa: PLC0415  # in such a child only

    file = ctypes.c_void_p()
    connection.file_control("main", apsw.SQLITE_FCNTL_FILE_POINTER, ctypes.addressof(file))
    methods = ctypes.cast(file, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))).contents
    if ctypes.cast(methods, ctypes.POINTER(ctypes.c_int))[0] < 2 or not methods[_XSHMMAP]:
        return  # this vfs has none
    integers = (ctypes.c_int,) * 3
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *integers, ctypes.c_void_p)
    shm_map = kind(methods[_XSHMMAP])
    remap = ctypes.CDLL(None).mmap
    remap.restype = ctypes.c_void_p
    remap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *integers, ctypes.c_long)
    length = max(_SHM_REGION_BYTES, mmap.PAGESIZE)
    region = ctypes.c_void_p()
    for number in itertools.count(0, length // _SHM_REGION_BYTES):
        shm_map(file, number, _SHM_REGION_BYTES, 0, ctypes.addressof(region))
        if not region.value:
            return
        content = ctypes.string_at(region.value, length)
        rights, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if remap(region, length, rights, flags | _MAP_FIXED, -1, 0) == region.value:
            ctypes.memmove(region, content, length)


for _ in range(3):  # an interrupt may strike before the first has come as far as its handler
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
