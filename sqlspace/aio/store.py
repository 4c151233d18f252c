"""Store for coroutines: the verbs, each with what it hands to the engine."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

from sqlspace import delivery, pushing, store, taking
from sqlspace.arguments import check_callable, check_key, check_keys
from sqlspace.durable import dumps_json, loads_json
from sqlspace.errors import ClosedError, SpaceError
from sqlspace.pushing import Batch, Push
from sqlspace.records import Compaction, Entry, Stats, Tombstone
from sqlspace.store import checked_keys, checked_lease, checked_limit
from sqlspace.taking import Claim, Grab
from sqlspace.transaction import Transaction
from sqlspace.waiting import Waiter

from .delivery import Delivery
from .durable import DurableSpace
from .engine import Engine
from .waiting import to_the_end

__all__ = ["Store", "open"]

T = TypeVar("T")

_BROWSED_AT_ONCE: Final = 256


class Store:
    """A `sqlspace.Store` for coroutines; made by `sqlspace.aio.open`, or of a Store that is open.

    Its verbs are those of `sqlspace.Store`, awaited; instead of `timeout` and `context` there are
    `asyncio.timeout` and cancellation. A verb that was cancelled did nothing, and is cancelled as
    soon as that is certain: an entry was returned, or it is in the store. That is so for all that
    push, take, claim and settle, but for a nack, and for a push whose entry another has taken by
    then: they may stay done. Any other verb is finished first, and its outcome lost.

    Args:
        sync: A Store, which threads may go on using; closing either closes both.

    Attributes:
        path: Of the file, absolute and resolved.
        sync: As given to `sqlspace.open`.
    """

    def __init__(self, sync: store.Store) -> None:
        self._store = sync
        self.path = sync.path
        self.sync = sync.sync
        self._database = sync._database  # one piece with it, here and below
        self._engine = Engine(self._database)

    # -- pushing

    async def push(
        self,
        key: str,
        payload: bytes,
        *,
        ttl: float | None = None,
        delay: float | None = None,
        dedupe: str | None = None,
        headers: dict[str, str] | None = None,
        max_len: int | None = None,
    ) -> int:
        """As `sqlspace.Store.push`; with `max_len` it waits for room without a bound of its own."""
        wanted = Push(
            key, payload, headers=headers, ttl=ttl, delay=delay, dedupe=dedupe, max_len=max_len
        )
        if max_len is None:
            operation = pushing.adding(self._database, wanted)
            await self._engine.write(operation)
        else:
            operation = await self._engine.wait(pushing.vigil_for_room(self._database, wanted))
        return operation.seq

    async def push_many(
        self,
        key: str,
        payloads: Iterable[bytes],
        *,
        ttl: float | None = None,
        delay: float | None = None,
    ) -> list[int]:
        """As `sqlspace.Store.push_many`."""
        work, seqs = pushing.push_many(Batch.checked(key, payloads, ttl, delay))
        await self._engine.write(work)
        return seqs

    async def put(self, key: str, payload: bytes, *, ttl: float | None = None) -> int:
        """As `sqlspace.Store.put`."""
        return await self._engine.call(self._store.put, key, payload, ttl=ttl)

    # -- taking

    async def pull(self, key: str) -> bytes:
        """Take the head of `key` and return its payload, waiting for one.

        Raises:
            ClosedError: nothing was taken.
            StoreError: nothing was taken, unless it is an UndecidedError.
        """
        keys = [check_key(key)]
        return (await self._engine.take(self._grabs(keys), keys)).head.payload

    async def pull_any(self, keys: Iterable[str]) -> tuple[str, bytes]:
        """As `sqlspace.Store.pull_any`; raises as `pull`."""
        keys = check_keys(keys)
        head = (await self._engine.take(self._grabs(keys), keys)).head
        return head.key, head.payload

    async def pullp(self, key: str) -> bytes | None:
        """As `sqlspace.Store.pullp`."""
        grab = await self._engine.take_now(self._grabs([check_key(key)]))
        return None if grab is None else grab.head.payload

    async def pull_many(self, key: str, limit: int) -> list[bytes]:
        """As `sqlspace.Store.pull_many`."""
        work, payloads = taking.pull_many(self._database, check_key(key), checked_limit(limit))
        await self._engine.write(work)
        return payloads

    async def remove(self, key: str, seq: int) -> bool:
        """As `sqlspace.Store.remove`."""
        return await self._engine.call(self._store.remove, key, seq)

    async def clear(self, key: str) -> int:
        """As `sqlspace.Store.clear`."""
        return await self._engine.call(self._store.clear, key)

    # -- claiming

    async def claim(
        self,
        key_or_keys: str | Iterable[str],
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
        ordered: bool = False,
    ) -> Delivery:
        """As `sqlspace.Store.claim`; raises as `pull`."""
        keys = checked_keys(key_or_keys)
        make = self._claims(keys, lease, max_attempts, ordered)
        claim = await self._engine.take(make, keys, in_turn=ordered)
        return Delivery(self._engine, claim.delivery)

    async def claimp(
        self,
        key_or_keys: str | Iterable[str],
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
        ordered: bool = False,
    ) -> Delivery | None:
        """As `sqlspace.Store.claimp`."""
        make = self._claims(checked_keys(key_or_keys), lease, max_attempts, ordered)
        claim = await self._engine.take_now(make)
        return None if claim is None else Delivery(self._engine, claim.delivery)

    async def claim_many(
        self,
        key_or_keys: str | Iterable[str],
        limit: int,
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
    ) -> list[Delivery]:
        """As `sqlspace.Store.claim_many`."""
        keys = checked_keys(key_or_keys)
        wanted = checked_lease(keys, lease, max_attempts, ordered=False)
        deliver = self._store._deliver
        work, deliveries = taking.claim_many(keys, checked_limit(limit), wanted, deliver)
        await self._engine.write(work)
        return [Delivery(self._engine, each) for each in deliveries]

    def consume(
        self,
        key_or_keys: str | Iterable[str],
        *,
        lease: float = 30.0,
        max_attempts: int | None = None,
        ordered: bool = False,
    ) -> AsyncIterator[Delivery]:
        """Claim one entry after the other, until the store is closed; as `sqlspace.Store.consume`.

        async for delivery in store.consume("jobs"):
            async with delivery:
                ...
        """
        keys = checked_keys(key_or_keys)
        checked_lease(keys, lease, max_attempts, ordered)

        async def deliveries() -> AsyncIterator[Delivery]:
            while True:
                try:
                    claimed = await self.claim(
                        keys, lease=lease, max_attempts=max_attempts, ordered=ordered
                    )
                except ClosedError:
                    return
                yield claimed

        return deliveries()

    async def ack_many(self, deliveries: Iterable[Delivery]) -> None:
        """As `sqlspace.Store.ack_many`."""
        plain = [getattr(each, "_sync", each) for each in deliveries]
        await self._engine.write(delivery.ack_all(self._store, self._database, plain))

    async def requeue(self, key: str) -> int:
        """As `sqlspace.Store.requeue`."""
        return await self._engine.call(self._store.requeue, key)

    # -- together

    async def transact(self, function: Callable[[Transaction], T]) -> T:
        """What `function(transaction)` returns, run in a thread: all of it is committed, or none.

            await store.transact(lambda together: together.push("a", together.pullp("b")))

        Cancelled while the function runs, all is rolled back, when that has returned; cancelled
        during the commit, it may have been done.
        """
        check_callable(function, "function")
        loop = asyncio.get_running_loop()
        cancelled = False

        def run() -> T:
            with self._store.transaction() as together:
                outcome = function(together)
                if cancelled or loop.is_closed():
                    raise _RollBackError
                return outcome

        begun = asyncio.ensure_future(self._engine.call(run))
        try:
            return await asyncio.shield(begun)
        except BaseException as error:
            cancelled = True
            if not isinstance(error, GeneratorExit):  # then nothing can be awaited
                with contextlib.suppress(Exception):
                    await to_the_end(begun)
            raise

    def space(
        self,
        *,
        dumps: Callable[[Any], bytes] = dumps_json,
        loads: Callable[[bytes], Any] = loads_json,
    ) -> DurableSpace:
        """The `AsyncSpace` protocol over this store; as `sqlspace.Store.space`."""
        return DurableSpace(self, self._engine, self._store.space(dumps=dumps, loads=loads))

    # -- waiting without taking

    async def wait(self, key: str) -> None:
        """As `sqlspace.Store.wait`; raises as `pull`."""
        await self._engine.wait(taking.vigil_until_ready(self._database, check_key(key)))

    async def wait_empty(self, key: str) -> None:
        """As `sqlspace.Store.wait_empty`; raises as `pull`."""
        await self._engine.wait(taking.vigil_until_empty(self._database, check_key(key)))

    # -- looking

    async def peek(self, key: str) -> bytes | None:
        """As `sqlspace.Store.peek`."""
        return await self._engine.call(self._store.peek, key)

    async def len(self, key: str) -> int:
        """As `sqlspace.Store.len`."""
        return await self._engine.call(self._store.len, key)

    async def keys(self) -> list[str]:
        """As `sqlspace.Store.keys`."""
        return await self._engine.call(self._store.keys)

    async def get(self, key: str, seq: int) -> Entry | None:
        """As `sqlspace.Store.get`."""
        return await self._engine.call(self._store.get, key, seq)

    def entries(self, key: str) -> AsyncIterator[Entry]:
        """As `sqlspace.Store.entries`, for `async for`."""
        return self._browse(self._store.entries(key))

    def history(self, key: str) -> AsyncIterator[Tombstone]:
        """As `sqlspace.Store.history`, for `async for`."""
        return self._browse(self._store.history(key))

    async def stats(self) -> Stats:
        """As `sqlspace.Store.stats`."""
        return await self._engine.call(self._store.stats)

    # -- upkeep

    async def compact(self) -> Compaction:
        """As `sqlspace.Store.compact`."""
        return await self._engine.call(self._store.compact)

    async def backup(self, path: str | os.PathLike[str]) -> None:
        """As `sqlspace.Store.backup`."""
        await self._engine.call(self._store.backup, path)

    # -- closing

    async def close(self) -> None:
        """Close the store and end every wait with `ClosedError`; idempotent."""
        try:
            await self._engine.call(self._store.close)
        finally:
            self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        engine = self.__dict__.get("_engine")
        if engine is not None:
            engine.forsake()

    def __repr__(self) -> str:
        return f"<sqlspace.aio {self._store!r}>"

    # -- what several verbs share

    def _grabs(self, keys: list[str]) -> Callable[[Waiter | None], Grab]:
        return partial(Grab, self._database, keys)

    def _claims(
        self, keys: list[str], lease: float, max_attempts: int | None, ordered: bool
    ) -> Callable[[Waiter | None], Claim[delivery.Delivery]]:
        wanted = checked_lease(keys, lease, max_attempts, ordered)
        return partial(Claim, self._database, keys, wanted, self._store._deliver)

    async def _browse(self, found: Iterator[T]) -> AsyncIterator[T]:
        def next_ones() -> list[T]:
            return list(itertools.islice(found, _BROWSED_AT_ONCE))

        while ones := await self._engine.call(next_ones):
            for one in ones:
                yield one


class _RollBackError(SpaceError):
    """The task that awaits the transaction was cancelled."""


class _Opening:
    """A store to be: to be awaited, or entered by `async with`."""

    def __init__(self, begin: Callable[[], store.Store]) -> None:
        self._begin = begin
        self._store: Store

    async def _open(self) -> Store:
        run = asyncio.get_running_loop().run_in_executor
        opened: list[store.Store] = []
        try:
            await to_the_end(run(None, lambda: opened.append(self._begin())))
        except BaseException:
            for each in opened:
                await to_the_end(run(None, each.close))
            raise
        return Store(opened[0])

    def __await__(self) -> Generator[Any, None, Store]:
        return self._open().__await__()

    async def __aenter__(self) -> Store:
        self._store = await self._open()
        return self._store

    async def __aexit__(self, *_: object) -> None:
        await self._store.close()


def open(
    path: str | os.PathLike[str],
    *,
    sync: bool | Literal["group"] = True,
    history: int | None = 10_000,
    embed: bool = False,
    mode: int = 0o600,
    busy_timeout: float = 30.0,
    allow_network: bool = False,
    vfs: str | None = None,
) -> _Opening:
    """Open the store in the file at `path`: `await` this, or enter it by `async with`.

    As `sqlspace.open`, whose arguments, errors and guarantees it has.
    """
    return _Opening(
        partial(
            store.open,
            path,
            sync=sync,
            history=history,
            embed=embed,
            mode=mode,
            busy_timeout=busy_timeout,
            allow_network=allow_network,
            vfs=vfs,
        )
    )
