"""A claimed entry for coroutines."""

from types import TracebackType
from typing import Self

from sqlspace import delivery
from sqlspace.arguments import check_delay_micros, check_lease_micros
from sqlspace.delivery import Ack, Nack

from .engine import Engine

__all__ = ["Delivery"]


class Delivery:
    """A `sqlspace.Delivery`, to be used by `async with`, or to be settled by `await`.

    While the block runs its lease is renewed. The end of the block acks it; an exception,
    CancelledError included, gives it back. After an explicit `ack` or `nack` the end does nothing.
    """

    __slots__ = ("_engine", "_sync")

    def __init__(self, engine: Engine, sync: delivery.Delivery) -> None:
        self._engine = engine
        self._sync = sync

    @property
    def key(self) -> str:
        """Under which the entry stands."""
        return self._sync.key

    @property
    def seq(self) -> int:
        """Its number there."""
        return self._sync.seq

    @property
    def payload(self) -> bytes:
        """As it was pushed."""
        return self._sync.payload

    @property
    def headers(self) -> dict[str, str]:
        """As they were pushed."""
        return self._sync.headers

    @property
    def attempts(self) -> int:
        """How often it was claimed, this time included."""
        return self._sync.attempts

    @property
    def deadline(self) -> float:
        """When the lease ends unless it is extended, in Unix seconds."""
        return self._sync.deadline

    @property
    def lost(self) -> bool:
        """As `sqlspace.Delivery.lost`."""
        return self._sync.lost

    async def ack(self) -> None:
        """As `sqlspace.Delivery.ack`."""
        await self._engine.write(Ack([self._sync]))

    async def nack(self, delay: float = 0.0) -> None:
        """As `sqlspace.Delivery.nack`."""
        await self._engine.write(Nack(self._sync, check_delay_micros(delay, None)))

    async def extend(self, lease: float) -> None:
        """As `sqlspace.Delivery.extend`."""
        check_lease_micros(lease)
        await self._engine.call(self._sync.extend, lease)

    async def __aenter__(self) -> Self:
        self._sync.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is GeneratorExit:  # thrown away unfinished: nothing can be awaited
            return  # nobody renews it any more, so it comes back when its lease is over
        try:
            if self._sync._settled:  # one piece with it
                return
            if error is None:
                await self.ack()
            else:  # to its end, though it may be cancelled again: nobody would give it back later
                await self._engine.call(self._sync._nack_quietly)
        finally:
            self._sync._renewals.discard(self._sync)

    def __repr__(self) -> str:
        return f"<sqlspace.aio {self._sync!r}>"
