"""Store and forward: what a store holds under some keys goes to an endpoint, in order per key.

The law: an entry is leased, sent and acked, in this order, and `ordered`: nothing behind it on its
key is sent before it is acked, or dead. All that is to be known after a crash stands in the file: a
failed try is a nack, so its pause stands in the row, and whatever goes on with that key afterwards,
this forwarder or another, a thread or a process, waits it out. So any number may work on the same
keys, and none of them needs to know of the others.

How often an entry arrives is the endpoint's matter. Between a send and its ack a crash repeats the
send, unless the endpoint knows by itself what it has: a `Sender` of its own, as `jetstream` has it.

Nothing here knows an endpoint but those that need nothing installed: a function, and a program.
"""

import errno
import importlib.util
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from . import browsing, delivery, programs, taking
from .arguments import check_flag, check_int, kind, shown
from .delivery import Delivery
from .errors import CanceledError, ClosedError, DeadlineError, LeaseError, StoreError
from .space import Context, check_context
from .store import Store, checked_keys, checked_lease
from .waiting import Waiter, wait

if TYPE_CHECKING:
    import subprocess

    from tenacity.wait import wait_base

__all__ = ["Destination", "Forwarder", "Pause", "Route", "Sender", "forward"]

log = logging.getLogger("sqlspace")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 10.0
_WORKERS = 8
_GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL, as `pull --lease` has it
_PARK_SECONDS = 5.0
# Of payloads in a batch, which stand in memory here and at the endpoint.
_BATCH_BYTES = 4 << 20
_FIRST_BATCH = 64  # while it isn't known how large they are
_TURNS = 16  # batches of one key in a row, while others wait for a thread
_RENEW_AT = 3  # at this part of a lease


class Sender(Protocol):
    """What sends; any number of threads may be in it, each with entries of another key."""

    most: int
    """So many entries it takes at once."""

    def send(self, batch: Sequence[Delivery]) -> Future[int]:
        """Send entries of one key, in order; how many of them, from the first on, arrived.

        That is one at least: if the first can't be sent, it is whatever exception it likes.
        """

    def acked(self, batch: Sequence[Delivery]) -> None:
        """These have left the store."""

    def stop(self, *, force: bool) -> None:
        """End soon what is under way, or by force at once; it is given back unless it arrived."""

    def close(self) -> None:
        """Let go whatever it has."""


class Destination(Protocol):
    """What can be handed to `forward` besides a function and a command."""

    def _sender(self, store: Store) -> Sender:
        """That of one forwarder."""


@dataclass(slots=True)
class Route:
    """How it goes with one key."""

    sent: int = 0
    failure: str = ""
    """Why the last try failed; empty if it didn't."""
    retry_at: float = 0.0
    """When the next one is, in Unix seconds; only with a failure."""
    limit: int = field(default=_FIRST_BATCH, repr=False)


def forward(
    store: Store,
    keys: str | Iterable[str],
    send: Callable[[Delivery], object] | Sequence[str] | Destination,
    *,
    lease: float = 5.0,
    max_attempts: int | None = None,
    wait: "wait_base | None" = None,
    workers: int | None = None,
    drain: bool = False,
    context: Context | None = None,
) -> int:
    """Send what a store holds under `keys` to an endpoint, until the store or the context ends it.

    In order per key, whatever happens. While the endpoint is down the store holds: the entry that
    failed is tried again, after a pause that grows, and nothing behind it on its key goes out
    before it. Other keys go on. An entry whose time to live is over is not sent.

    To a function or a command, at least once: a crash between the send and the ack repeats the
    entry, with the same `Delivery.id`. To a JetStream, once: see `sqlspace.jetstream.Endpoint`.

    Any number of forwarders, in any number of processes, may work on the same keys.

    Args:
        store: Of the entries.
        keys: One key, or several; they take turns.
        send: Where they go. A function, called as `send(delivery)`: if it returns, the entry has
            arrived; if it raises an `Exception`, the endpoint is down. A command, as a list of its
            arguments: run for each entry with the payload as stdin, and SQLSPACE_KEY, _SEQ, _ID,
            _ATTEMPTS and _HEADERS (a JSON object) in its environment; exit code 0 is arrival. Or a
            `sqlspace.jetstream.Endpoint`, or a `JetStream`, which takes them in batches.
        lease: Seconds; renewed while an entry is under way. When a forwarder was killed, the next
            one goes on with what was under way after so long.
        max_attempts: An entry goes to the dead letters, KEY/dead, when so many tries have failed,
            or were cut off by a crash, and the next one is sent; None: it is tried for ever.
        wait: The pause after a failed try, as one of the library tenacity; None: doubled each time,
            from 0.1 to 10 s, with some jitter.
        workers: So many threads send; None: one for each key, up to 8. A key is served by one of
            them at a time. With 1 the function is never called by two threads at once, but a key
            whose endpoint hangs holds up the others.
        drain: Whether to return when the keys hold no live entries any more.
        context: Ends the forwarding when it is canceled or its time is over. A function that is
            under way is awaited; a command is ended, and its entry given back.

    Returns:
        How many entries were sent.

    Raises:
        StoreError: the store failed. Its closing and the context's end are no failure.
        ImportError: tenacity is missing.
    """
    forwarder = Forwarder(
        store,
        keys,
        send,
        lease=lease,
        max_attempts=max_attempts,
        wait=wait,
        workers=workers,
        drain=drain,
        context=context,
    )
    try:
        forwarder.start()
        forwarder.wait()
    finally:
        forwarder.end()
    return forwarder.sent


class Forwarder:
    """The same in parts, for who wants to watch it; the arguments are those of `forward`.

    Attributes:
        routes: By key, as it is at the moment.
        on_end: Called when one of the threads has ended, by that.
    """

    def __init__(
        self,
        store: Store,
        keys: str | Iterable[str],
        send: Callable[[Delivery], object] | Sequence[str] | Destination,
        *,
        lease: float = 5.0,
        max_attempts: int | None = None,
        wait: "wait_base | None" = None,
        workers: int | None = None,
        drain: bool = False,
        context: Context | None = None,
    ) -> None:
        if not isinstance(store, Store):
            raise TypeError(f"store must be a sqlspace.Store, not {kind(store)}")
        self._store = store
        self._database = store._database  # noqa: SLF001  # it is a worker of the store's own
        self.routes = {key: Route() for key in checked_keys(keys, "keys")}
        self._wanted = checked_lease(list(self.routes), lease, max_attempts, ordered=True)
        self._drains = check_flag(drain, "drain")
        check_context(context)
        self._number = min(_WORKERS, len(self.routes))
        if workers is not None:
            self._number = check_int(workers, "workers", 1)
        self._pause = Pause(wait)
        self._sender = _sender(store, send)
        self._outer = context
        self._context = Context()
        self._context.deadline = None if context is None else context.deadline
        self._waiter = Waiter()
        self.on_end: Callable[[], object] = lambda: None
        self._lock = threading.Lock()
        self._left = 0  # threads that haven't ended
        self._error: BaseException | None = None

    @property
    def sent(self) -> int:
        """How many entries were sent."""
        return sum(route.sent for route in self.routes.values())

    def start(self) -> None:
        """Begin."""
        self._context._register(self._waiter)  # noqa: SLF001  # Context and its waits are one piece
        if self._outer is not None:
            self._outer._register(self)  # noqa: SLF001
            if self._outer.canceled:
                self.wake()
        for _ in range(self._number):
            thread = threading.Thread(target=self._work, name="sqlspace-forward", daemon=True)
            with self._lock:
                self._left += 1
            try:
                thread.start()
            except RuntimeError as error:  # the process may have no more threads
                with self._lock:
                    self._left -= 1
                raise StoreError(f"no thread to forward with: {error}") from error

    def is_at_work(self) -> bool:
        """Whether it goes on."""
        over = self._context.deadline is not None and time.monotonic() >= self._context.deadline
        return not (over or self._context.canceled) and self._left > 0

    def wait(self) -> None:
        """Wait until nothing is left to be done, or it is to end."""
        while self.is_at_work():
            left = _PARK_SECONDS
            if self._context.deadline is not None:
                left = min(left, max(0.0, self._context.deadline - time.monotonic()))
            self._waiter.park(left)

    def wake(self) -> None:
        """Have it end: the context does, when it is canceled. From anywhere, and at once."""
        self._context.cancel()
        self._sender.stop(force=False)

    def end(self, *, force: bool = False) -> None:
        """Have it end, and wait for that; raises what a worker ended by."""
        self.wake()
        if not force:
            self._join(_GRACE_SECONDS)
        self._sender.stop(force=True)
        self._join(None)
        self._sender.close()
        if self._outer is not None:
            self._outer._unregister(self)  # noqa: SLF001
        if self._error is not None:
            raise self._error

    def _join(self, seconds: float | None) -> None:
        """Not by `Thread.join`, which takes a thread for ended when Ctrl-C strikes in it."""
        ends = None if seconds is None else time.monotonic() + seconds
        while self._left:
            left = _PARK_SECONDS if ends is None else min(_PARK_SECONDS, ends - time.monotonic())
            if left <= 0:
                return
            self._waiter.park(left)

    # -- one of the threads

    def _work(self) -> None:
        keys = list(self.routes)
        try:
            while batch := self._claim(keys):
                keys.remove(batch[0].key)  # they take turns
                keys.append(batch[0].key)
                self._attend(batch)
        except (ClosedError, CanceledError, DeadlineError):
            pass
        except BaseException as error:  # noqa: BLE001  # `end` raises it
            self._error = self._error or error
            self._context.cancel()
        finally:
            with self._lock:
                self._left -= 1
            self._waiter.wake()
            self.on_end()

    def _claim(self, keys: list[str]) -> list[Delivery]:
        """The first entries of the first key that has its turn; none: there is nothing left."""

        def look(waiter: Waiter, _: bool) -> None:
            for key in keys:
                if found := self._claim_now(key):
                    waiter.found = found
                    return
            if self._drains and not any(browsing.has_live(self._database, key) for key in keys):
                waiter.found = []

        vigil = taking.vigil(self._database, look, keys, in_turn=True)
        found: list[Delivery] = wait(vigil, None, self._context)
        return found

    def _attend(self, batch: list[Delivery]) -> None:
        """Send it, and what stands behind it, for a while: the store works while that is sent."""
        sending = self._sender.send(batch)
        for turn in range(_TURNS, 0, -1):
            route = self._measured(batch)
            ahead: list[Delivery] = []
            try:
                if turn > 1 and len(batch) > 1:
                    ahead = self._claim_behind(batch)
                sent = self._awaited(sending, [*batch, *ahead])
            except Exception as error:  # noqa: BLE001  # whatever it is, the endpoint is down
                self._failed([*batch, *ahead], route, error)
                return
            except BaseException:
                delivery.give_back(self._database, [*batch, *ahead])
                raise
            if ahead and sent == len(batch):
                sending = self._sender.send(ahead)
            self._arrived(batch[:sent], route)
            if sent < len(batch):
                delivery.give_back(self._database, [*batch[sent:], *ahead])
                return
            if not ahead:
                return
            batch = ahead

    def _measured(self, batch: list[Delivery]) -> Route:
        """Its key's route, after a look at how large a batch may be."""
        route = self.routes[batch[0].key]
        size = sum(len(each.payload) for each in batch) // len(batch)
        route.limit = max(1, min(2 * route.limit, self._sender.most, _BATCH_BYTES // max(size, 1)))
        return route

    def _claim_behind(self, batch: list[Delivery]) -> list[Delivery]:
        own = {each._grant.token for each in batch}  # noqa: SLF001  # they are one piece
        return self._claim_now(batch[0].key, own)

    def _claim_now(self, key: str, own: Container[bytes] = ()) -> list[Delivery]:
        limit = min(self.routes[key].limit, self._sender.most)
        deliver = self._store._deliver  # noqa: SLF001
        work, claimed = taking.claim_many([key], limit, self._wanted, deliver, own=own)
        self._database.write(work)
        return claimed

    def _awaited(self, sending: Future[int], held: list[Delivery]) -> int:
        """What it comes to, while leases are renewed."""
        while True:
            try:
                return sending.result(self._wanted.micros / 1e6 / _RENEW_AT)
            except TimeoutError:
                if sending.done():  # an error of its own
                    raise
            try:
                delivery.extend_many(self._database, held)
            except BaseException:
                sending.cancel()
                raise

    def _arrived(self, sent: list[Delivery], route: Route) -> None:
        if route.failure:
            log.info("%a: entries are sent again, from %d on", sent[0].key, sent[0].seq)
            route.failure = ""
        route.sent += len(sent)
        try:
            # The function may have settled it by itself.
            self._store.ack_many(each for each in sent if not each._settled)  # noqa: SLF001
        except LeaseError as error:  # this process stood still; whoever has it now sends it, too
            log.warning("%s, though it was sent", error)
        else:
            self._sender.acked(sent)

    def _failed(self, batch: list[Delivery], route: Route, error: Exception) -> None:
        first = batch[0]
        if self._context.canceled:  # not its own fault
            delivery.give_back(self._database, batch)
            return
        route.limit = 1  # a large batch may have no room where a small one has
        pause = self._pause(first.attempts, error)
        route.failure = str(error) or kind(error)
        route.retry_at = time.time() + pause
        try:
            delivery.give_back(self._database, batch, delay=pause)
        except LeaseError as lost:
            log.warning("%s", lost)
            return
        log.warning(
            "%a: entry %d could not be sent, attempt %d: %s; the next is in %.1f s",
            *(first.key, first.seq, first.attempts, route.failure, pause),
        )


class Pause:
    """How long to wait after a failed try: what tenacity says of it."""

    def __init__(self, wait: "wait_base | None", needed_by: str = "sqlspace.forward") -> None:
        if importlib.util.find_spec("tenacity") is None:
            raise ImportError(
                f"{needed_by} needs tenacity: pip install 'sqlspace[forward]'", name="tenacity"
            )
        import tenacity  # noqa: PLC0415  # need not be installed

        if wait is None:
            wait = tenacity.wait_exponential(
                multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS
            ) + tenacity.wait_random(0, FIRST_PAUSE_SECONDS)
        elif not callable(wait):
            raise TypeError(f"wait must be one of tenacity's, or None, not {kind(wait)}")
        self._tries = tenacity.Retrying(wait=wait)
        self._state = tenacity.RetryCallState

    def __call__(self, attempts: int, error: Exception) -> float:
        """Seconds, after so many tries, of which the last ended so."""
        state = self._state(self._tries, None, (), {})
        state.attempt_number = attempts
        state.set_exception((type(error), error, error.__traceback__))
        return max(0.0, float(self._tries.wait(state)))


# -- endpoints that need nothing installed


class _Function:
    """A function of the caller's, one entry at a time."""

    most = 1

    def __init__(self, store: Store, function: Callable[[Delivery], object]) -> None:
        self._renewals = store._renewals  # noqa: SLF001
        self._function = function

    def send(self, batch: Sequence[Delivery]) -> Future[int]:
        (entry,) = batch
        sent: Future[int] = Future()
        self._renewals.add(entry)
        try:
            self._function(entry)
        except BaseException as error:  # noqa: BLE001  # the forwarder's to judge
            sent.set_exception(error)
        else:
            sent.set_result(1)
        finally:
            self._renewals.discard(entry)
        return sent

    def acked(self, batch: Sequence[Delivery]) -> None:
        pass

    def stop(self, *, force: bool) -> None:
        pass

    def close(self) -> None:
        pass


class _Program(_Function):
    """A command, run for each entry."""

    def __init__(self, store: Store, argv: Sequence[str]) -> None:
        super().__init__(store, self._run)
        self._argv = list(argv)
        self._running: dict[subprocess.Popen[bytes], None] = {}  # changed in single steps
        self._stopped = False

    def _run(self, entry: Delivery) -> None:
        try:
            child = programs.start(self._argv, entry)
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise OSError(f"{self._argv[0]} can't be given headers that large") from error
            raise OSError(f"{error.filename}: {error.strerror}") from error
        try:
            self._running[child] = None
            if self._stopped:
                child.terminate()
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            self._running.pop(child, None)
        failed = programs.fate(code)
        if self._stopped:  # many exit with 0 when they are told to end, done or not
            failed = "was told to end"
        if failed is not None:
            raise ChildProcessError(f"{self._argv[0]} {failed}")

    def stop(self, *, force: bool) -> None:
        self._stopped = True
        for child in list(self._running):
            if force:
                child.kill()
            else:
                child.terminate()


# -- what callers hand in


def _sender(store: Store, send: Any) -> Sender:
    if hasattr(send, "_sender"):
        return cast("Destination", send)._sender(store)  # noqa: SLF001  # the protocol's
    if callable(send):
        return _Function(store, send)
    if isinstance(send, str | bytes) or not isinstance(send, Sequence):
        raise TypeError(
            "send must be a function, a command as a list of str, or a "
            f"sqlspace.jetstream.Endpoint, not {kind(send)}"
        )
    for index, word in enumerate(send):
        if not isinstance(word, str | os.PathLike):
            raise TypeError(f"send[{index}] must be str, not {kind(word)}")
        if "\0" in os.fspath(word):
            raise ValueError(f"send[{index}] must not hold a NUL character: {shown(word)}")
    if not send:
        raise ValueError("send must name a program")
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        raise ValueError("with SIGCHLD ignored no exit code of a command can be had")
    programs.check_program(send[0])
    return _Program(store, send)
