"""A storm over JetStream: producers and takers killed and frozen, and their server and network too.

    scripts/storm --jetstream --minutes 5 --seed 4

A storm is a row of rounds, each with a server and a stream of its own: rage, a calm in which all is
mended and drained, and the judgement. Producers and takers are processes; some reach the server
through proxies. They get SIGKILL, or SIGSTOP; the server gets SIGKILL and comes back on the same
files; connections are cut or frozen for longer than the patience. Every worker notes what it begins
and what came of it, each in one write to a log of its own. Judged is:

- What `out` has acknowledged is returned by one call, and never by two.
- A taker that was killed inside `in_` may have consumed one entry of that key, and no more.
- An `out` that said that it may have happened did, once, or did not.
- What came of a call is a value or an error of ours.
- What one producer has added under a key, each taker gets in order, unless a taker failed or died
  meanwhile: then an entry may have been given back to its place.

The constants that wait for the dead are a tenth of the real ones here, so that takers that live are
given up for dead too. Exit status 1: there were violations.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict

from nats_servers import NatsServer, Proxy

from sqlspace import BackendError, CanceledError, ClosedError, Context, DeadlineError
from sqlspace.jetstream import AsyncJetStream, JetStream, link, receipts

__all__ = ["PLANTS", "judge", "run"]

KEYS = ("a", "b.c", "d e")
STREAM = "storm"
PATIENCE = 1.0
ROUND_SECONDS = 20.0
CALM_SECONDS = 90.0
SHOWN = 20


def hasten():
    """Have everything that waits for the dead wait a tenth as long."""
    receipts.TRUST_SECONDS = 0.5
    receipts.RECEIPT_SECONDS = 6.0
    receipts.HELP_SECONDS = 3.0
    receipts.SWEEP_SECONDS = 1.5


# -- bugs to plant: a judge that doesn't find them is worth nothing


def return_without_claim():
    async def claim(self, key, message, seen):
        return receipts.Claim(key, message, self._link.new_id())

    receipts.Receipts.claim = claim


def keep_what_is_in_doubt():
    receipts.Receipts.give_back = lambda *_, **__: None


def acknowledge_first():
    publish = link.Link.publish

    async def early(self, *arguments, **more):
        self.spawn(publish(self, *arguments, **more))
        return 0

    link.Link.publish = early


def last_first():
    async def last(self, stream, subject, seq, *, direct, doing):
        found = await self.last_message(stream, subject, doing=doing)
        return None if found is None or found.seq < seq else found

    AsyncJetStream._from = lambda self, key, seq: last(
        self.link,
        self._subjects.entries,
        self._subjects.entry(key),
        seq,
        direct=False,
        doing="look",
    )


PLANTS = {
    plant.__name__.replace("_", "-"): plant
    for plant in (
        return_without_claim,
        keep_what_is_in_doubt,
        acknowledge_first,
        last_first,
    )
}


# -- the workers


def log_of(folder, name):
    return os.path.join(folder, f"{name}.log")


class Log:
    """Lines of JSON with the time, each in one write: what a kill cuts off was not there."""

    def __init__(self, folder, name):
        self._file = os.open(log_of(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words):
        os.write(self._file, f"{json.dumps([time.monotonic(), *words])}\n".encode())

    def close(self):
        os.close(self._file)


def work(role, folder, name, url, seed, plant, cancels):
    """What a worker's process does, until SIGTERM."""
    hasten()
    if plant:
        PLANTS[plant]()
    over = []
    signal.signal(signal.SIGTERM, lambda *_: over.append(True))
    logging.getLogger("sqlspace").addHandler(logging.NullHandler())
    random_ = random.Random(seed)
    log = Log(folder, name)
    space = None
    while space is None and not over:
        with contextlib.suppress(BackendError):
            space = JetStream(url, stream=STREAM, patience=PATIENCE)
    log.write("R")
    numbers = Counter()
    while not over:
        key = random_.choice(KEYS)
        try:
            if role == "producer":
                numbers[key] += 1
                value = [name, numbers[key]]
                log.write("B", key, value)
                space.out(key, value)
                log.write("A", key, value)
                time.sleep(random_.choice((0, 0, 0.005)))
            else:
                log.write("I", key)
                if cancels and random_.random() < 0.3:
                    context = Context()
                    threading.Timer(random_.uniform(0, 0.03), context.cancel).start()
                    value = space.in_(key, context=context)
                elif random_.random() < 0.2:
                    value = space.inp(key)
                else:
                    value = space.in_(key, random_.choice((0.012, 0.02, 0.2, 2.0)))
                log.write("D" if value is None else "T", key, value)
        except (DeadlineError, CanceledError):
            log.write("D", key)
        except (BackendError, ClosedError) as error:
            log.write("U" if role == "producer" else "F", key, str(error))
        except Exception as error:
            log.write("X", key, repr(error))
    if space is not None:
        log.write("C")
        space.close()
        log.write("E")
    os._exit(0)


# -- what befalls them


class Storm:
    """One round."""

    def __init__(self, folder, seed, plant=None):
        self.folder, self.plant, self.seed = folder, plant, seed
        self.random = random.Random(seed)
        self.server = NatsServer().start()
        self.proxies = [Proxy(self.server.port) for _ in range(2)]
        self.proxies[0].delay = 0.008  # two answers take about as long as the shortest timeout
        self.counts = Counter()
        self.started = 0
        self.workers = {}  # by name: the process, its role
        self.mending = []  # when, and how, something is mended
        self.problems = []
        # Where no taker is killed, none may have consumed anything.
        self.kills_takers = not plant and self.random.random() < 0.5
        # Where takes are canceled, so much is given back that there is not much order to judge.
        self.cancels = "cancels" if plant == "keep-what-is-in-doubt" else ""
        if not plant and self.random.random() < 0.5:
            self.cancels = "cancels"

    def run(self, seconds, tick=lambda _: None):
        """Rage for so long, and calm down; the problems."""
        try:
            # Whoever comes first makes the streams.
            JetStream(self.server.url, stream=STREAM).close()
            self.rage(seconds, tick)
            self.calm()
        finally:
            for process, _ in self.workers.values():
                process.kill()
                process.wait()
            for proxy in self.proxies:
                proxy.close()
            self.server.close()
        return self.problems

    def start(self, role):
        self.started += 1
        name = f"{role[0]}{self.started}"
        url = self.random.choice([self.server.url, *(proxy.url for proxy in self.proxies)])
        words = [role, self.folder, name, url, f"{self.seed}/{name}", self.plant or ""]
        words.append(self.cancels)
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.workers[name] = process, role
        Log(self.folder, name).close()

    def rage(self, seconds, tick):
        self.man()
        while not all(os.path.getsize(log_of(self.folder, name)) for name in self.workers):
            time.sleep(0.01)
        began = now = time.monotonic()
        while now < began + seconds:
            time.sleep(self.random.uniform(0.05, 0.4))
            now = time.monotonic()
            self.mend(now)
            self.strike(now)
            self.man()
            tick(now - began)
        self.mend(float("inf"))

    def man(self):
        """Start those that are missing."""
        for role, number in (("producer", 2), ("taker", 4)):
            while sum(role == other for _, other in self.workers.values()) < number:
                self.start(role)

    def strike(self, now):
        what = self.random.random()
        longer = now + PATIENCE * self.random.choice((0.1, 0.5, 2.0, 4.0))
        name, (process, role) = self.random.choice(list(self.workers.items()))
        if what < 0.25 and (role == "producer" or self.kills_takers):
            process.kill()
            process.wait()
            del self.workers[name]
            self.counts["kills"] += 1
            Log(self.folder, name).write("K")
        elif what < 0.45 and role == "taker":
            process.send_signal(signal.SIGSTOP)
            self.mending.append((longer, lambda: process.send_signal(signal.SIGCONT)))
            self.counts["stops"] += 1
        elif what < 0.55 and self.server.process is not None:
            self.server.kill()
            self.mending.append((longer, self.server.start))
            self.counts["server kills"] += 1
        elif what < 0.8:
            proxy = self.random.choice(self.proxies)
            self.random.choice((proxy.cut, proxy.freeze))()
            self.mending.append((longer, proxy.mend))
            self.counts["cuts"] += 1

    def mend(self, now):
        for end, step in sorted(self.mending, key=lambda one: one[0]):
            if end <= now:
                step()
        self.mending = [one for one in self.mending if one[0] > now]

    def calm(self):
        """End the workers, and take all that is left."""
        for process, _ in self.workers.values():
            process.send_signal(signal.SIGTERM)
        for name, (process, _) in self.workers.items():
            if process.wait() not in (0, -signal.SIGTERM):  # it had only just begun
                self.problems.append(f"{name} ended with {process.returncode}")
        self.workers.clear()
        hasten()
        log = Log(self.folder, "drain")
        deadline = time.monotonic() + CALM_SECONDS
        with contextlib.closing(log), JetStream(self.server.url, stream=STREAM) as space:
            while any(space.len(key) for key in KEYS):
                for key in KEYS:
                    while (value := space.inp(key)) is not None:
                        log.write("T", key, value)
                if time.monotonic() > deadline:
                    self.problems.append("something is left that nobody can take")
                    break
                time.sleep(0.1)


# -- the judgement


def judge(folder):
    """What the logs say: the problems, and what there was to judge."""
    problems, counts = [], Counter()
    began, acknowledged, taken = {}, {}, defaultdict(list)
    lost = Counter()  # by key: takers that were killed inside in_, or could not settle
    troubles = []  # of a key, when a take failed and may have given an entry back
    for file in sorted(os.listdir(folder)):
        name = file.removesuffix(".log")
        inside = None
        with open(os.path.join(folder, file), encoding="utf-8") as lines:
            for line in lines:
                when, kind, *words = json.loads(line)
                counts[kind] += 1
                if kind in {"T", "D", "F", "K"} and inside is not None:
                    if kind != "T":
                        # To give back takes a while, and longer if the server is away.
                        until = when + (1.0 if kind == "D" else 20.0)
                        troubles.append((inside[1], inside[0], until))
                    if kind == "K":
                        lost[inside[1]] += 1
                    inside = None
                match kind, *words:
                    case "B", key, value:
                        began[key, *value] = when
                    case "A", key, value:
                        acknowledged[key, *value] = when
                    case "I", key:
                        inside = when, key
                    case "T", key, [producer, number]:
                        taken[key, producer, number].append((name, when))
                    case "X", _, text:
                        problems.append(f"{name}: {text}")
    missing = Counter()
    for entry, times in taken.items():
        if len(times) > 1:
            problems.append(f"{entry} was taken {len(times)} times, by {times}")
        if entry not in began:
            problems.append(f"{entry} was taken, and never added")
    for entry in acknowledged:
        if entry not in taken:
            missing[entry[0]] += 1
            counts["consumed"] += 1
    for key, number in missing.items():
        if number > lost[key]:
            problems.append(
                f"{key}: {number} are lost, and {lost[key]} takers were killed with one"
            )
    problems += _out_of_order(taken, acknowledged, troubles)
    return problems, counts


def _out_of_order(taken, acknowledged, troubles):
    """Those that one taker got after later ones, while no taker had trouble since."""
    by_taker = defaultdict(list)
    for (key, producer, number), times in taken.items():
        for name, when in times:
            if (key, producer, number) in acknowledged:
                by_taker[name, key, producer].append((when, number))
    for (name, key, producer), found in by_taker.items():
        found.sort()
        highest = 0
        for when, number in found:
            if number < highest:
                since = acknowledged[key, producer, number]
                if not any(
                    of == key and start <= when and end >= since for of, start, end in troubles
                ):
                    yield f"{name} took {number} of {producer} in {key!r} after {highest}"
            highest = max(highest, number)


def run(folder, *, seconds, seed, plant=None, tick=lambda *_: None):
    """One round, and its judgement: problems and counts."""
    storm = Storm(folder, seed, plant)
    problems = storm.run(seconds, lambda spent: tick(spent, storm.counts))
    found, counts = judge(folder)
    return problems + found, counts + storm.counts


# -- the command


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/storm --jetstream", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10_000))
    parser.add_argument("--plant", choices=PLANTS, help="a bug, to see that it is found")
    given = parser.parse_args()
    logging.getLogger("sqlspace").addHandler(logging.NullHandler())
    logging.getLogger("sqlspace").propagate = False
    rounds = max(1, round(given.minutes * 60 / ROUND_SECONDS))
    problems, counts = [], Counter()
    folder = tempfile.mkdtemp(prefix="sqlspace-jetstorm-")
    for number in range(rounds):
        place = os.path.join(folder, f"round-{number}")
        os.mkdir(place)
        found, counted = run(
            place,
            seconds=given.minutes * 60 / rounds,
            seed=f"{given.seed}/{number}",
            plant=given.plant,
        )
        counts += counted
        problems += [f"round {number}: {problem}" for problem in found]
        if not found:
            shutil.rmtree(place)
    for name, value in (("seed", given.seed), ("minutes", f"{given.minutes:g}")):
        print(f"{name:>17}  {value}")
    for name, kind in (("added", "A"), ("in doubt", "U"), ("taken", "T"), ("failed takes", "F")):
        print(f"{name:>17}  {counts[kind]:,}")
    for name in ("kills", "stops", "server kills", "cuts", "consumed"):
        print(f"{name:>17}  {counts[name]:,}")
    print(f"{'violations':>17}  {len(problems):,}")
    for problem in problems[:SHOWN]:
        print(f"  {problem}")
    if problems:
        print(f"{'kept':>17}  {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    sys.exit(main())
