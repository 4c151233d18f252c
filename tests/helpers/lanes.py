"""Threads that use one space, and log it for the judge; nobody is killed."""

import random
import sys
import threading

from history import Evidence, do, judge, remains
from storm_lane import RULES, Lane
from storm_worker import Task, Worker

import sqlspace

__all__ = ["run_on_local", "run_on_store"]

KEYS = ["a", "b", "c"]
PUT = "put"


class Memory:
    """A log that is no file."""

    def __init__(self, name):
        self.name = str(name)
        self.records = []
        self.write = self.records.append


def together(number, lane):
    """So many threads, each in a lane of its own; the records of their logs."""
    logs = [Memory(n) for n in range(number)]
    start = threading.Barrier(number)

    def run(log):
        step = lane(log)
        start.wait()
        try:
            step()
        except BaseException as error:
            log.write(["error", repr(error)])
            raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they get in each other's way
    try:
        threads = [threading.Thread(target=run, args=(log,)) for log in logs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return [log.records for log in logs]


class LocalLane:
    """One thread's work on a `Local`."""

    def __init__(self, local, log, seed):
        self.local, self.log = local, log
        self.random = random.Random(seed)
        self.pushed = 0

    def run(self, steps):
        kinds = {self.out: 10, self.take: 10, self.look: 3, self.put: 2, self.take_put: 2}
        for _ in range(steps):
            self.random.choices(list(kinds), list(kinds.values()))[0]()

    def payload(self):
        self.pushed += 1
        return f"{self.log.name}.{self.pushed}"

    def out(self):
        key, payload = self.random.choice(KEYS), self.payload()
        do(
            self.log.write,
            lambda: self.local.out(key, payload),
            *("push", key, [payload], {}),
            result=lambda _: [None],
        )

    def put(self):
        payload = self.payload()
        do(self.log.write, lambda: self.local.put(PUT, payload), "put", PUT, payload)

    def take_put(self):
        self.taken([PUT], lambda: self.probed(self.local.inp, PUT))

    def take(self):
        keys = self.random.sample(KEYS, 3)
        way, key = self.random.randrange(3), keys[0]
        if way == 0:
            self.taken(keys, lambda: self.waited(self.local.in_any, keys))
        elif way == 1:
            self.taken([key], lambda: self.probed(self.local.inp, key))
        else:
            self.taken([key], lambda: self.waited(self.local.in_, key))

    def taken(self, keys, step):
        do(self.log.write, step, "take", keys, 1)

    def look(self):
        key = self.random.choice(KEYS)
        if self.random.random() < 0.5:
            do(self.log.write, lambda: self.probed(self.local.rdp, key), "peek", [key])
        else:
            do(self.log.write, lambda: self.waited(self.local.rd, key), "peek", [key])

    def probed(self, verb, key):
        payload = verb(key)
        return [] if payload is None else [(key, payload)]

    def waited(self, verb, what):
        try:
            found = verb(what, self.random.choice((0.0, 0.0005)))
        except sqlspace.DeadlineError:
            return []
        return [found if isinstance(found, tuple) else (what, found)]


def run_on_local(local, threads, steps, seed):
    """What the judge says: problems and counts."""

    def lane(log):
        return lambda: LocalLane(local, log, f"{seed}/{log.name}").run(steps)

    logs = together(threads, lane)
    rest = Memory("rest")
    for key in (*KEYS, PUT):
        last = LocalLane(local, rest, 0)
        for _ in range(local.len(key) + 1):
            last.taken([key], lambda key=key, last=last: last.probed(local.inp, key))
    return judge(Evidence([*logs, rest.records]))


def run_on_store(store, threads, steps, seed):
    """The same; the lanes are those of a storm."""
    worker = Worker(Task("", "", seed, history=None), store)

    def lane(log):
        one = Lane(worker, log, f"{seed}/{log.name}")
        return lambda: [one.step() for _ in range(steps)]

    logs = together(threads, lane)
    worker.task.draining = True
    rest = Memory("rest")
    last = Lane(worker, rest, seed)
    last.run()
    last.drain()
    rows, integrity = remains(store.path)
    return judge(Evidence([*logs, rest.records], rows, integrity, RULES))
