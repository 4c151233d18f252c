"""Signals that are noted and not raised, so that what is under way gets to its end first.

A handler that raises may do so anywhere: between the start of a process and the note of who it is,
in the middle of reaping it. Here a handler makes a note, and whoever sleeps in `Signals.sleep`
wakes at once, since each signal that has a handler writes into a pipe.
"""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Signals"]

# What asks a program to end. Those that it was told to ignore (nohup, a shell's &) stay ignored.
_STOPS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """In the main thread, while its block runs: a stop is asked for by the note of it.

    Args:
        wakes: Signals that only end a sleep.
        on_stop: Called by the handler, with the first stop.

    Attributes:
        stop: The first signal that asked for an end; None until then.
        insisted: Whether somebody pressed Ctrl-C though a stop was asked for already.
        raising: Whether to insist raises KeyboardInterrupt, too.
    """

    def __init__(
        self, wakes: Iterable[int] = (), on_stop: Callable[[], None] = lambda: None
    ) -> None:
        self.stop: int | None = None
        self.insisted = False
        self.raising = True
        self._wakes = wakes
        self._on_stop = on_stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        for number in self._wakes:
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.stop is None:
            self.stop = number
            self._on_stop()
        elif number == signal.SIGINT:  # others come in pairs, at the end of a session
            self.insisted = True
            if self.raising:
                raise KeyboardInterrupt

    def sleep(self, seconds: float | None, *descriptors: int) -> bool:
        """Sleep until a signal comes, one of these can be read, or so many seconds are over.

        A signal that came since the last sleep ends this one at once.

        Returns:
            Whether a descriptor can be read.
        """
        poll = select.poll()
        for descriptor in (self._reader, *descriptors):
            poll.register(descriptor, select.POLLIN)
        ready = poll.poll(None if seconds is None else max(0.0, seconds * 1000))
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 1024):
                pass
        return any(descriptor != self._reader for descriptor, _ in ready)
