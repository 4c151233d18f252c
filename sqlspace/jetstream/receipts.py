"""Who has taken which entry: receipts, in a stream of their own.

An entry is taken by *claiming* it: a receipt is written at its place among the receipts, on the
condition that what stands last there is what the taker thinks. Of all who try, the server lets one
through, and whose receipt stands has taken the entry, whatever dies afterwards. Then the entry is
deleted, and a minute later its receipt. What stands last at an entry's place:

    nothing          nobody has taken it
    claimed TOKEN    taken by the call with that token; the entry is deleted soon
    released TOKEN   given back by it: free to be claimed again
    doomed TOKEN     its taker seems dead; somebody deletes the entry in its stead

Each step is written over exactly the one before, so a taker that gives its entry back and one that
thinks it dead exclude each other, however late either comes. A claim that was given up without an
answer is released too, even if nothing stands there yet: then it can't land any more.

A receipt may go as soon as nobody can claim the gone entry in the belief that it is there. So it
stays for `RECEIPT_SECONDS` after its entry is gone, and whose claim comes through later than
`TRUST_SECONDS` after the entry was seen, looks whether the entry stands.

Receipts have a stream of their own: written into that of the entries, nothing could be taken from
one that is full. They are no per-message TTL's business: a server that was down meanwhile would
drop them and keep the entries whose deletion it missed, and those were taken twice.
"""

import asyncio
import datetime as dt
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from sqlspace.errors import BackendError, ClosedError, SpaceError

from .link import WRONG_LAST_SEQUENCE, Link, Message, RefusedError
from .subjects import Subjects

__all__ = ["Claim", "Receipts"]

log = logging.getLogger("sqlspace")

CLAIMED, RELEASED, DOOMED = "claimed", "released", "doomed"

TRUST_SECONDS = 5.0
RECEIPT_SECONDS = 60.0
HELP_SECONDS = 60.0  # so long after its claim an entry that still stands is taken off its taker
SWEEP_SECONDS = 60.0
# Whoever comes back after so long with a claim in doubt still learns that it was doomed.
DOOMED_SECONDS = 86_400.0


class Claim(NamedTuple):
    """One call's attempt to take one entry."""

    key: str
    message: Message
    token: str
    over: bool = False
    """Whether it was claimed before, and released."""
    receipt: int = 0
    """Where its receipt stands, once it has come through."""


class _Receipt(NamedTuple):
    state: str
    token: str
    seq: int


class Receipts:
    """The receipts of one space, and what one client does with them.

    Args:
        link: To the server.
        subjects: Of the space.
        again: Called with a claim whose entry is free again, or is somebody else's; puts the value
            of a doomed one back if it is called with True.
    """

    def __init__(
        self, link: Link, subjects: Subjects, again: Callable[[Claim, bool], Awaitable[None]]
    ) -> None:
        self._link = link
        self._subjects = subjects
        self._again = again
        self._mine: set[str] = set()  # tokens of claims under way
        self._settling: dict[int, asyncio.Task[None]] = {}  # entries that are being given back
        self._done: deque[tuple[float, int, int]] = deque()  # since when, entry, its only receipt
        self._gone: set[int] = set()  # entries that were gone at the last sweep

    async def claim(self, key: str, message: Message, seen: float) -> Claim | None:
        """Take an entry, unless somebody has; between the return and this nothing is awaited.

        Whatever this raises, the entry is not taken: what has come through is undone.

        Args:
            key: Its key.
            message: The entry.
            seen: When it was asked for, by the loop's clock.
        """
        if (settling := self._settling.get(message.seq)) is not None:
            await asyncio.wait((settling,), timeout=self._link.patience)
        claim = Claim(key, message, self._link.new_id())
        self._mine.add(claim.token)
        try:
            held = await self._hold(claim, seen)
        except BaseException:
            self.give_back(claim)
            raise
        self._mine.discard(claim.token)
        return held

    async def _hold(self, claim: Claim, seen: float) -> Claim | None:
        seq = claim.message.seq
        last: _Receipt | None = None
        while True:
            try:
                receipt = await self._write(claim, CLAIMED, last)
                break
            except RefusedError as error:
                if error.number != WRONG_LAST_SEQUENCE:
                    raise BackendError(f"take of {claim.key!a}: {error}; not taken") from error
            last = await self._last(claim)
            if last is None:  # dropped meanwhile: the entry is gone since long
                return None
            if last.token == claim.token and last.state != RELEASED:
                receipt = last.seq  # the answer was lost
                break
            if last.state != RELEASED:
                return None
        held = claim._replace(over=last is not None, receipt=receipt)
        if asyncio.get_running_loop().time() - seen > TRUST_SECONDS:
            entry = await self._link.message(self._subjects.entries, seq, doing=_doing(claim))
            if entry is None:
                last = await self._last(claim)
                if last is None or last.state != DOOMED or last.token != claim.token:
                    self.drop(held)
                    return None
        return held

    async def undo(self, claim: Claim) -> None:
        """Give an entry back that was claimed, or may have been; it stands at its place again."""
        while True:
            last = await self._last(claim)
            if last is not None:
                mine = last.token == claim.token
                if mine and last.state == DOOMED:
                    await self._again(claim, True)  # noqa: FBT003
                    return
                if mine and last.state == RELEASED:
                    break
                if not mine and last.state != RELEASED:
                    return  # another's, and ours can't come through any more
            try:
                await self._write(claim, RELEASED, last)
                break
            except RefusedError as error:
                if error.number != WRONG_LAST_SEQUENCE:
                    raise BackendError(f"undo a take of {claim.key!a}: {error}") from error
        await self._again(claim, False)  # noqa: FBT003

    def drop(self, claim: Claim) -> None:
        """The entry is gone: its receipt may go in a while."""
        receipt = 0 if claim.over else claim.receipt
        self._done.append((time.monotonic(), claim.message.seq, receipt))

    def give_back(self, claim: Claim, *, finished: bool = False) -> None:
        """Undo in the background, however long the server is away.

        Args:
            claim: What was taken, or may have been.
            finished: Whether the entry's deletion is under way: then the value is added anew.
        """
        seq = claim.message.seq
        self._mine.add(claim.token)
        settling = self._settling[seq] = self._link.spawn(self._settle(claim, finished))

        def settled(_: object) -> None:
            self._mine.discard(claim.token)
            if self._settling.get(seq) is settling:
                del self._settling[seq]

        settling.add_done_callback(settled)

    async def _settle(self, claim: Claim, finished: bool) -> None:
        while True:
            try:
                await (self._again(claim, True) if finished else self.undo(claim))  # noqa: FBT003
            except BackendError as error:
                log.warning("undoing a take of %a, trying again: %s", claim.key, error)
            else:
                return

    async def _last(self, claim: Claim) -> _Receipt | None:
        subject = self._subjects.receipt(claim.message.seq)
        found = await self._link.last_message(self._subjects.receipts, subject, doing=_doing(claim))
        return None if found is None else _read(found)

    async def _write(self, claim: Claim, state: str, last: _Receipt | None) -> int:
        subject = self._subjects.receipt(claim.message.seq)
        over = 0 if last is None else last.seq
        payload = f"{state} {claim.token}".encode()
        return await self._link.write_if(subject, payload, over, _doing(claim))

    # -- tidying up

    async def tidy(self) -> None:
        """Drop receipts whose time is over, our own and those of takers that died; for ever."""
        loop = asyncio.get_running_loop()
        due = loop.time() + SWEEP_SECONDS * _spread() / 8  # not all clients at once
        while True:
            await asyncio.sleep(1.0)
            self.drop_old()
            if loop.time() < due:
                continue
            due = loop.time() + SWEEP_SECONDS * (0.75 + _spread() / 2)
            try:
                await self.sweep()
            except ClosedError:
                return
            except SpaceError as error:
                log.warning("tidying the receipts of %s: %s", self._subjects.entries, error)

    def drop_old(self) -> None:
        """Drop our own receipts of entries that are gone long enough."""
        now = time.monotonic()
        while self._done and self._done[0][0] < now - RECEIPT_SECONDS:
            _, entry, receipt = self._done.popleft()
            if receipt:
                self._link.delete_soon(self._subjects.receipts, receipt)
            else:
                self._link.purge_soon(self._subjects.receipts, self._subjects.receipt(entry))

    async def sweep(self) -> None:
        """Do what takers that died have left undone, the oldest first."""
        subjects, link = self._subjects, self._link
        info = await link.info(subjects.receipts, None)
        now = _seconds(info["ts"])
        gone, self._gone = self._gone, set()
        seq = 0
        while found := await link.next_message(
            subjects.receipts, subjects.all_receipts, seq, direct=False, doing="sweep"
        ):
            age = now - _seconds(found.time)
            if age < HELP_SECONDS:
                break
            seq = found.seq + 1
            receipt = _read(found)
            if receipt.token in self._mine or (receipt.state == DOOMED and age < DOOMED_SECONDS):
                continue
            entry = subjects.seq_of(found.subject)
            if await link.message(subjects.entries, entry, doing="sweep") is not None:
                await self._help(entry, found.subject, receipt)
            elif entry not in gone:
                self._gone.add(entry)  # somebody may have seen it a moment ago
            elif receipt.state == DOOMED:
                await link.purge(subjects.receipts, found.subject, doing="sweep")
            else:
                await link.delete(subjects.receipts, receipt.seq, doing="sweep")

    async def _help(self, entry: int, subject: str, receipt: _Receipt) -> None:
        """Delete an entry in the stead of a taker that has died, unless it gives it back."""
        if receipt.state == CLAIMED:
            doomed = f"{DOOMED} {receipt.token}".encode()
            try:
                await self._link.write_if(subject, doomed, receipt.seq, "sweep")
            except RefusedError as error:
                if error.number != WRONG_LAST_SEQUENCE:
                    raise BackendError(f"sweep: {error}") from error
                return
        if receipt.state != RELEASED:
            await self._link.delete(self._subjects.entries, entry, doing="sweep")
            log.warning("entry %d was taken by a client that died; deleted in its stead", entry)


def _spread() -> float:
    return random.random()  # noqa: S311  # no secret


def _doing(claim: Claim) -> str:
    return f"take of {claim.key!a}"


def _read(message: Message) -> _Receipt:
    state, _, token = message.payload.decode().partition(" ")
    return _Receipt(state, token, message.seq)


def _seconds(text: str) -> float:
    """Of a time as the server writes it: RFC 3339, with nanoseconds."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    moment = dt.datetime.fromisoformat(f"{whole}+00:00")
    return moment.timestamp() + float(f"0.{fraction or 0}")
