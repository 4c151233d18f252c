"""The process's watch: one of the threads that wait listens for all of them.

It hears rings on a socket, signs of change from inotify, and nudges on a pipe; and it looks into
the files when their time has come. When it leaves it passes the role on: a thread of its own for it
was measured at 0.32 ms from push to pull, against 0.065.

What the clock decides (an entry comes due, a lease runs out) nobody rings for, least of all a
process that died. Who parks says when that will be; what changes afterwards, the watch sees as it
sees any change. At that time it looks, and wakes those for whom there is something.

Writers that don't ring (the sqlite3 shell), and rings that get lost, are seen by inotify: the -wal
was modified, so looks at `data_version` follow, soon at first, then backing off while the changes
are of no concern. Without inotify the same looks come round without a sign.
"""

import contextlib
import fcntl
import os
import select
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .errors import SpaceError
from .inotify import open_inotify
from .waiting import LOOK_AGAIN_SECONDS, Waiter

__all__ = ["Bell", "Stirring", "Watch", "forget", "the_watch"]

_LOOK_FIRST_SECONDS = 0.02  # from the beginning of a wait to the first look
_LOOK_SOON_SECONDS = 0.001  # from a sign of a change to the first look
_LOOK_LATE_SECONDS = 0.05  # the longest time between looks while changes go on, or without signs
_LOOK_IDLE_SECONDS = 0.5  # and while none is seen
_REST_AFTER_LOOK = 20  # times as long as the look took
# A sign comes when the -wal is written, and the commit is visible only after its fsync: so looks go
# on for a while after the last sign.
_LOOK_ON_SECONDS = 2.0
_IN_MODIFY = 0x2  # from <sys/inotify.h>
_IN_ONESHOT = 0x80000000

Stirring = Callable[[Iterable[str], bool], tuple[Iterable[str], float | None] | None]
"""Called as `stirring(tokens, timed)`; see `Doorbell`."""


class Bell(Protocol):
    """What the watch needs to know of a `Doorbell`, and to do with it."""

    file_id: tuple[int, int] | None
    wal: str
    name: tuple[int, int] | str
    stirring: Stirring

    def takes(self, message: bytes, waiter: Waiter) -> bool:
        """Whether a ring is for this waiter, and for nobody besides in this process."""

    def tokens(self) -> list[str]:
        """What to look for."""

    def wake(self, token: str) -> bool:
        """Wake who waits for it; whether one was that takes."""

    def hear(self, token: str) -> bool:
        """The same, when it was rung for by another process."""

    def wake_all(self) -> None:
        """Wake everybody."""

    def pass_on(self, token: str) -> None:
        """Ring elsewhere, if nobody waits for it here."""


class _File:
    """What the watch knows of one file."""

    def __init__(self, name: tuple[int, int] | str) -> None:
        self.name = name
        self.bells: set[Bell] = set()
        self.look_at: float | None = None  # on the monotonic clock; None: at the next sign
        self.look_until = 0.0  # after that, only at a sign
        self.pause = _LOOK_SOON_SECONDS
        # What the last look found. Mostly somebody was rung for it, and has it by the next look.
        self.seen: set[tuple[Bell, str]] = set()
        # When the clock changes something for a bell, as last seen.
        self.timers: dict[Bell, float] = {}
        self.number: int | None = None  # of its inotify watch, while that is armed


class Watch:
    """The process's ears: a socket for rings, inotify for files, a pipe to nudge who listens."""

    def __init__(self) -> None:
        self._closed = True
        # One for all bells. A signal's handler may close a store, or push, while its thread has it.
        self.lock = threading.RLock()
        self._files: dict[tuple[int, int] | str, _File] = {}
        self._numbers: dict[int, _File] = {}
        self._parked: dict[Waiter, None] = {}
        self._watcher: Waiter | None = None
        self._heir: Waiter | None = None  # woken to watch, and looking before it parks
        self._heard_at = 0.0  # when it last came round: the role of one that died is taken over
        self._inotify: Any = open_inotify()
        self._nudge_out, self._nudge_in = os.pipe()
        os.set_blocking(self._nudge_out, False)
        os.set_blocking(self._nudge_in, False)
        self._socket = _open_socket()
        self._socket_number = None if self._socket is None else self._socket.fileno()
        self._ears = self._open_ears()
        self._closed = False

    def _open_ears(self) -> select.poll:
        # After 5 ms of rest it takes 520 µs from a push to the pull that it wakes. Tried, for less:
        # a blocking recv alone, or epoll: the same. A short spin before the sleep: the same, for
        # more CPU. A ring before the commit, so that who waits is warm by then: 1 to 3 % less, for
        # a second ring a push. A pipe instead of the datagram would take 28 µs off, but two
        # processes that know each other by a pid only have none.
        ears = select.poll()
        ears.register(self._nudge_out, select.POLLIN)
        for ear in (self._socket, self._inotify):
            if ear is not None:
                ears.register(ear.fileno(), select.POLLIN)
        return ears

    # -- who is there

    def attend(self, bell: Bell) -> set[Bell]:
        """Watch the bell's file from now on; all bells of that file that are watched, as of now."""
        with self.lock:
            file = self._files.get(bell.name)
            if file is None:
                file = self._files[bell.name] = _File(bell.name)
            file.bells.add(bell)
            if file.number is None and file.look_at is None:
                # Most are rung for before this look; only who waits longer asks for a sign.
                now = time.monotonic()
                file.look_at = now + _LOOK_FIRST_SECONDS
                file.look_until = now + _LOOK_ON_SECONDS
                if self._watcher is not None:
                    self.nudge()  # it may sleep longer than that
            return file.bells

    def ignore(self, bell: Bell) -> None:
        """Undo `attend`; idempotent."""
        with self.lock:
            file = self._files.get(bell.name)
            if file is not None:
                file.bells.discard(bell)
                file.timers.pop(bell, None)
                self._tidy(file)

    def _tidy(self, file: _File) -> None:
        """Forget a file that nobody waits for; an armed watch goes first, at the next change."""
        if not file.bells:
            file.look_at = None
            if file.number is None:
                self._files.pop(file.name, None)

    def _arm(self, file: _File, bell: Bell) -> None:
        """Ask for one sign of a change; where that can't be, looks go on without one."""
        if self._inotify is not None and bell.file_id is not None:
            with contextlib.suppress(OSError):
                number = self._inotify.add_watch(bell.wal, _IN_MODIFY | _IN_ONESHOT)
                file.number = number
                self._numbers[number] = file

    def _plan(self, file: _File) -> None:
        """After a sign: look soon, unless looks go on already, and for a while."""
        now = time.monotonic()
        file.look_until = now + _LOOK_ON_SECONDS
        if file.look_at is None or file.pause > _LOOK_LATE_SECONDS:
            file.pause = _LOOK_SOON_SECONDS
            file.look_at = now + file.pause

    def expect(self, bell: Bell, seconds: float) -> None:
        """Look for it then, unless it is to be looked for earlier."""
        at = time.monotonic() + seconds
        with self.lock:
            file = self._files.get(bell.name)
            if file is None or bell not in file.bells or file.timers.get(bell, at) < at:
                return
            file.timers[bell] = at
            if self._watcher is not None:
                self.nudge()  # it may sleep longer than that

    # -- rings

    def send(self, pid: int, message: bytes) -> bool:
        """Ring at another process; whether somebody is there."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto(message, _address(pid))
        except BlockingIOError:  # it has many unread: it is up, and will look
            return True
        except OSError:
            return False
        return True

    def nudge(self) -> None:
        """Have the watching thread come round."""
        with contextlib.suppress(BlockingIOError):  # full: it will come round
            os.write(self._nudge_in, b"!")

    # -- sleeping

    def park(self, bell: Bell, waiter: Waiter, seconds: float) -> None:
        """As `Doorbell.park`."""
        ends = time.monotonic() + seconds
        with self.lock:
            lost = time.monotonic() - self._heard_at > 2 * LOOK_AGAIN_SECONDS
            if self._watcher is None or lost:
                if self._watcher is not None:
                    self.nudge()  # it stood still, with the process perhaps; if it lives, it goes
                    self._ears = self._open_ears()  # no two threads may poll the same
                self._watcher, self._heir = waiter, None
                self._heard_at = time.monotonic()
            else:
                self._parked[waiter] = None
        try:
            if self._watcher is waiter:
                self._listen(bell, waiter, ends)
            else:
                waiter.park(seconds)
        finally:
            waiter.listen(None)
            with self.lock:
                self._parked.pop(waiter, None)
                if self._watcher is waiter:
                    self._watcher = None
                    if self._parked:
                        self._call_heir()

    def resign(self, waiter: Waiter) -> None:
        """It waits no more: if it was called to watch, call another."""
        with self.lock:
            if self._heir is waiter:
                self._call_heir()

    def _call_heir(self) -> None:
        """Have one that is parked look, find nothing, and park as the watcher."""
        self._heir = next(iter(self._parked), None) if self._watcher is None else None
        if self._heir is not None:
            self._heir.wake()

    def _listen(self, bell: Bell, waiter: Waiter, ends: float) -> None:
        """Watch for all, until this waiter is woken, its time is over, or it has lost the role."""
        ears = self._ears
        waiter.listen(self.nudge)
        while self._watcher is waiter:
            if waiter.park(0) or (seconds := self._until_look(ends)) is None:
                return
            for ear, _ in ears.poll(seconds * 1000):
                if ear != self._socket_number:
                    self._hear(ear)
                elif self._answer(bell, waiter):
                    return  # the rest can wait for the next to listen
            if waiter.park(0):
                return
            self._look()

    def _hear(self, ear: int) -> None:
        if ear == self._nudge_out:
            with contextlib.suppress(BlockingIOError):
                os.read(self._nudge_out, 4096)
        else:
            self._note()

    def _until_look(self, ends: float) -> float | None:
        """How long to listen, until the next look at most; None: the time is over."""
        now = time.monotonic()
        with self.lock:
            self._heard_at = now
            looks = self._planned()
        return max(0.0, min([ends, *looks]) - now) if now < ends else None

    def _planned(self) -> list[float]:
        return [
            at
            for file in self._files.values()
            for at in (file.look_at, *file.timers.values())
            if at is not None
        ]

    def answer_all(self, bell: Bell) -> None:
        """Read what rings there are, for a bell at which somebody has stopped waiting."""
        while self._socket is not None and any(
            fcntl.ioctl(self._socket, termios.FIONREAD, b"\0" * 4)
        ):
            self._answer(bell)

    def _answer(self, bell: Bell, waiter: Waiter | None = None) -> bool:
        """Read one ring; whether it was for this waiter of the bell. Else pass it on."""
        assert self._socket is not None
        try:
            message = self._socket.recv(2048)
        except BlockingIOError:  # another has read it
            return False
        if waiter is not None and bell.takes(message, waiter):
            return True
        self._wake_for(message, bell)
        return False

    def _wake_for(self, message: bytes, heard_by: Bell) -> None:
        """Wake whom a ring is for; the bell may be watched no more, since its last waiter left."""
        try:
            device, inode, token = message.decode().split(" ", 2)
            name = int(device), int(inode)
        except ValueError:  # it isn't one of ours
            return
        file = self._files.get(name)
        bells = [*file.bells] if file is not None else []
        if heard_by.file_id == name and heard_by not in bells:
            bells.append(heard_by)
        woken = [bell.hear(token) for bell in bells]  # each of them
        if bells and not any(woken):
            bells[0].pass_on(token)

    def _note(self) -> None:
        """Read the signs of change, and plan a look for each."""
        with self.lock:
            self._note_all(self._inotify.read(timeout=0))

    def _note_all(self, events: Iterable[Any]) -> None:
        for event in events:
            if event.wd == -1:  # the queue overflowed: signs of any file may be lost
                self._numbers.clear()
                for file in list(self._files.values()):
                    file.number, file.look_at = None, 0.0
                    self._tidy(file)
            changed = self._numbers.pop(event.wd, None)
            if changed is not None:
                changed.number = None
                self._tidy(changed)
                if changed.bells:
                    self._plan(changed)

    def _look(self) -> None:
        """Look into the files whose time has come."""
        now = time.monotonic()
        with self.lock:
            due = self._due(now)
        for file, bells in due:
            began = time.monotonic()
            changed = stirred = False
            seen: set[tuple[Bell, str]] = set()
            for bell, timed in bells:
                try:
                    found = bell.stirring(bell.tokens(), timed or bool(file.seen))
                except SpaceError:  # who waits there shall meet it
                    bell.wake_all()
                    continue
                if found is None:
                    continue
                changed = changed or not timed
                tokens, ahead = found
                for token in tokens:
                    if timed or (bell, token) in file.seen:
                        bell.wake(token)
                        stirred = True
                    else:
                        seen.add((bell, token))
                if ahead is not None:
                    self.expect(bell, ahead)
            file.seen = seen
            with self.lock:
                self._plan_next(file, began, changed=changed, stirred=stirred)

    def _due(self, now: float) -> list[tuple[_File, list[tuple[Bell, bool]]]]:
        """The files to look into, for whom, and whether that one's time has come.

        What is expected is let go: the look finds out anew.
        """
        due = []
        for file in self._files.values():
            timed = {bell for bell, at in file.timers.items() if at <= now}
            if timed or (file.look_at is not None and file.look_at <= now):
                due.append((file, [(bell, bell in timed) for bell in file.bells]))
                for bell in timed:
                    del file.timers[bell]
        return due

    def _plan_next(self, file: _File, began: float, *, changed: bool, stirred: bool) -> None:
        """After a look: when the next one is due, if at all."""
        now = time.monotonic()
        if changed:
            file.look_until = now + _LOOK_ON_SECONDS
        elif file.bells and file.number is None:
            # Only now: while changes go on, looks do too, and a sign of each would wake in vain.
            # What changes before this is asked for, the next look sees.
            self._arm(file, next(iter(file.bells)))
            file.look_until = max(file.look_until, now + _LOOK_LATE_SECONDS)
        signed = file.number is not None
        longest = _LOOK_IDLE_SECONDS if signed and not changed else _LOOK_LATE_SECONDS
        file.pause = _LOOK_SOON_SECONDS if stirred else min(file.pause * 2, longest)
        # A thousand keys take 7 ms to look for, and nobody is heard meanwhile.
        file.pause = max(file.pause, (now - began) * _REST_AFTER_LOOK)
        on = bool(file.bells) and (not signed or now < file.look_until)
        pause = min(file.pause, _LOOK_SOON_SECONDS + now - began) if file.seen else file.pause
        file.look_at = now + pause if on or (file.seen and file.bells) else None

    def close(self) -> None:
        """Let go the ears; idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._nudge_in)
            os.close(self._nudge_out)
            if self._socket is not None:
                self._socket.close()
            if self._inotify is not None:
                self._inotify.close()

    def __del__(self) -> None:  # at the process's end: without it, a ResourceWarning
        self.close()


def _address(pid: int) -> str:
    return f"\0sqlspace-{pid}"


def _open_socket() -> socket.socket | None:
    """A datagram socket under this process's abstract name; None where there are none."""
    if sys.platform != "linux":
        return None
    ears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        ears.bind(_address(os.getpid()))
    except OSError:  # taken, perhaps in another pid namespace: inotify will do
        ears.close()
        return None
    return ears


_watch: Watch | None = None
_watch_lock = threading.Lock()


def the_watch() -> Watch:
    """That of this process."""
    global _watch  # noqa: PLW0603  # one for the process, made when first needed
    with _watch_lock:
        if _watch is None:
            _watch = Watch()
        return _watch


def forget() -> None:
    """After a fork, in the child: let go the parent's ears, without a word to it."""
    global _watch, _watch_lock  # noqa: PLW0603
    _watch_lock = threading.Lock()
    if _watch is not None:
        _watch.close()
        _watch = None
