"""Request and response: a caller and a server meet in a space, any `Space`.

The law: a request is served at most once, and nothing of it outlives its deadline.

`call` puts a request under the server's key and waits under a key of its own, which nobody else
knows. `serve` takes the request, and only then has it handled: a server that dies with it leaves
its caller to the deadline, and no other server does the work again. The deadline travels with the
request. The request has as its ttl what is left until then, and so has the reply; a request that
comes late is dropped, and a reply that would come late is not sent. So whoever gave up or died, at
either end, leaves nothing behind. Where `out` knows no ttl, what nobody takes stays.

What stands in the space is plain data, which every codec and every language has:

    request  {"reply": a key, "deadline": Unix seconds or None, "request": what was asked}
    reply    {"reply": what was answered}, or {"error": "TypeName: message"}

The deadline is on the wall clock, for it is read in other processes, and all waiting is on the
monotonic clock. So if the wall clock jumps, requests may be dropped or served in vain, but their
callers end in time.

Nothing here knows a backend; whatever differs between them is asked of `out`'s signature.
"""

import inspect
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from .arguments import check_key, check_timeout, kind, shown
from .errors import CanceledError, ClosedError, DeadlineError, DecodeError, SpaceError
from .space import Context, Space, check_context
from .waiting import nearer_end

__all__ = ["call", "serve"]

log = logging.getLogger("sqlspace")

# A caller without a deadline is asleep under its key and takes its reply as soon as that is there.
# An hour is for the one that is stopped or suspended just then; of one that died nothing may stay.
REPLY_TTL_SECONDS: Final = 3600.0
# Files count whole microseconds, and servers may count more coarsely: less than this may be 0.
LEAST_TTL_SECONDS: Final = 0.001
ERROR_CHARACTERS: Final = 10_000  # a message for a person, never a channel for data
_ENVELOPE: Final = ("reply", "deadline", "request")


def call(
    space: Space,
    key: str,
    request: Any,
    timeout: float | None,
    *,
    context: Context | None = None,
) -> Any:
    """Have a server of `key` handle `request`, and return its reply.

    At most once: the request is sent once and served once, or not at all. If this raises anything
    but the server's error, whether it was served is not known.

    Args:
        space: Where caller and server meet.
        key: What the server serves.
        request: Any value that the space can hold; in a `Local` the server gets the very object.
        timeout: Seconds until the reply must be there; None or infinity waits for ever. With 0
            there is no time to reply, and nothing is sent.
        context: Another bound; the earlier of both is the request's deadline.

    Returns:
        What the handler returned.

    Raises:
        SpaceError: itself and none of its kinds: the handler raised, or its reply couldn't be
            sent; the message is the type of what was raised, and its message.
        ClosedError, CanceledError, DeadlineError: as any wait; if the context was canceled or the
            time was over before, nothing was sent.

    Example:
        >>> import threading
        >>> from sqlspace import Local, call, serve
        >>> with Local() as space:
        ...     server = threading.Thread(target=serve, args=(space, "upper", str.upper))
        ...     server.start()
        ...     call(space, "upper", "hello", 5)
        'HELLO'
        >>> server.join()
    """
    _check_space(space)
    key = check_key(key)
    seconds = check_timeout(timeout)
    check_context(context)
    ends = nearer_end(seconds, context)
    left = _left(ends)
    # Of its own: a reply that comes late must never be taken for that of a later call.
    reply_key = f"reply/{secrets.token_hex(16)}"
    if left != 0 and not (context is not None and context.canceled):
        deadline = None if left is None else time.time() + left
        _send(space, key, {"reply": reply_key, "deadline": deadline, "request": request}, left)
    # If nothing was sent, this raises, and in the order in which every wait asks.
    return _opened(space.in_(reply_key, _left(ends), context=context))


def serve(
    space: Space, key: str, handler: Callable[[Any], object], *, context: Context | None = None
) -> None:
    """Answer the requests of `key`, one after the other, until the space or the context ends it.

    Any number of threads and processes may serve one key: each request goes to one of them. What
    the handler raises goes to its caller, and so does the refusal of a reply that the space can't
    hold; only what is no `Exception` (Ctrl-C, SystemExit) ends the server. Entries that are no
    requests are dropped, and the logger `sqlspace` tells of them.

    Args:
        space: Where caller and server meet.
        key: What is served.
        handler: Called as `handler(request)`; what it returns is the reply.
        context: Ends the serving when it is canceled or its time is over. A request that is being
            handled then is still answered.

    Raises:
        StoreError, BackendError: the space failed. Its closing, and the context's end, are no
            failure: then this returns None.
    """
    _check_space(space)
    key = check_key(key)
    if not callable(handler):
        raise TypeError(f"handler must be callable, not {kind(handler)}")
    check_context(context)
    try:
        while True:
            _serve_next(space, key, handler, context)
    except (ClosedError, CanceledError, DeadlineError):  # of the space; the handler's are replies
        return


def _serve_next(
    space: Space, key: str, handler: Callable[[Any], object], context: Context | None
) -> None:
    """Take one request and answer it.

    A function of its own: so a server that waits holds on to nothing of the request before.
    """
    try:
        envelope = space.in_(key, context=context)
    except DecodeError as error:  # it is among the dead letters now
        log.warning("%s: a request that can't be read: %s", shown(key), error)
        return
    try:
        reply_key, deadline, request = _parsed(envelope)
    except (TypeError, ValueError) as error:
        log.warning("%s: dropped what is no request: %s", shown(key), error)
        return
    if _ttl(deadline) <= 0:
        return
    answer = _handled(handler, request)
    ttl = _ttl(deadline)
    if ttl > 0:
        _reply(space, reply_key, answer, ttl)


def _handled(handler: Callable[[Any], object], request: Any) -> dict[str, object]:
    """The reply that the handler makes."""
    try:
        return {"reply": handler(request)}
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the caller's to know
        return {"error": _text(error)}


def _reply(space: Space, reply_key: str, answer: dict[str, object], ttl: float) -> None:
    """Send the reply or, if the space can't hold it, why."""
    try:
        _send(space, reply_key, answer, ttl)
    except SpaceError:
        raise
    except Exception as error:  # noqa: BLE001  # a codec of the user's own refuses as it likes
        _send(space, reply_key, {"error": _text(error, "the reply can't be sent: ")}, ttl)


# -- the envelope


def _parsed(envelope: object) -> tuple[str, float | None, Any]:
    """The reply's key, the deadline and what is asked.

    Raises:
        TypeError, ValueError: it is no request.
    """
    if not isinstance(envelope, dict):
        raise TypeError(f"a request must be dict, not {kind(envelope)}")
    for name in _ENVELOPE:
        if name not in envelope:
            raise ValueError(f"a request must have {name!r}")
    reply_key, deadline, request = (envelope[name] for name in _ENVELOPE)
    return check_key(reply_key, "reply"), check_timeout(deadline, "deadline"), request


def _opened(answer: object) -> Any:
    """What a reply holds; the server's error is raised."""
    match answer:
        case {"reply": value}:
            return value
        case {"error": str(text)}:
            raise SpaceError(text)
        case _:
            raise SpaceError(
                f"a reply must be a dict with 'reply' or 'error', not this {kind(answer)}"
            )


def _text(error: Exception, before: str = "") -> str:
    """An exception in words that every codec can carry: bounded, and without lone surrogates."""
    try:
        message = str.__str__(str(error))  # a subclass of str would be asked for its format below
    except Exception:  # noqa: BLE001  # its __str__ may be anybody's
        message = "its message can't be shown"
    text = f"{kind(error)}: {before}{message}" if before or message else kind(error)
    sound = text[:ERROR_CHARACTERS].encode(errors="backslashreplace").decode()
    return sound[:ERROR_CHARACTERS]


# -- time


def _left(ends: float | None) -> float | None:
    """Seconds until a moment of the monotonic clock, at least 0."""
    return None if ends is None else max(0.0, ends - time.monotonic())


def _ttl(deadline: float | None) -> float:
    """How long a reply may live; 0 or less if it would be late."""
    return REPLY_TTL_SECONDS if deadline is None else deadline - time.time()


# -- the space


def _send(space: Space, key: str, value: dict[str, object], ttl: float | None) -> None:
    """Add an entry that is gone after `ttl` seconds, where the space can do that."""
    out: Callable[..., None] = space.out
    if ttl is None or not _takes_ttl(out):
        out(key, value)
    else:
        out(key, value, ttl=max(ttl, LEAST_TTL_SECONDS))


def _takes_ttl(out: Callable[..., None]) -> bool:
    try:
        return "ttl" in inspect.signature(out).parameters
    except (TypeError, ValueError):  # not every callable tells its signature
        return False


def _check_space(space: object) -> None:
    if isinstance(space, type) or not isinstance(space, Space):
        raise TypeError(
            f"space must be a sqlspace.Space (of a Store, store.space()), not {kind(space)}"
        )
    if inspect.iscoroutinefunction(space.in_):
        raise TypeError(f"space must not be an async one, as {kind(space)} is")
