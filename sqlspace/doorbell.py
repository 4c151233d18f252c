"""The doorbell: a commit wakes those who wait for it, in any process, and nobody else.

In the same process a waiter is woken directly. For the others: a waiter marks on the -wal (see
`marks`) that its process waits for a key; who commits something for that key asks for the mark,
0.3 µs, and only if there is one sends the waiting process a datagram that names the file and the
key. So a push for which nobody waits rings nowhere, a push that has 16 processes waiting wakes one
of them, and processes that wait for other keys sleep on.

In each process one of the waiting threads watches for all, and passes the role on when it leaves: a
thread of its own for it was measured at 0.32 ms from push to pull, against 0.065.

What the clock decides (an entry comes due, a lease runs out) nobody rings for, least of all a
process that died. Who parks says when that will be; what changes afterwards, the watch sees as it
sees any change. At that time it looks, and wakes those for whom there is something.

A ring is a hint; nothing depends on its arrival. Writers that don't ring (the sqlite3 shell), and
rings that get lost, are seen by inotify: the -wal was modified, so looks at `data_version` follow,
soon at first, then backing off while the changes are of no concern. Without inotify the same looks
come round without a sign.
"""

import contextlib
import fcntl
import os
import random
import select
import socket
import sys
import termios
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from .errors import SpaceError
from .inotify import open_inotify
from .marks import WAITING_AT, Marks
from .waiting import LOOK_AGAIN_SECONDS, Waiter

__all__ = [
    "Doorbell",
    "Stirring",
    "forget",
    "limit_of",
    "limit_token",
    "room_token",
    "turn_token",
    "waited_key",
]

_PIDS = 1 << 22  # Linux's greatest pid, and one
# Each token's hash has a byte for each process that waits to take, then one for each that waits
# to read.
_TAKING, _READING, _SPAN = 0, _PIDS, 2 * _PIDS
_CALM_SECONDS = 0.001  # who is woken before has no need to know what the clock will change
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
_CACHED_TOKENS = 4096
_ROOM, _TURN, _LIMIT = "\0", "\0\0", "\0\0\0"  # no key holds a NUL

Stirring = Callable[[Iterable[str], bool], tuple[Iterable[str], float | None] | None]
"""Called as `stirring(tokens, timed)`; see `Doorbell`."""


def room_token(key: str) -> str:
    """What waits for entries to leave `key`; waits for entries to come have the key itself."""
    return _ROOM + key


def turn_token(key: str) -> str:
    """For a head of `key` before which nothing is held: looked for, and never rung for."""
    return _TURN + key


def limit_token(key: str, limit: int) -> str:
    """For `key` to hold fewer entries than that: looked for, and never rung for."""
    return f"{_LIMIT}{limit}{_ROOM}{key}"


def limit_of(token: str) -> int | None:
    """That of a `limit_token`; None if it is none."""
    return int(token.split(_ROOM)[3]) if token.startswith(_LIMIT) else None


def waited_key(token: str) -> str:
    """The key that a token is about."""
    return token.rpartition(_ROOM)[2]


class _Post:
    """One token between processes: where they mark that they wait for it, and how it is rung."""

    __slots__ = ("_besides", "_found", "base", "message", "question")

    def __init__(self, signature: bytes, token: str) -> None:
        name = token.encode()
        self.base = WAITING_AT + zlib.crc32(name) * _SPAN
        self.question = Marks.ask(self.base, _SPAN)
        self.message = signature + name
        self._besides = 0, 0, b"", b""

    def besides(self, found: int) -> tuple[int, bytes, bytes]:
        """The process that has set this mark, and how to ask for those before and behind it."""
        known = self._besides
        if known[0] != found:
            pid = (found - self.base) % _READING
            before = Marks.ask(self.base, found - self.base)
            behind = Marks.ask(found + 1, self.base + _SPAN - found - 1)
            known = self._besides = found, pid, before, behind
        return known[1:]


class Doorbell:
    """The bell of one store.

    Args:
        file_id: Names the file to other processes; None: there is no real -wal.
        wal: The path of the -wal.
        marks: On it.
        stirring: Of the tokens waited for, those worth waking somebody for, and the seconds until
            the clock changes that; looks at the file, and is called by a waiting thread of this
            process. None if nothing has changed, unless told to look all the same.
    """

    def __init__(
        self,
        file_id: tuple[int, int] | None,
        wal: str,
        marks: Marks,
        stirring: Stirring,
    ) -> None:
        self.file_id = file_id
        self.wal = wal
        self.stirring = stirring
        self.name = file_id or wal
        self._signature = f"{file_id[0]} {file_id[1]} ".encode() if file_id else b""
        self._marks = marks
        # Each waiter with its limit, if it waits for room.
        self._takers: dict[str, OrderedDict[Waiter, int]] = {}
        # Each waiter with whether it waits for its turn.
        self._readers: dict[str, OrderedDict[Waiter, bool]] = {}
        # Those of `_takers` by the ring that comes for them, where any of them may answer it.
        self._rung: dict[bytes, OrderedDict[Waiter, int]] = {}
        self._peers: set[Doorbell] = set()  # of the same file, this one included
        self._unheard = False  # whether rings may have come that are another process's
        self._posts: dict[str, _Post] = {}
        self._watch = _the_watch()
        self._lock = self._watch.lock

    # -- waiting

    def enroll(
        self,
        waiter: Waiter,
        tokens: Iterable[str],
        *,
        takes: bool,
        in_turn: bool = False,
        limit: int = 1,
    ) -> None:
        """Have `waiter` woken for these tokens. It must look once more before it parks.

        Args:
            waiter: Of a call that is about to park.
            tokens: Keys, or `room_token`s.
            takes: Whether it will take what it is woken for: then one of its kind is enough.
            in_turn: Whether what is ready is of use to it only when nothing before it is held.
            limit: It waits until there are fewer entries than that, if it waits for room.
        """
        with self._lock:
            # Inside, or who dismisses the last waiter undoes it.
            self._peers = self._watch.attend(self)
            for token in tokens:
                kind: Any = self._takers if takes else self._readers
                if token not in kind:
                    self._marks.hold(self._mark(token, takes=takes))
                    kind[token] = OrderedDict()
                    if takes and token[0] != _ROOM:
                        self._rung[self._post(token).message] = kind[token]
                kind[token][waiter] = limit if takes else in_turn

    def dismiss(self, waiter: Waiter, tokens: Iterable[str]) -> None:
        """Undo `enroll`; idempotent."""
        with self._lock:
            self._forget(waiter, tokens)
            if not self._takers and not self._readers:
                self._watch.ignore(self)
            self._watch.resign(waiter)
        if self._unheard:
            self._watch.answer_all(self)
            self._unheard = False

    def _forget(self, waiter: Waiter, tokens: Iterable[str]) -> None:
        for token in tokens:
            for kind in (self._takers, self._readers):
                waiters = kind.get(token)
                if waiters is not None:
                    waiters.pop(waiter, None)
                    if not waiters:
                        post = self._post(token)
                        if kind is self._takers:
                            self._rung.pop(post.message, None)
                        self._marks.drop(self._mark(token, takes=kind is self._takers))
                        # Whoever rang while it stood may have meant another process's waiter. If
                        # there is none, we needn't look: just after a sleep that took 10 to 57 µs.
                        if self._marks.find(post.question) is not None:
                            self._unheard = True
                        kind.pop(token, None)  # a signal's handler may have come in between

    def expect(self, seconds: float) -> None:
        """The clock changes something then, for one of those who wait here."""
        self._watch.expect(self, seconds)

    def park(self, waiter: Waiter, seconds: float, horizon: Callable[[], None]) -> None:
        """Sleep until woken; the first to sleep in this process watches for all of it.

        Args:
            waiter: That is enrolled.
            seconds: At most.
            horizon: Calls `expect` if it must; not called if the sleep is very short.
        """
        self._watch.park(self, waiter, seconds, horizon)

    def takes(self, message: bytes, waiter: Waiter) -> bool:
        """Whether a ring is for this waiter, and for nobody besides in this process."""
        return waiter in self._rung.get(message, ()) and not self._readers and len(self._peers) == 1

    # -- waking

    def ring_all(self, tokens: Iterable[str], besides: Waiter | None = None) -> None:
        """Ring for each of these tokens."""
        for token in tokens:
            self.ring(token, besides)

    def ring(self, token: str, besides: Waiter | None = None) -> None:
        """Wake who waits for this token: of those that take, one; all others. After a commit.

        Args:
            token: For which there is something.
            besides: A waiter that knows.
        """
        waited = token in self._takers or token in self._readers
        if not (waited and self.wake(token, besides)):
            post = self._posts.get(token) or self._post(token)
            found = self._marks.find(post.question)
            if found is not None:
                self._ring_elsewhere(post, found)

    def wake(self, token: str, besides: Waiter | None = None) -> bool:
        """Wake who waits in this store; whether one was that takes."""
        with self._lock:
            key = waited_key(token)
            if token.startswith(_LIMIT):
                return self._wake(room_token(key), besides)
            return self._wake(key if token.startswith(_TURN) else token, besides)

    def _wake(self, token: str, besides: Waiter | None) -> bool:
        for waiter in self._readers.get(token, ()):
            waiter.wake()
        takers = self._takers.get(token) or OrderedDict[Waiter, int]()
        others = (taker for taker in takers if taker is not besides)
        if token[0] == _ROOM:  # if there is no room for the greatest limit, there is for none
            taker = max(others, key=takers.__getitem__, default=None)
        else:
            taker = next(others, None)
        if taker is None:
            return False
        # One that is slow to wake gets no second ring for now.
        self._takers[token].move_to_end(taker)
        taker.wake()
        return True

    def awaited(self, token: str, besides: Waiter) -> bool:
        """Whether another may wait for this token, to take, here or elsewhere."""
        takers = self._takers.get(token, ())
        return (
            len(takers) > (besides in takers)
            or self._marks.find(self._post(token).question) is not None
        )

    def tokens(self) -> list[str]:
        """What to look for: who waits for its turn or for room has tokens of its own."""
        with self._lock:
            return [*self._tokens_to_take(), *self._tokens_to_read()]

    def _tokens_to_take(self) -> list[str]:
        return [
            limit_token(waited_key(token), max(takers.values())) if token[0] == _ROOM else token
            for token, takers in self._takers.items()
        ]

    def _tokens_to_read(self) -> list[str]:
        found = []
        for token, readers in self._readers.items():
            if token not in self._takers and not all(readers.values()):
                found.append(token)
            # Who leaves makes room, and a turn: that is looked for once.
            if token[0] != _ROOM and any(readers.values()):
                found.append(turn_token(token))
        return found

    def wake_all(self) -> None:
        """Wake everybody: the store was closed, or something is wrong with it."""
        with self._lock:
            for kind in (self._takers, self._readers):
                for waiters in kind.values():
                    for waiter in waiters:
                        waiter.wake()

    def close(self) -> None:
        """Wake everybody, watch no more, and set no more marks."""
        self.wake_all()
        self._watch.ignore(self)
        with self._lock:
            self._marks.close()

    def _ring_elsewhere(self, post: _Post, found: int) -> None:
        pid, below, above = post.besides(found)
        if self._marks.find(below) is None and self._marks.find(above) is None:
            # Just one process waits. If it leaves meanwhile, and another comes, that sees by itself
            # what was committed before.
            self._watch.send(pid, post.message)
            return
        first = post.base + _READING
        end = post.base + _SPAN
        while (reader := self._marks.smallest(first, end)) is not None:
            self._watch.send(reader - post.base - _READING, post.message)
            first = reader + 1
        self._ring_taker(post)

    def pass_on(self, token: str) -> None:
        """A ring came for which nobody waits here any more: it may be another's."""
        with self._lock:
            waited = token in self._takers or token in self._readers
        if not waited:
            self._ring_taker(self._post(token))

    def _ring_taker(self, post: _Post) -> None:
        # Start anywhere among those who take, so that no process gets every ring, or, if it doesn't
        # answer, swallows every ring; on behind those who died, or whom no datagram reaches.
        base = post.base
        start = base + random.randrange(_PIDS)  # noqa: S311  # no secret
        for first, end in ((start, base + _PIDS), (base, start)):
            while (found := self._marks.smallest(first, end)) is not None:
                # One that has left in the meantime may not hear it any more.
                heard = self._watch.send(found - base, post.message)
                if heard and self._marks.find(Marks.ask(found, 1)) is not None:
                    return
                first = found + 1  # noqa: PLW2901

    def _mark(self, token: str, *, takes: bool) -> int:
        """Where this process marks that it waits for a token."""
        return self._post(token).base + (_TAKING if takes else _READING) + os.getpid()

    def _post(self, token: str) -> _Post:
        known = self._posts.get(token)
        if known is None:
            if len(self._posts) >= _CACHED_TOKENS:
                self._posts.clear()
            known = self._posts[token] = _Post(self._signature, token)
        return known


class _File:
    """What the watch knows of one file."""

    def __init__(self, name: tuple[int, int] | str) -> None:
        self.name = name
        self.bells: set[Doorbell] = set()
        self.look_at: float | None = None  # on the monotonic clock; None: at the next sign
        self.look_until = 0.0  # after that, only at a sign
        self.pause = _LOOK_SOON_SECONDS
        # What the last look found. Mostly somebody was rung for it, and has it by the next look.
        self.seen: set[tuple[Doorbell, str]] = set()
        # When the clock changes something for a bell, as last seen.
        self.timers: dict[Doorbell, float] = {}
        self.number: int | None = None  # of its inotify watch, while that is armed


class _Watch:
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
        ears = select.poll()
        ears.register(self._nudge_out, select.POLLIN)
        for ear in (self._socket, self._inotify):
            if ear is not None:
                ears.register(ear.fileno(), select.POLLIN)
        return ears

    # -- who is there

    def attend(self, bell: Doorbell) -> set[Doorbell]:
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

    def ignore(self, bell: Doorbell) -> None:
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

    def _arm(self, file: _File, bell: Doorbell) -> None:
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

    def expect(self, bell: Doorbell, seconds: float) -> None:
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

    def park(
        self, bell: Doorbell, waiter: Waiter, seconds: float, horizon: Callable[[], None]
    ) -> None:
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
                self._listen(bell, waiter, ends, horizon)
            else:
                horizon()
                waiter.park(max(0.0, ends - time.monotonic()))
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

    def _listen(
        self, bell: Doorbell, waiter: Waiter, ends: float, horizon: Callable[[], None] | None
    ) -> None:
        """Watch for all, until this waiter is woken, its time is over, or it has lost the role."""
        ears = self._ears
        waiter.listen(self.nudge)
        while self._watcher is waiter:
            if waiter.park(0) or (seconds := self._until_look(ends)) is None:
                return
            if horizon is not None:
                seconds = min(seconds, _CALM_SECONDS)
            for ear, _ in ears.poll(seconds * 1000):
                if ear != self._socket_number:
                    self._hear(ear)
                elif self._answer(bell, waiter):
                    return  # the rest can wait for the next to listen
            if waiter.park(0):
                return
            if horizon is not None:
                horizon()
                horizon = None
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

    def answer_all(self, bell: Doorbell) -> None:
        """Read what rings there are, for a bell at which somebody has stopped waiting."""
        while self._socket is not None and any(
            fcntl.ioctl(self._socket, termios.FIONREAD, b"\0" * 4)
        ):
            self._answer(bell)

    def _answer(self, bell: Doorbell, waiter: Waiter | None = None) -> bool:
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

    def _wake_for(self, message: bytes, heard_by: Doorbell) -> None:
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
        woken = [bell.wake(token) for bell in bells]  # each of them
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
            seen: set[tuple[Doorbell, str]] = set()
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

    def _due(self, now: float) -> list[tuple[_File, list[tuple[Doorbell, bool]]]]:
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


_watch: _Watch | None = None
_watch_lock = threading.Lock()


def _the_watch() -> _Watch:
    global _watch  # noqa: PLW0603  # one for the process, made when first needed
    with _watch_lock:
        if _watch is None:
            _watch = _Watch()
        return _watch


def forget() -> None:
    """After a fork, in the child: let go the parent's ears, without a word to it."""
    global _watch, _watch_lock  # noqa: PLW0603
    _watch_lock = threading.Lock()
    if _watch is not None:
        _watch.close()
        _watch = None
