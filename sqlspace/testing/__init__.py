"""The conformance suite: puts any backend of the `Space` protocol through its law.

    from sqlspace.testing import check_space
    check_space(MySpace)  # raises AssertionError with the law that was broken

Each law is a function; its docstring is the law. No law can hang: each runs in a thread of its own,
and whatever blocks is waited for with a limit. `check_async_space` puts an `AsyncSpace` through the
same laws, and those of its own.

It raises by itself and has no `assert`, so `python -O` leaves it whole; and it needs no pytest.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable

from sqlspace.space import AsyncSpace, Space

from .calls import PATIENCE_SECONDS, Bench, Call
from .coroutines import ASYNC_LAWS, InALoop
from .laws import LAWS, Law

__all__ = ["ASYNC_LAWS", "LAWS", "check_async_space", "check_space"]


def check_space(
    make_space: Callable[[], Space], *, patience_seconds: float = PATIENCE_SECONDS
) -> None:
    """Put a backend through the law of the `Space` protocol, one law after the other.

    Args:
        make_space: Gives a new, empty space each time; the check closes it. `Local` is one.
        patience_seconds: How long a call may take that must not wait; twice that, a law.

    Raises:
        AssertionError: says which law the backend breaks, and how. What the backend raised, if it
            did, is its cause.

    Example:
        >>> from sqlspace import Local
        >>> check_space(Local)
    """
    _check(LAWS, make_space, patience_seconds)


def check_async_space(
    make_space: Callable[[], AsyncSpace | Awaitable[AsyncSpace]],
    *,
    patience_seconds: float = PATIENCE_SECONDS,
) -> None:
    """The same for an `AsyncSpace`, each law in a new event loop, which runs in another thread.

    Args:
        make_space: Called in that loop; gives a new, empty space each time, or an awaitable of one.
        patience_seconds: As in `check_space`.

    Raises:
        AssertionError: as `check_space`.

    Example:
        >>> from sqlspace.aio import Local
        >>> check_async_space(Local)
    """

    def make() -> InALoop:
        return InALoop(make_space)

    _check(ASYNC_LAWS, make, patience_seconds)


def _check(laws: Iterable[Law], make_space: Callable[[], Space], patience: float) -> None:
    for law in laws:
        sentence = " ".join((law.__doc__ or "").split())
        space = make_space()
        try:
            Call(2 * patience, law, Bench(space, patience)).result()
        except Exception as error:
            how = str(error) if type(error) is AssertionError else f"it raised {error!r}"
            raise AssertionError(f"{sentence} ({law.__name__}): {how}") from error
        finally:
            end = space.end if isinstance(space, InALoop) else space.close
            with contextlib.suppress(Exception):  # there is a law of its own for this
                Call(patience, end).result()
