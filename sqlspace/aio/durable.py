"""The `AsyncSpace` protocol over a Store."""

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sqlspace import durable
from sqlspace.arguments import check_key
from sqlspace.durable import UnreadableError

from .engine import Engine

if TYPE_CHECKING:
    from .store import Store

__all__ = ["DurableSpace"]


class DurableSpace:
    """A `sqlspace.DurableSpace` for coroutines; made by `Store.space`.

    Values are encoded in the loop, and decoded in a thread. To close it closes the store.
    """

    def __init__(self, store: "Store", engine: Engine, sync: durable.DurableSpace) -> None:
        self._store = store
        self._engine = engine
        self._sync = sync

    async def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """As `sqlspace.DurableSpace.out`."""
        await self._engine.write(self._sync._adding(key, value, ttl))

    async def in_(self, key: str) -> Any:
        """As `sqlspace.DurableSpace.in_`, without a bound of its own."""
        values: list[Any] = []
        make = self._sync._grabs(check_key(key), values)
        try:
            await self._engine.take(make, [key])
        except UnreadableError as error:
            raise await self._bury(error) from error.__cause__
        return values[-1]

    async def inp(self, key: str, default: Any = None) -> Any:
        """As `sqlspace.DurableSpace.inp`."""
        values: list[Any] = []
        make = self._sync._grabs(check_key(key), values)
        try:
            return values[-1] if await self._engine.take_now(make) else default
        except UnreadableError as error:
            raise await self._bury(error) from error.__cause__

    async def rd(self, key: str) -> Any:
        """As `sqlspace.DurableSpace.rd`, without a bound of its own."""
        return await self._engine.wait(self._sync._vigil_to_read(check_key(key)))

    async def rdp(self, key: str, default: Any = None) -> Any:
        """As `sqlspace.DurableSpace.rdp`."""
        return await self._engine.call(self._sync.rdp, key, default)

    async def len(self, key: str) -> int:
        """As `sqlspace.DurableSpace.len`."""
        return await self._store.len(key)

    async def close(self) -> None:
        """Close the store; idempotent."""
        await self._store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<sqlspace.aio.DurableSpace over {self._store!r}>"

    async def _bury(self, error: UnreadableError) -> Exception:
        return await self._engine.call(self._sync._bury, error.head)
