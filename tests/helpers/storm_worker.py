"""The workers of a storm: processes with one or several lanes, each with a log of its own.

python storm_worker.py TASK      a worker in a process of its own, TASK as JSON
"""

import contextlib
import ctypes
import json
import logging
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
from dataclasses import dataclass

import plants
from history import do
from storm_lane import QUEUES, Lane, offset

import sqlspace

BUSY_TIMEOUT = 0.3
PR_SET_PDEATHSIG = 1
TOLD = (signal.SIGTERM, signal.SIGINT)
INSERT = "INSERT INTO sqlspace_outbox (key, payload) VALUES (?, ?)"

__all__ = ["BUSY_TIMEOUT", "TOLD", "Log", "Task", "Worker", "work"]


@dataclass
class Task:
    """What a worker is told.

    Attributes:
        folder: Of the store and the logs.
        name: Of its logs.
        parent: The process without which it ends; 0: none.
        seed: Of its whims.
        threads: How many work.
        sync: Of its store.
        history: Of its store.
        draining: Ends when all that is claimed is done, and fails no more than it must.
        foreign: Pushes through the view, with another SQLite library.
        plant: A bug, to see whether it is found.
    """

    folder: str
    name: str
    seed: float | str
    parent: int = 0
    threads: int = 1
    sync: bool | str = False
    history: int | None = None
    draining: bool = False
    foreign: bool = False
    plant: str | None = None

    @property
    def path(self):
        return os.path.join(self.folder, "queue.db")


class Log:
    """A file of its own, one record a line, one write a record."""

    def __init__(self, task, number):
        self.name = f"{task.name}.{number}"
        path = os.path.join(task.folder, f"{self.name}.log")
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        self.write(["wall", offset()])

    def write(self, record):
        os.write(self._file, (json.dumps(record) + "\n").encode())

    def close(self):
        os.close(self._file)


class Worker:
    """A process's work, or a part of a process.

    Args:
        task: See there.
        store: That it uses; None: one of its own.
    """

    def __init__(self, task, store=None):
        self.task = task
        self.over = threading.Event()
        self.store = store

    def run(self):
        """Until it is killed, or told to end; whether nothing happened that never should."""
        logs = [Log(self.task, number) for number in range(self.task.threads)]
        try:
            if self.task.foreign:
                return self.guarded(lambda: self.push_foreign(logs[0]), logs[0])
            with contextlib.ExitStack() as stack:
                if self.store is None:
                    self.store = stack.enter_context(self.open())
                good = []

                def run(number):
                    lane = Lane(self, logs[number], f"{self.task.seed}/{number}")
                    good.append(self.guarded(lane.run, logs[number]))

                threads = [
                    threading.Thread(target=run, args=(number,)) for number in range(1, len(logs))
                ]
                for thread in threads:
                    thread.start()
                run(0)
                for thread in threads:
                    thread.join()
                return len(good) == len(logs) and all(good)
        except BaseException:
            logs[0].write(["error", traceback.format_exc()])
            raise
        finally:
            for log in logs:
                log.close()

    def guarded(self, step, log):
        """Whether it raised nothing; if it did, the log tells."""
        try:
            step()
        except BaseException:
            self.over.set()
            log.write(["error", traceback.format_exc()])
            return False
        return True

    def open(self):
        """The store, as soon as those that are frozen let it be opened."""
        while True:
            try:
                return sqlspace.open(
                    self.task.path,
                    sync=self.task.sync,
                    history=self.task.history,
                    busy_timeout=BUSY_TIMEOUT,
                )
            except sqlspace.BusyError:
                self.leave_if_orphaned()

    def leave_if_orphaned(self):
        if self.task.parent not in (0, os.getppid()):
            os._exit(3)

    def push_foreign(self, log):
        """As the sqlite3 shell would: by INSERT into the view."""
        whims = random.Random(self.task.seed)
        connection = sqlite3.connect(self.task.path, timeout=BUSY_TIMEOUT, isolation_level=None)
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        for number in range(1 << 62):
            if self.over.is_set():
                return
            self.leave_if_orphaned()
            key, payload = whims.choice(QUEUES), f"{log.name}.{number}"

            def push(key=key, payload=payload):
                try:
                    connection.execute(INSERT, (key, payload))
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                        raise
                    raise sqlspace.BusyError from error

            do(
                log.write,
                push,
                *("push", key, [payload], {}),
                result=lambda _: [None],
            )
            time.sleep(whims.expovariate(100))


def work(task, store=None):
    """Be a worker, in this process; its exit code."""
    worker = Worker(task, store)
    if sys.platform == "linux":  # who is frozen then can't look
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: worker.over.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the storm's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)
    logging.getLogger("sqlspace").addHandler(logging.NullHandler())
    logging.getLogger("sqlspace").propagate = False
    if task.plant is not None:
        plants.PLANTS[task.plant]()
    return 0 if worker.run() else 1


if __name__ == "__main__":
    sys.exit(work(Task(**json.loads(sys.argv[1]))))
