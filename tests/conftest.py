"""What all tests share: children that can't be forgotten, and a deadline for what must happen."""

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
