"""Is the file under this path still the one that was opened?

A push into a file that was unlinked, replaced or moved away would be acknowledged and lost. To
stat it before each write would find out, and cost a fifth of the throughput: on Linux 6.13 and
later a stat makes the next write take a fine-grained timestamp, which the fsync must carry. So
inotify watches, and one poll asks whether anything happened; only then is there a stat. An event
is a hint and not a verdict: a chmod, a hard link, or root opening the -wal raise one too.

One inotify instance serves all the stores of a process. Without inotify it is the stat, each time.
"""

import contextlib
import os
import select
import threading
from typing import Any

from .inotify import open_inotify

__all__ = ["Identity", "forget"]


class _Sentry:
    """The process's watch over all files that are open in stores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inotify: Any = open_inotify()
        self._watchers: dict[int, set[Identity]] = {}
        self._poll = select.poll()
        if self._inotify is not None:
            self._poll.register(self._inotify.fileno(), select.POLLIN)
        self.poll = self._poll.poll

    def watch(self, path: str, mask: int, identity: "Identity") -> int | None:
        """Alarm `identity` when something happens to `path`; None if it can't be watched."""
        if self._inotify is None:
            return None
        with self._lock:
            try:
                number = int(self._inotify.add_watch(path, mask))
            except OSError:
                return None
            self._watchers.setdefault(number, set()).add(identity)
            return number

    def unwatch(self, number: int, identity: "Identity") -> None:
        with self._lock:
            watchers = self._watchers.get(number)
            if watchers is None:
                return
            watchers.discard(identity)
            if not watchers:
                del self._watchers[number]
                with contextlib.suppress(OSError):  # the kernel has removed it with the file
                    self._inotify.rm_watch(number)

    def drain(self) -> None:
        """Read what happened, and alarm whom it concerns."""
        with self._lock:
            for event in self._inotify.read(timeout=0):
                if event.wd == -1:  # the queue overflowed: it may concern anybody
                    for watchers in self._watchers.values():
                        for identity in watchers:
                            identity.alarmed = True
                for identity in self._watchers.get(event.wd, ()):
                    identity.alarmed = True

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()


# From <sys/inotify.h>
_ATTRIB = 0x004
_DELETE_SELF = 0x400
_MOVE_SELF = 0x800

_sentry: _Sentry | None = None
_sentry_lock = threading.Lock()


def _the_sentry() -> _Sentry:
    global _sentry  # noqa: PLW0603  # one for the process, made when first needed
    with _sentry_lock:
        if _sentry is None:
            _sentry = _Sentry()
        return _sentry


def forget() -> None:
    """After a fork, in the child: let go the parent's instance, without a word to it."""
    global _sentry, _sentry_lock  # noqa: PLW0603
    _sentry_lock = threading.Lock()
    if _sentry is not None:
        _sentry.close()
        _sentry = None


class Identity:
    """The files of one store, as they were found: path, device and inode.

    Args:
        paths: Absolute and resolved.
    """

    def __init__(self, *paths: str) -> None:
        self.alarmed = False
        sentry = _the_sentry()
        self._sentry = sentry
        self._poll = sentry.poll
        self._numbers: list[int] = []
        watched = True
        for path in paths:
            number = sentry.watch(path, _ATTRIB | _DELETE_SELF | _MOVE_SELF, self)
            watched = watched and number is not None
            if number is not None:
                self._numbers.append(number)
        for directory in {parent for path in paths for parent in _parents(path)}:
            number = sentry.watch(directory, _MOVE_SELF, self)
            if number is not None:  # a directory that we may not read can't be watched
                self._numbers.append(number)
        self._always = not watched
        self._found = [(path, _identify(path)) for path in paths]

    def stands(self) -> bool:
        """Whether every file is still what it was when this was made."""
        if self._poll(0):
            self._sentry.drain()
        if not self.alarmed and not self._always:
            return True
        self.alarmed = False  # before the look: what happens after it raises the alarm again
        if all(found is not None and _identify(path) == found for path, found in self._found):
            return True
        self.alarmed = True
        return False

    def close(self) -> None:
        """Watch no more."""
        for number in self._numbers:
            self._sentry.unwatch(number, self)
        self._numbers.clear()


def _identify(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_nlink else None


def _parents(path: str) -> list[str]:
    parents = []
    while (parent := os.path.dirname(path)) != path:
        parents.append(parent)
        path = parent
    return parents
