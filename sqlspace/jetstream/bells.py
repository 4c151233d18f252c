"""Waiting without polling: a stream rings a key's bell for each entry that it has stored.

A look that was in vain is enrolled, and then made once more; only then its call sleeps until it is
rung. So no ring is missed between the two. Takers of all clients share their key's rings, each of
which comes to one of them: one entry wakes one taker. Readers hear them all. A ring that comes for
nobody here, for its taker was just canceled, is passed on.

Rings get lost where connections do. So every waiter looks again after a while, and after each
reconnect: that is a delay, and never a hang.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from sqlspace.waiting import LOOK_AGAIN_SECONDS, MISSING

from .connection import Connection, Listener

__all__ = ["Bells"]

QUEUE = "takers"


@dataclasses.dataclass(eq=False)
class _Bell:
    """The waiters of one client for one key, of one kind."""

    ring: Callable[[], None] = lambda: None
    listener: Listener | None = None
    looking: int = 0
    asleep: deque["asyncio.Future[None]"] = dataclasses.field(default_factory=deque)
    owed: int = 0
    """Rings that came while all were looking: maybe too early to see what they are for."""


class Bells:
    """The bells that the calls of one client wait for.

    Args:
        link: To the server.
        subject: Where it rings for a key.
    """

    def __init__(self, link: Connection, subject: Callable[[str], str]) -> None:
        self._link = link
        self._subject = subject
        self._bells: dict[tuple[str, bool], _Bell] = {}

    async def wait(self, key: str, look: Callable[[], Awaitable[Any]], *, takes: bool) -> Any:
        """Look until something is found, and return it.

        Args:
            key: What may be rung for.
            look: Returns what it found, or MISSING.
            takes: Whether what it finds is gone for others: then one ring wakes one waiter.
        """
        bell = await self._enter(key, takes)
        rung = False
        try:
            while True:
                found = await look()
                if found is not MISSING:
                    return found
                if bell.owed:
                    bell.owed -= 1
                    rung = True
                    continue
                rung = False
                rung = await self._sleep(bell)
        except BaseException:
            if rung:  # and has not looked
                bell.owed += 1
            raise
        finally:
            self._leave(key, takes, bell)

    async def _enter(self, key: str, takes: bool) -> _Bell:
        bell = self._bells.get((key, takes))
        if bell is not None:
            bell.looking += 1
            return bell
        bell = self._bells[key, takes] = _Bell(looking=1)

        def ring() -> None:
            self._ring(key, takes, bell)

        try:
            bell.listener = await self._link.listen(
                self._subject(key), QUEUE if takes else "", ring
            )
        except BaseException:
            self._leave(key, takes, bell)
            raise
        return bell

    def _leave(self, key: str, takes: bool, bell: _Bell) -> None:
        bell.looking -= 1
        while bell.owed and _wake_one(bell):
            bell.owed -= 1
        if bell.looking or bell.asleep:
            return
        if self._bells.get((key, takes)) is bell:
            del self._bells[key, takes]
        if bell.listener is not None and not self._link.closed:
            self._link.spawn(bell.listener.end())
        if takes and bell.owed:
            self._link.spawn(self._link.ring(self._subject(key)))

    async def _sleep(self, bell: _Bell) -> bool:
        """Until rung, or it is time to look again; whether rung."""
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(LOOK_AGAIN_SECONDS, _wake, sleeper)
        bell.asleep.append(sleeper)
        bell.looking -= 1
        try:
            await sleeper
        except BaseException:
            if sleeper.done() and not sleeper.cancelled():
                bell.owed += 1
            raise
        finally:
            bell.looking += 1
            timer.cancel()
            if sleeper in bell.asleep:
                bell.asleep.remove(sleeper)
        return True

    def _ring(self, key: str, takes: bool, bell: _Bell) -> None:
        if not takes:
            while _wake_one(bell):
                pass
            bell.owed = bell.looking
        elif not _wake_one(bell):
            if bell.looking:
                bell.owed += 1
            else:
                self._link.spawn(self._link.ring(self._subject(key)))

    def wake_all(self) -> None:
        """Have every waiter look."""
        for bell in self._bells.values():
            for sleeper in bell.asleep:
                _wake(sleeper)


def _wake_one(bell: _Bell) -> bool:
    """Wake one that sleeps, and is not awake or canceled already; whether there was one."""
    while bell.asleep:
        sleeper = bell.asleep.popleft()
        if not sleeper.done():
            sleeper.set_result(None)
            return True
    return False


def _wake(sleeper: "asyncio.Future[None]") -> None:
    if not sleeper.done():
        sleeper.set_result(None)
