"""Local for coroutines: memory needs no thread, so all is done in the loop, at once or in time."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from sqlspace import local
from sqlspace.arguments import check_key, check_keys
from sqlspace.waiting import Vigil

from .waiting import wait

__all__ = ["Local"]


class Local:
    """A `sqlspace.Local` for the coroutines of one process, in any number of loops and threads.

    Args:
        space: One that threads use too; a new one unless it is given.
    """

    def __init__(self, space: local.Local | None = None) -> None:
        self._space = local.Local() if space is None else space

    async def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """As `sqlspace.Local.out`."""
        self._space.out(key, value, ttl=ttl)

    async def put(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """As `sqlspace.Local.put`."""
        self._space.put(key, value, ttl=ttl)

    async def out_if_empty(self, key: str, value: Any) -> bool:
        """As `sqlspace.Local.out_if_empty`."""
        return self._space.out_if_empty(key, value)

    async def in_(self, key: str) -> Any:
        """Take the head of `key`, waiting for one; takers are served in the order they came.

        Raises:
            ClosedError: nothing was taken.
        """
        return (await self._wait(self._space._taking([check_key(key)])))[0]

    async def in_any(self, keys: Iterable[str]) -> tuple[str, Any]:
        """As `sqlspace.Local.in_any`; raises as `in_`."""
        taken = await self._wait(self._space._taking(check_keys(keys)))
        return taken[1], taken[0]

    async def rd(self, key: str) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `in_`."""
        return await self._wait(self._space._reading(check_key(key)))

    async def nrd(self, key: str) -> None:
        """Wait until `key` holds no entry; raises as `in_`."""
        await self._wait(self._space._draining(check_key(key)))

    async def inp(self, key: str, default: Any = None) -> Any:
        """As `sqlspace.Local.inp`."""
        return self._space.inp(key, default)

    async def rdp(self, key: str, default: Any = None) -> Any:
        """As `sqlspace.Local.rdp`."""
        return self._space.rdp(key, default)

    async def len(self, key: str) -> int:
        """As `sqlspace.Local.len`."""
        return self._space.len(key)

    async def keys(self) -> list[str]:
        """As `sqlspace.Local.keys`."""
        return self._space.keys()

    async def close(self) -> None:
        """As `sqlspace.Local.close`."""
        self._space.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._space.close()

    async def _wait(self, vigil: Vigil) -> Any:
        return await wait(vigil, _at_once)


async def _at_once(step: Callable[[], Any], _: Callable[[], object]) -> Any:
    return step()
