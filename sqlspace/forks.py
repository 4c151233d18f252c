"""Forks: how every database of the process stands still meanwhile, and the child begins anew.

The child inherits SQLite's table of locks, but not the locks. So every database stands still,
outside of SQLite, while its process forks, and the child closes all that it has inherited before it
opens anything: then SQLite forgets the table.
"""

import os
import threading
import weakref
from typing import Protocol

from . import doorbell, identity

__all__ = ["Forking", "databases", "opening"]


class Forking(Protocol):
    """What a fork needs of a database."""

    inside: bool
    """Whether the thread that forks is in the middle of a call."""

    def before_fork(self) -> None:
        """Stand still."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Let go what is the parent's."""


opening = threading.Lock()
databases: weakref.WeakSet[Forking] = weakref.WeakSet()
_at_rest: list[Forking] = []
# To roll back what was open at the fork, SQLite in the child clears from the -shm what it takes for
# its own frames. If the parent committed meanwhile these were the parent's: of 12 such forks one
# lost it entries. So the parent waits until the child has let go: this pipe's other end is closed.
_letting_go: list[int] = []


def _before_fork() -> None:
    while True:
        # A database's locks come before opening, as in a reopening.
        for database in sorted(set(databases).difference(_at_rest), key=id):
            database.before_fork()
            _at_rest.append(database)
        opening.acquire()
        if set(databases) <= set(_at_rest):
            if any(database.inside for database in _at_rest):
                _letting_go.extend(os.pipe())
            return
        opening.release()


def _after_fork_in_parent() -> None:
    if _letting_go:
        os.close(_letting_go.pop())
        os.read(_letting_go[0], 1)
        os.close(_letting_go.pop())
    while _at_rest:
        _at_rest.pop().after_fork_in_parent()
    opening.release()


def _after_fork_in_child() -> None:
    global opening  # noqa: PLW0603
    opening = threading.Lock()
    doorbell.forget()
    identity.forget()
    while _at_rest:
        _at_rest.pop().after_fork_in_child()
    while _letting_go:
        os.close(_letting_go.pop())


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
