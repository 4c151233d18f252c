"""Ctrl-C at each instruction of a call, one after the other."""

import _thread
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sqlspace.errors import CanceledError, DeadlineError
from sqlspace.waiting import MISSING

__all__ = ["every_step", "interrupted"]


def interrupted(
    call: Callable[[], Any],
    *steps: int,
    paused: Any = (),
    struck: list[int] | None = None,
    deed: Callable[[], None] | None = None,
    raises: type[BaseException] = KeyboardInterrupt,
) -> tuple[Any, bool]:
    """Run a call with Ctrl-C pending from its n-th instruction on, for each n of `steps`.

    CPython then delivers it at the next place where it looks for signals, just as it would one
    from the keyboard; so going through all instructions goes through all places.

    Args:
        call: What to run.
        steps: Increasing.
        paused: While it is true, instructions aren't counted.
        struck: Gets the step of each Ctrl-C when it is delivered.
        deed: What the signal's handler does, instead of raising.
        raises: What it raises.

    Returns:
        What the call returned, MISSING if nothing; and whether it has so many instructions.
    """
    count = 0
    done = False
    value: Any = MISSING

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode" and not paused and not done:
            count += 1
            if count in steps:
                # No more tracing, or it would be this function that is interrupted. Unpacking runs
                # it without a call instruction, after which that would happen as well.
                strike = map(_thread.interrupt_main, (signal.SIGINT,))
                sys.settrace(None)
                (_,) = strike
        return trace

    def deliver(*_: object) -> None:
        if done:
            return
        if struck is not None:
            struck.append(count)
        if deed is not None:
            deed()
            return
        sys.settrace(trace)
        raise raises

    before = signal.signal(signal.SIGINT, deliver)
    gc.disable()  # CPython swallows what strikes while it clears cycles
    try:
        sys.settrace(trace)
        value = call()
        done = True
    except (CanceledError, DeadlineError, raises):
        done = True
    finally:
        sys.settrace(None)
        gc.enable()
        signal.signal(signal.SIGINT, before)
    return value, count >= steps[0]


def every_step(*gaps: int) -> Iterator[tuple[int, ...]]:
    """1, 2, 3 …: until the generator is closed."""
    for step in range(1, 10_000):
        yield (step, *(step + gap for gap in gaps))
    raise AssertionError("this call has too many instructions")
