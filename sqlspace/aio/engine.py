"""What carries out the work of a store's coroutines, while their loops go on.

An operation goes to the one worker thread, which carries out all that have come by then, in one
commit: 64 coroutines that push share it with no more threads than one does. Everything else runs in
the threads of a pool, as a caller's thread would run it; that includes the looks of a wait, which
last as long as a look does, never as long as the wait.

The law of cancellation: a call that raises CancelledError did nothing. An operation that was not
begun is withdrawn. One that was is awaited, and undone. Whose loop is gone, so that nobody can
await it, is undone all the same.

Rings for waiting coroutines are heard by a thread that waits at the doorbell for all of them, while
there are any.
"""

import _thread
import asyncio
import contextlib
import itertools
import logging
import operator
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from sqlspace.committer import BATCH_OPERATIONS, Operation
from sqlspace.database import Database
from sqlspace.errors import SpaceError, StoreError
from sqlspace.taking import Grab, grabbing
from sqlspace.waiting import LOOK_AGAIN_SECONDS, Vigil, Waiter

from .waiting import to_the_end, wait

__all__ = ["Engine"]

log = logging.getLogger("sqlspace")

T = TypeVar("T")
G = TypeVar("G", bound=Grab)

_THREADS: Final = 16  # that many share a commit 4 times as well as one


class _Job:
    """An operation to carry out, or to undo, and the future that tells when that is done.

    Args:
        operation: To carry out.
        loop: Of the future.
        undoes: The job whose operation is to be undone instead.
    """

    __slots__ = ("future", "loop", "number", "operation", "undoes")

    def __init__(
        self,
        operation: Operation,
        loop: asyncio.AbstractEventLoop,
        *,
        undoes: "_Job | None" = None,
    ) -> None:
        self.operation = operation
        self.loop = loop
        self.undoes = undoes
        self.number: int = next(_numbers) if undoes is None else undoes.number
        self.future = loop.create_future()


_numbers = itertools.count()
_NUMBER = operator.attrgetter("number")


class Engine:
    """That of one store in one process.

    Args:
        database: The store's.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """With no thread yet."""
        self._pool = _new_pool()
        self._jobs: deque[_Job] = deque()
        self._go = threading.Lock()  # released when there are jobs
        self._go.acquire()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._ear = Waiter()
        self._listener: threading.Thread | None = None
        self._waits: dict[Vigil, None] = {}
        self._lock = threading.Lock()  # of the start and the end of threads

    def forget(self) -> None:
        """In a forked child: the threads, and those whose work they do, are the parent's."""
        self._begin()

    # -- in a loop

    async def call(self, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """What a function returns, run in a thread, and to its end even if this is cancelled."""
        return await self._run(partial(function, *args, **named), lambda: None)

    async def _run(self, function: Callable[[], T], call_off: Callable[[], object]) -> T:
        loop = asyncio.get_running_loop()
        with self._lock:  # or it might be closed just now
            begun = loop.run_in_executor(self._pool, function)
        return await to_the_end(begun, call_off)

    async def wait(self, vigil: Vigil, *, looked: bool = False) -> Any:
        """Wait at the doorbell until something is found, and return that."""
        self._waits[vigil] = None
        try:
            with self._lock:
                if self._listener is None:
                    self._listener = _start(self._listen, "sqlspace-aio-ear")
            return await wait(vigil, self._run, looked=looked)
        finally:
            del self._waits[vigil]

    async def take(
        self,
        make: Callable[[Waiter | None], G],
        tokens: Sequence[str],
        *,
        in_turn: bool = False,
    ) -> G:
        """Make attempts until one succeeds; as `taking.wait_and_grab`."""
        # There mostly is one, and then there is nothing to wait for.
        attempt = await self.take_now(make)
        if attempt is not None:
            return attempt
        vigil = grabbing(self.database, make, tokens, in_turn=in_turn)
        found: G = await self.wait(vigil, looked=True)
        return found

    async def take_now(self, make: Callable[[Waiter | None], G]) -> G | None:
        """Make one attempt; None if there is nothing to take."""
        attempt = make(None)
        await self.write(attempt)
        if attempt.refusal is not None:
            raise attempt.refusal
        return attempt if attempt.got else None

    async def write(self, operation: Operation) -> None:
        """Have it carried out; what it was refused for is raised.

        Raises:
            ClosedError, StoreError: as `Database.write`.
        """
        job = _Job(operation, asyncio.get_running_loop())
        try:
            self._submit(job)
            await job.future
        except BaseException as error:
            if not self._withdraw(job):
                undo = _Job(operation, job.loop, undoes=job)  # behind the job
                # If it was thrown away unfinished, nothing can be awaited. That may have been by
                # the garbage collector, in the middle of anything: so no lock is waited for.
                if isinstance(error, GeneratorExit):
                    with contextlib.suppress(RuntimeError):  # the interpreter ends
                        _thread.start_new_thread(self._submit, (undo,))
                else:
                    self._submit(undo)
                    await to_the_end(undo.future)
            raise
        if operation.error is not None:
            raise operation.error

    def _submit(self, job: _Job) -> None:
        with self._lock:
            self._jobs.append(job)
            if self._worker is None:
                self._worker = _start(self._work, "sqlspace-aio")
        self._call_worker()

    def _call_worker(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was called already
            self._go.release()

    def _withdraw(self, job: _Job) -> bool:
        """Whether it had not been begun, and never will be."""
        try:
            self._jobs.remove(job)
        except ValueError:
            return self.database.call_off(job.operation)
        return True

    # -- in the worker

    def _work(self) -> None:
        while not self._is_done():
            self._go.acquire()
            while self._jobs:
                self._carry_out(self._taken())

    def _is_done(self) -> bool:
        with self._lock:
            if self._worker is not threading.current_thread():
                return True  # Ctrl-C cut off its start, and the next one's undoes must not meet it
            if self._jobs or not self._closed:
                return False
            self._worker = None
            return True

    def _taken(self) -> list[_Job]:
        """As many as go into one commit."""
        jobs: list[_Job] = []
        while self._jobs and len(jobs) < BATCH_OPERATIONS:
            with contextlib.suppress(IndexError):  # it was withdrawn
                jobs.append(self._jobs.popleft())
        return jobs

    def _carry_out(self, jobs: list[_Job]) -> None:
        self.database.write_all([job.operation for job in jobs if not job.undoes])
        # The last first: no push can be undone while the pull stands that took its entry.
        for job in sorted(jobs, key=_NUMBER, reverse=True):
            if job.undoes:
                self._undo(job.operation)
        ended: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
        for job in jobs:
            ended.setdefault(job.loop, []).append(job)
        for loop, its in ended.items():
            try:
                loop.call_soon_threadsafe(_tell, its)
            except RuntimeError:  # it is closed, and nobody will know
                for job in its:
                    self._undo(job.operation)

    def _undo(self, operation: Operation) -> None:
        """Have nothing of it stand. Idempotent."""
        if operation.done:
            try:
                self.database.undo(operation)
            except SpaceError:
                log.exception("%s: a call could not be undone", self.database.options.path)

    # -- at the doorbell

    def _listen(self) -> None:
        while self._is_awaited():
            try:
                self.database.bell.park(self._ear, LOOK_AGAIN_SECONDS)
            except SpaceError:  # who waits meets it too
                self._ear.park(LOOK_AGAIN_SECONDS)

    def _is_awaited(self) -> bool:
        with self._lock:
            if self._waits and not self._closed:
                return True
            self._listener = None
            return False

    def close(self) -> None:
        """Let the threads go, when they have done what there is; what comes later gets new ones."""
        self.forsake()
        with self._lock:
            self._pool.shutdown(wait=False)
            self._pool = _new_pool()

    def forsake(self) -> None:
        """The same for the garbage collector, which may wait for no lock."""
        self._closed = True
        self._ear.wake()
        self._call_worker()


def _new_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="sqlspace-aio")


def _start(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # the process may have no more threads
        raise StoreError(f"no thread for coroutines: {error}") from error
    return thread


def _tell(jobs: list[_Job]) -> None:
    """In their loop."""
    try:
        for job in jobs:
            if not job.future.done():  # else it was cancelled
                job.future.set_result(None)
    except BaseException:  # Ctrl-C: the others would wait for ever, and asyncio.run for them
        jobs[0].loop.call_soon(_tell, jobs)
        raise


_all: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forget_all() -> None:
    for engine in list(_all):
        engine.forget()


os.register_at_fork(after_in_child=_forget_all)
