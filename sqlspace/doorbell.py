"""The doorbell: a commit wakes those who wait for it, in any process, and nobody else.

In the same process a waiter is woken directly. For the others: a waiter marks on the -wal (see
`marks`) that its process waits for a key; who commits something for that key asks for the mark,
0.3 µs, and only if there is one sends the waiting process a datagram that names the file and the
key. So a push for which nobody waits rings nowhere, a push that has 16 processes waiting wakes one
of them, and processes that wait for other keys sleep on.

A ring is a hint; nothing depends on its arrival. What nobody rings for, the process's watch sees
(see `watch`): a lost ring, writers that don't ring, and what the clock decides.
"""

import os
import random
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from .marks import WAITING_AT, Marks
from .waiting import Waiter
from .watch import Bell, Stirring, forget, the_watch

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
_CACHED_TOKENS = 4096
_ROOM, _TURN, _LIMIT = "\0", "\0\0", "\0\0\0"  # no key holds a NUL


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
        self._peers: set[Bell] = set()  # of the same file, this one included
        self._unheard = False  # whether rings may have come that are another process's
        self._posts: dict[str, _Post] = {}
        self._watch = the_watch()
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

    def park(self, waiter: Waiter, seconds: float) -> None:
        """Sleep until woken; the first to sleep in this process watches for all of it."""
        self._watch.park(self, waiter, seconds)

    def takes(self, message: bytes, waiter: Waiter) -> bool:
        """Whether a ring is for this waiter, and for nobody besides in this process."""
        return waiter in self._rung.get(message, ()) and not self._readers and len(self._peers) == 1

    # -- waking

    def ring_all(self, tokens: Iterable[str], besides: Waiter | None = None) -> None:
        """Ring for each of these tokens."""
        if self._marks.alone and not self._takers and not self._readers:
            return
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

    def hear(self, token: str) -> bool:
        """The same, when it was rung for by another process."""
        self._marks.alone = False
        return self.wake(token)

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
