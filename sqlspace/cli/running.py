"""A program that is run for an entry, under its lease: what `pull --lease` does.

The payload is the program's stdin, its exit code settles the entry: 0 acks, all else nacks. A
signal that ends us ends the program first, and gives its entry back, whatever its exit code says
then: many exit with 0 when they are told to end, done or not. What dies with kill -9 leaves its
entry leased, and so it comes back.
"""

import errno
import signal
import subprocess
import time
from dataclasses import dataclass

from sqlspace import programs
from sqlspace.delivery import Delivery
from sqlspace.errors import CanceledError, DeadlineError
from sqlspace.space import Context
from sqlspace.store import Store

from . import terminal
from .signals import Signals

__all__ = ["Terms", "run_for_entries"]

# A terminal's Ctrl-C reaches the program as well as us: so long it has to end by itself.
_PATIENCE_SECONDS = 1.0
_GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True)
class Terms:
    """How entries are claimed, and given back."""

    lease: float
    max_attempts: int | None
    ordered: bool
    retry_delay: float


def run_for_entries(
    store: Store,
    key: str,
    argv: list[str],
    terms: Terms,
    *,
    limit: int,
    seconds: float | None,
) -> int:
    """Run a program for each entry.

    Args:
        store: Where.
        key: Of the entries.
        argv: The program and its arguments.
        terms: Of the leases.
        limit: For so many entries at most.
        seconds: How long to wait for each; None: for ever. 0: don't, and run it no more often than
            there are entries now, so that one which fails and comes back is no endless loop.

    Returns:
        The exit code.

    Raises:
        ValueError: the program can't be started.
        LeaseError: a lease was lost meanwhile; the program may have been run twice for its entry.
    """
    context = Context()
    done = failed = 0
    with Signals([signal.SIGCHLD], context.cancel) as signals:
        if seconds == 0:
            limit = min(limit, store.len(key))
        while done < limit:
            delivery = _claim(store, key, terms, seconds, context)
            if delivery is None:
                break
            done += 1
            failed += not _attend(delivery, argv, terms, signals)
        if signals.stop is not None:
            return terminal.SIGNALED + signals.stop
    if not done:
        return terminal.NOTHING
    return terminal.COMMAND_FAILED if failed else terminal.DONE


def _claim(
    store: Store, key: str, terms: Terms, seconds: float | None, context: Context
) -> Delivery | None:
    try:
        return store.claim(
            key,
            seconds,
            lease=terms.lease,
            max_attempts=terms.max_attempts,
            ordered=terms.ordered,
            context=context,
        )
    except (DeadlineError, CanceledError):
        return None


def _attend(delivery: Delivery, argv: list[str], terms: Terms, signals: Signals) -> bool:
    """Run the program for one entry, and settle it; whether the work is done."""
    with delivery:
        fate = "" if signals.stop is not None else _run(delivery, argv, signals)
        if signals.stop is not None:  # not its own fault
            delivery.nack()
            return False
        if fate is not None:
            entry = f"entry {delivery.seq} of {delivery.key!a}, attempt {delivery.attempts}"
            terminal.complain(f"{entry}: {argv[0]} {fate}")
            delivery.nack(terms.retry_delay)
            return False
    return True


def _run(delivery: Delivery, argv: list[str], signals: Signals) -> str | None:
    """Run the program; how it failed, or None."""
    signals.raising = False  # nothing may come between the program and the note of it
    try:
        try:
            child = programs.start(argv, delivery)
        except OSError as error:
            if error.filename != argv[0]:
                raise
            if error.errno == errno.E2BIG:
                return "can't be given headers that large"
            if programs.is_unfit(error):
                raise ValueError(f"{argv[0]} can't be started: {error.strerror}") from None
            raise
        try:
            code = _wait(child, signals)
        except BaseException:
            child.kill()
            child.wait()
            raise
    finally:
        signals.raising = True
    return programs.fate(code)


def _wait(child: subprocess.Popen[bytes], signals: Signals) -> int:
    """Wait for the program's end, and see to it once we are to end ourselves; its exit code."""
    means = [signal.SIGTERM, signal.SIGKILL]
    due: float | None = None
    while (code := child.poll()) is None:
        now = time.monotonic()
        if signals.stop is not None and due is None:
            due = now + (_PATIENCE_SECONDS if signals.stop == signal.SIGINT else 0.0)
        if signals.insisted:
            del means[:-1]
            due = now
        if due is not None and means and now >= due:
            child.send_signal(means.pop(0))
            due = now + _GRACE_SECONDS
        signals.sleep(due - now if due is not None and means else None)
    return code
