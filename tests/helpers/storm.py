"""A kill storm: processes that do all that a store can, killed and frozen at random, and judged.

    scripts/storm --minutes 5 --processes 8 --seed 4
    scripts/storm --judge FOLDER

A storm is a row of rounds, each with a file of its own: half a minute of rage, a calm in which all
that is left is drained, and the judgement. The workers are forks of a process that has the store
open and works in it, too, some of which use that very store; fresh processes; and now and then
another SQLite library that pushes through the view. They get SIGKILL, now and then all at once, or
SIGSTOP for longer than every lease and busy_timeout, wherever they are. `storm_lane` tells what
they do, `queues` and `leases` what is judged. Exit status 1: there were violations, and what was
written stays in the folder that is named.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from dataclasses import asdict

import storm_worker
from history import Evidence, judge, parsed, remains
from plants import PLANTS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from storm_lane import DRAINED, LEASE, RULES, Lane
from storm_worker import BUSY_TIMEOUT, TOLD, Log, Task, Worker

import sqlspace

__all__ = ["Storm", "judge_folder", "run"]

ROUND_SECONDS = 30
SHOWN = 20
MEMORY = "/dev/shm"


class Storm:
    """Processes that work, and what befalls them.

    Args:
        folder: For the store and the logs.
        processes: How many work at a time.
        seed: Of all that is random.
        plant: A bug for the workers.
    """

    def __init__(self, folder, processes, seed, plant=None):
        self.folder, self.processes, self.plant = folder, processes, plant
        self.random = random.Random(seed)
        # Whoever keeps all tombstones can't compact; who compacts has fewer witnesses.
        self.history = 500 if plant else self.random.choice((None, 500, 10_000))
        # Where all wait for the disk, less happens; so half of the rounds don't.
        one = plant or self.random.random() < 0.5
        self.syncs = (False,) if one else (True, "group", False)
        self.started = 0
        self.names = {}  # by pid
        self.frozen = {}  # by pid, until when
        self.counts = Counter()
        self.problems = []
        task = Task(folder, "resident", f"{seed}/resident", history=self.history)
        self.store = sqlspace.open(
            task.path, sync=self.syncs[0], history=self.history, busy_timeout=BUSY_TIMEOUT
        )
        self.resident = Worker(task, self.store)
        self.thread = threading.Thread(target=self.resident.run)

    def run(self, seconds, tick=lambda _: None):
        """Rage for so long, and calm down; `problems` are those of the storm itself."""
        try:
            self.thread.start()
            self.rage(seconds, tick)
            self.calm()
        finally:
            self.resident.over.set()
            self.kill(*self.names)
            self.thread.join()
            self.store.close()
        with open(os.path.join(self.folder, "storm.json"), "w", encoding="utf-8") as file:
            json.dump({"forgets": self.history is not None, "problems": self.problems}, file)

    # -- the workers

    def start(self, *, draining=False):
        """One more worker."""
        self.started += 1
        task = Task(
            self.folder,
            f"{self.started:05}",
            self.random.random(),
            os.getpid(),
            threads=1 if draining else self.random.choice((1, 1, 1, 4)),
            sync=self.random.choice(self.syncs),
            history=self.history,
            draining=draining,
            plant=self.plant,
        )
        way = 1.0 if draining else self.random.random()
        inherits = self.random.random() < 0.5
        if way < 0.04:
            task.foreign, task.threads = True, 1
        # What it is told before it can hear waits until then.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
        if way < 0.2:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, storm_worker.__file__, json.dumps(asdict(task))],
                {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        else:
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = storm_worker.work(task, self.store if inherits else None)
            finally:
                os._exit(code)
        self.names[pid] = task.name
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def rage(self, seconds, tick):
        """Kill and freeze, and start anew."""
        began = now = time.monotonic()
        while now < began + seconds:
            while len(self.names) < self.processes:
                self.start()
            time.sleep(self.random.uniform(0.0, 0.1))
            now = time.monotonic()
            self.thaw(now)
            what = self.random.random()
            if what < 0.01:
                self.kill(*self.names)
                self.counts["whole-storm kills"] += 1
            elif what < 0.5:
                self.kill(self.random.choice(list(self.names)))
            elif what < 0.62:
                self.freeze(self.random.choice(list(self.names)))
            tick(now - began)
        self.thaw(math.inf)

    def kill(self, *pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            self.counts["kills"] += self.reap(pid) == -signal.SIGKILL

    def reap(self, pid):
        """Wait for its end, and note in its logs that it is over; how it ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        now = time.monotonic_ns()
        name = self.names.pop(pid)
        self.frozen.pop(pid, None)
        for path in logs_of(self.folder, f"{name}."):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f'\n["X", {now}]\n')
        if code not in (0, -signal.SIGKILL):
            self.problems.append(f"worker {name} ended with {code}")
        return code

    def freeze(self, pid):
        if pid not in self.frozen:
            os.kill(pid, signal.SIGSTOP)
            longest = max(LEASE, BUSY_TIMEOUT)
            self.frozen[pid] = time.monotonic() + longest * self.random.uniform(1.2, 3)
            self.counts["stops"] += 1

    def thaw(self, now):
        for pid, until in list(self.frozen.items()):
            if until <= now:
                os.kill(pid, signal.SIGCONT)
                del self.frozen[pid]

    # -- the calm

    def calm(self):
        """End the workers, and have others do what is left."""
        self.resident.over.set()
        self.end_all()
        for _ in range(3):
            self.start(draining=True)
        for pid in list(self.names):
            self.reap(pid)
        self.thread.join()
        self.drain()

    def end_all(self):
        for pid in self.names:
            os.kill(pid, signal.SIGTERM)
        for pid in list(self.names):
            self.reap(pid)

    def drain(self):
        task = Task(self.folder, "drain", 0)
        with contextlib.closing(Log(task, 0)) as log:
            Lane(Worker(task, self.store), log, 0).drain()
        left = [key for key in (*DRAINED, *RULES) if self.store.len(key)]
        self.problems += [f"{key}: something is left" for key in left]


def logs_of(folder, prefix=""):
    names = sorted(os.listdir(folder))
    return [
        os.path.join(folder, name)
        for name in names
        if name.startswith(prefix) and name.endswith(".log")
    ]


def judge_folder(folder):
    """What a storm has left there, judged: the problems, and what there was to judge."""
    logs = []
    for path in logs_of(folder):
        with open(path, encoding="utf-8") as file:
            logs.append(list(parsed(file.read())))
    with open(os.path.join(folder, "storm.json"), encoding="utf-8") as file:
        told = json.load(file)
    rows, integrity = remains(os.path.join(folder, "queue.db"))
    problems, counts = judge(Evidence(logs, rows, integrity, RULES, told["forgets"]))
    return told["problems"] + problems, counts


def run(folder, *, seconds, processes, seed, plant=None, tick=lambda *_: None):
    """One round, and its judgement: problems and counts."""
    storm = Storm(folder, processes, seed, plant)
    storm.run(seconds, lambda spent: tick(spent, storm.counts))
    problems, counts = judge_folder(folder)
    return problems, counts + storm.counts


# -- the command


def report(counts, problems, **words):
    for name, value in words.items():
        print(f"{name:>17}  {value}")
    names = ("operations", "kills", "stops", "whole-storm kills", "compact", "refused", "cut off")
    for name in names:
        label = "compactions" if name == "compact" else name
        print(f"{label:>17}  {counts[name]:,}")
    print(f"{'violations':>17}  {len(problems):,}")
    for problem in problems[:SHOWN]:
        print(f"  {problem}")
    if len(problems) > SHOWN:
        print(f"  and {len(problems) - SHOWN:,} more")


def storm(folder, minutes, processes, seed, plant):
    """All rounds; the problems, and the counts."""
    rounds = max(1, round(minutes * 60 / ROUND_SECONDS))
    seconds = minutes * 60 / rounds
    problems, counts = [], Counter()
    console = Console(stderr=True)
    with Progress(
        BarColumn(40),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=minutes * 60)

        for number in range(rounds):

            def tick(spent, current, number=number, counts=counts):
                both = counts + current
                what = f"{both['kills']:,} kills, {both['stops']:,} stops"
                progress.update(bar, completed=number * seconds + spent, description=what)

            kept = os.path.join(folder, f"round-{number}")
            # Half of them in memory, where ten times as much happens in the same time.
            memory = MEMORY if number % 2 and os.path.isdir(MEMORY) else None
            place = tempfile.mkdtemp(prefix="sqlspace-storm-", dir=memory)
            try:
                found, counted = run(
                    place,
                    seconds=seconds,
                    processes=processes,
                    seed=f"{seed}/{number}",
                    plant=plant,
                    tick=tick,
                )
            except BaseException:
                shutil.rmtree(place)
                raise
            counts += counted
            problems += [f"round {number}: {problem}" for problem in found]
            if found:
                shutil.move(place, kept)
            else:
                shutil.rmtree(place)
    return problems, counts


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/storm", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10_000))
    parser.add_argument("--plant", choices=PLANTS, help="a bug, to see that it is found")
    parser.add_argument("--judge", metavar="FOLDER", help="judge again what a round has left")
    return parser.parse_args()


def main():
    given = arguments()
    logging.getLogger("sqlspace").addHandler(logging.NullHandler())
    logging.getLogger("sqlspace").propagate = False
    if given.judge:
        folder = os.path.join(os.environ.get("STORM_CALLER", ""), given.judge)
        problems, counts = judge_folder(folder)
        report(counts, problems, folder=folder)
        return int(bool(problems))
    # Some Pythons warn of a fork beside threads; that this is safe is what is tested here.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = tempfile.mkdtemp(prefix="sqlspace-storm-")
    try:
        problems, counts = storm(folder, given.minutes, given.processes, given.seed, given.plant)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        print("stopped", file=sys.stderr)
        return 130
    report(
        counts, problems, seed=given.seed, minutes=f"{given.minutes:g}", processes=given.processes
    )
    if problems:
        print(f"{'kept':>17}  {folder}; scripts/storm --judge {folder}/round-N")
    else:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
