"""Is the file under this path still the one that was opened?

A push into a file that was unlinked, replaced or moved away would be acknowledged and lost. To
stat it before each write would find out, and cost a fifth of the throughput: on Linux 6.13 and
later a stat makes the next write take a fine-grained timestamp, which the fsync must carry. So
inotify watches, and one poll asks whether anything happened; only then is there a stat. An event
is a hint and not a verdict: a chmod, a hard link, or root opening the -wal raise one too.

One inotify instance serves all the stores of a process. Without inotify it is the stat, each time.
That a directory above the file was renamed raises no event here (to watch it slows down every write
into it); a look once a second finds it, and until then nothing is lost, for the file moved along.
"""

import contextlib
import os
import select
import threading
import time
from typing import Any

from .inotify import open_inotify

__all__ = ["Identity", "forget"]


class _Sentry:
    """The process's watch over all files that are open in stores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inotify: Any = open_inotify()
        self._watchers: dict[int, set[Identity]] = {}
        self._epoll: Any = None
        self.poll: Any = _silence  # truthy if there is something to drain
        if self._inotify is not None:
            # Not select.poll(): all threads ask at once, and that object raises if they do.
            self._epoll = select.epoll()
            self._epoll.register(self._inotify.fileno(), select.EPOLLIN)
            self.poll = self._epoll.poll

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
        """Read what happened, and alarm everybody: first, for what is read nobody else can poll."""
        with self._lock:
            for watchers in self._watchers.values():
                for identity in watchers:
                    identity.alarmed = True
            self._inotify.read(timeout=0)

    def rest(self, identity: "Identity", *, alarmed: bool) -> None:
        """End an alarm; not while somebody reads, who may have read what it was raised for."""
        with self._lock:
            identity.alarmed = alarmed

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
        if self._inotify is not None:
            self._inotify.close()

    def __del__(self) -> None:  # at the process's end: without it, a ResourceWarning
        self.close()


# From <sys/inotify.h>
_ATTRIB = 0x004
_DELETE_SELF = 0x400
_MOVE_SELF = 0x800
_OPEN = 0x020

_LOOK_AGAIN_SECONDS = 1.0

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
        self.look_at = 0.0  # on the monotonic clock
        sentry = _the_sentry()
        self._sentry = sentry
        self.poll = sentry.poll  # truthy if something happened, to whomever
        self._numbers: list[int] = []
        watched = True
        for path in paths:
            # Who opens the -wal, the last of them, may be one more to share the store.
            mask = _ATTRIB | _DELETE_SELF | _MOVE_SELF | (_OPEN if path == paths[-1] else 0)
            number = sentry.watch(path, mask, self)
            watched = watched and number is not None
            if number is not None:
                self._numbers.append(number)
        # What can't be watched is looked at each time.
        self._always = self.alarmed = not watched
        self.hears = bool(paths) and watched
        """Whether it is alarmed when somebody announces that the store is open elsewhere too."""
        self._found = [(path, _identify(path)) for path in paths]

    def stands(self) -> bool:
        """Whether every file is still what it was when this was made."""
        if self.poll(0):
            self._sentry.drain()
        now = time.monotonic()
        if not self.alarmed and now < self.look_at:
            return True
        self.look_at = now + _LOOK_AGAIN_SECONDS
        # Before the look: what happens after it raises the alarm again.
        self._sentry.rest(self, alarmed=self._always)
        if all(found is not None and _identify(path) == found for path, found in self._found):
            return True
        self.alarmed = True
        return False

    def announce(self) -> None:
        """Alarm all others that have the store open."""
        if self._found:
            os.close(os.open(self._found[-1][0], os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """Watch no more."""
        for number in self._numbers:
            self._sentry.unwatch(number, self)
        self._numbers.clear()


def _silence(_: float) -> object:
    """Without inotify nothing is heard."""
    return None


def _identify(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_nlink else None
