"""What a law works with: calls that can't hang, for each runs in a thread of its own."""

import threading
from collections.abc import Callable
from typing import Any, Final

from sqlspace.space import Space

__all__ = ["PATIENCE_SECONDS", "Bench", "Call"]

PATIENCE_SECONDS: Final = 30.0
_TIME_TO_BLOCK_SECONDS: Final = 0.02


class Call:
    """A call in a thread of its own, whose end is waited for with a limit."""

    def __init__(
        self, patience: float, verb: Callable[..., Any], *args: Any, **bounds: Any
    ) -> None:
        shown = [f"{arg!a:.20}" for arg in args]
        shown += [f"{name}={bound!a:.20}" for name, bound in bounds.items()]
        self._what = f"{getattr(verb, '__name__', repr(verb))}({', '.join(shown)})"
        self._patience = patience
        self._began = threading.Event()
        self._ended = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            self._began.set()
            try:
                self._value = verb(*args, **bounds)
            except BaseException as error:  # noqa: BLE001  # result() raises it
                self._error = error
            finally:
                self._ended.set()

        threading.Thread(target=run, name=self._what, daemon=True).start()

    def give_it_time_to_block(self) -> None:
        """So that more broken backends are caught; no law needs it to hold."""
        self._began.wait(self._patience)
        self._ended.wait(_TIME_TO_BLOCK_SECONDS)

    def result(self) -> Any:
        """What it returned; or raise what it raised."""
        if not self._ended.wait(self._patience):
            raise AssertionError(f"{self._what} has not ended after {self._patience:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def raises(self, kind: type[Exception]) -> None:
        """Ensure that it raised this."""
        try:
            got = self.result()
        except kind:
            return
        except Exception as error:
            if type(error) is AssertionError:
                raise
            raise AssertionError(f"{self._what} raised {error!r}, not {kind.__name__}") from error
        raise AssertionError(f"{self._what} returned {got!r:.200} and raised no {kind.__name__}")


class Bench:
    """What a law works with: a space, and calls that can't hang."""

    def __init__(self, space: Space, patience: float) -> None:
        self.space = space
        self._patience = patience

    def begin(self, verb: Callable[..., Any], *args: Any, **bounds: Any) -> Call:
        """Begin a call."""
        return Call(self._patience, verb, *args, **bounds)

    def blocked(self, verb: Callable[..., Any], *args: Any, **bounds: Any) -> Call:
        """Begin a call that will most likely have blocked when this returns."""
        begun = self.begin(verb, *args, **bounds)
        begun.give_it_time_to_block()
        return begun

    def raises(
        self, kind: type[Exception], verb: Callable[..., Any], *args: Any, **bounds: Any
    ) -> None:
        """Ensure that a call raises this."""
        self.begin(verb, *args, **bounds).raises(kind)
