"""Where Ctrl-C can strike, for the whole package."""

import dis
import importlib
import itertools
import types

import pytest

from sqlspace import StoreError
from sqlspace.waiting import surely

# Those that hold locks in a caller's thread.
MODULES = [
    *("local", "waiting", "store", "database", "doorbell", "watch", "identity"),
    *("taking", "pushing", "delivery", "transaction", "durable"),
    *("committer", "commits", "turnstile", "aio.engine", "aio.waiting"),
]


def codes(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def unguarded(code):
    """The lines of jumps backwards inside a `with` that its exit doesn't cover."""
    instructions = list(dis.get_instructions(code))
    exits = {
        before.offset
        for before, exit_ in itertools.pairwise(instructions)
        if exit_.opname == "WITH_EXCEPT_START"
    }
    ranges = [r for r in dis.Bytecode(code).exception_entries if r.target in exits]
    for instruction in instructions:
        if instruction.opname.startswith("JUMP_BACKWARD"):
            at = instruction.offset
            before = {r.target for r in ranges if r.end <= at}
            after = {r.target for r in ranges if r.start > at}
            if (before & after) - {r.target for r in ranges if r.start <= at < r.end}:
                yield instruction.positions.lineno


@pytest.mark.parametrize("name", MODULES)
def test_no_loop_stands_where_an_interrupt_would_leave_its_lock_taken(name):
    """CPython checks for signals at jumps backwards, and compiles some out of their handler."""
    module = importlib.import_module(f"sqlspace.{name}")
    with open(module.__file__, encoding="utf-8") as file:
        top = compile(file.read(), module.__file__, "exec")
    found = {f"{code.co_qualname}, line {line}" for code in codes(top) for line in unguarded(code)}
    assert found == set()


class Expired(BaseException):
    """As pytest's and gevent's timeouts."""


def test_whatever_strikes_and_however_often_a_step_is_run_to_its_end():
    """The last strike is told, so that the caller can raise it."""
    strikes = [Expired(), TimeoutError(), SystemExit(1), KeyboardInterrupt(), Expired()]
    left = list(strikes)

    def step():
        if left:
            raise left.pop(0)

    assert surely(step) is strikes[-1]
    assert not left
    assert surely(step) is None


@pytest.mark.parametrize(("error", "times"), [(StoreError("x"), 1), (AttributeError("x"), 100)])
def test_a_step_that_fails_by_itself_is_not_run_for_ever(error, times):
    """An error of ours is the step's own at once; any other when it comes again and again."""
    ran = []

    def step():
        ran.append(None)
        raise error

    with pytest.raises(type(error)):
        surely(step)
    assert len(ran) == times
