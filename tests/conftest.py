"""What all tests share: children that can't be forgotten, and a deadline for what must happen.

At the end of a run a table tells what the long tests have tried.
"""

import contextlib
import pathlib
import sys

import pytest

# Processes that are spawned import what they run by name, so it stands in modules of its own.
sys.path.insert(0, str(pathlib.Path(__file__).parent / "helpers"))


@pytest.fixture
def child(request):
    """Start a Python process of its own; see `children.Child`. None outlives the test."""
    from children import Child  # noqa: PLC0415  # the line above makes it importable

    started = []

    def start(source, *arguments):
        started.append(Child(source, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.end()


@pytest.fixture(scope="session")
def nats_server():
    """A nats-server that all tests share, each with streams of its own names."""
    from nats_servers import NatsServer  # noqa: PLC0415  # as above

    with NatsServer() as server:
        yield server


@pytest.fixture
def start_nats():
    """Start a nats-server, a Cluster or a Proxy of the test's own, which ends with it."""
    from nats_servers import NatsServer  # noqa: PLC0415  # as above

    with contextlib.ExitStack() as stack:
        yield lambda server=None: stack.enter_context(server or NatsServer())


@pytest.fixture
def _only_rings(monkeypatch):
    """Waiters never look by themselves, as the watch has them do: else no missing ring shows."""
    from sqlspace import watch  # noqa: PLC0415  # not before the tests that patch it

    monkeypatch.setattr(watch, "_LOOK_FIRST_SECONDS", 1e9)
    monkeypatch.setattr(watch.Watch, "_arm", lambda *_: True)


def pytest_terminal_summary(terminalreporter):
    """What was tried, how often, with which seeds, and what was found."""
    from proof import Line, lines  # noqa: PLC0415  # the line above makes it importable

    if not lines:
        return
    table = [Line("tried", "how often", "seeds", "found"), *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    terminalreporter.section("proof")
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.line("  ".join(cells).rstrip())
