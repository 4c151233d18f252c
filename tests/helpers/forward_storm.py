"""A kill storm for forwarding: a store, two forwarders, a server with a stream, a taker there.

    scripts/storm --forward --messages 50000 --kills 20 --seed 4

Forwarders and server get SIGKILL at random moments, and come back; forwarders are frozen for longer
than their leases. All is taken from the stream meanwhile, and the stream knows a message's id for
100 ms only, so nothing but the position tells what has been sent. In the end all that was pushed
was taken: each key's in its order, each once. Exit status 1: it was not.
"""

import argparse
import contextlib
import itertools
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
from collections import Counter

from nats_servers import NatsServer
from streams import Stream

import sqlspace

__all__ = ["PLANTS", "judged", "storm"]

LEASE = 0.4
WINDOW_NANOSECONDS = 100_000_000
NAME = "storm"
PATIENCE_SECONDS = 120.0
SHOWN = 10

# Bugs for the forwarders, to see that they are found.
PLANTS = {
    "no-position": """
async def _read(self, stream, key, entries):
    found = await read(self, stream, key, entries)
    return found._replace(names=frozenset())
endpoint.JetStreamSender._read, read = _read, endpoint.JetStreamSender._read
""",
    "no-order": """
wanted = forwarding.checked_lease
forwarding.checked_lease = lambda *given, ordered: wanted(*given, ordered=False)
""",
    "ack-first": """
send = endpoint.JetStreamSender.send
def acking(self, batch):
    self._store.ack_many(batch)
    return send(self, batch)
endpoint.JetStreamSender.send = acking
""",
}

WORKER = """
import logging, sys
import tenacity
import sqlspace
from sqlspace import forwarding
from sqlspace.jetstream import endpoint
path, url, keys, plant = sys.argv[1:]
logging.getLogger("sqlspace").addHandler(logging.NullHandler())
exec(plant)
store = sqlspace.open(path)
to = endpoint.Endpoint(url, stream={name!r}, patience=2)
sqlspace.forward(store, keys.split(), to, lease={lease}, wait=tenacity.wait_fixed(0.02))
"""


class Storm:
    """What works, and what befalls it.

    Args:
        folder: For the store.
        keys: Of the entries.
        seed: Of all that is random.
        plant: A bug for the forwarders.
    """

    def __init__(self, folder, keys, seed, plant=None):
        self.keys = [f"key{number}" for number in range(keys)]
        self.counts = Counter()
        self.pushed = Counter()
        self.taken = {key: {} for key in self.keys}  # by the seq in the stream
        self._random = random.Random(seed)
        self._path = os.path.join(folder, "queue.db")
        self._plant = PLANTS.get(plant, "")
        self._ended = threading.Event()
        self._failure = None

    def run(self, messages, kills):
        """All of it."""
        with contextlib.ExitStack() as stack:
            self._server = stack.enter_context(NatsServer())
            self._stream = Stream(self._server.url, NAME, duplicate_window=WINDOW_NANOSECONDS)
            stack.callback(self._stream.close)
            self._store = stack.enter_context(sqlspace.open(self._path, history=0))
            self._forwarders = [self._start(), self._start()]
            stack.callback(lambda: [self._kill(each) for each in self._forwarders])
            taker = threading.Thread(target=self._take, daemon=True)
            taker.start()
            for number in range(kills):
                self._push(messages * (number + 1) // (kills + 1))
                time.sleep(self._random.uniform(0.0, 0.3))
                self._strike()
            self._push(messages)
            ends = time.monotonic() + PATIENCE_SECONDS
            while any(self._store.len(key) for key in self.keys) and time.monotonic() < ends:
                time.sleep(0.01)
            self._ended.set()
            taker.join()
            if self._failure is not None:
                raise self._failure

    def _push(self, up_to):
        """More of each key, so that there are so many over all."""
        while (left := up_to - self.pushed.total()) > 0:
            key = self._random.choice(self.keys)
            number = self._random.randint(1, min(left, 400))
            first = self.pushed[key]
            self._store.push_many(key, [b"%d" % n for n in range(first, first + number)])
            self.pushed[key] += number

    def _start(self):
        source = WORKER.format(name=NAME, lease=LEASE)
        words = (self._path, self._server.url, " ".join(self.keys), self._plant)
        return subprocess.Popen(
            [sys.executable, "-c", source, *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def _kill(self, forwarder):
        forwarder.send_signal(signal.SIGKILL)
        forwarder.wait()

    def _strike(self):
        kind = self._random.choice(["forwarder", "forwarder", "server", "freeze", "both"])
        index = self._random.randrange(len(self._forwarders))
        if kind in ("server", "both"):
            self._server.kill()
            self.counts["server kills"] += 1
        if kind in ("forwarder", "both"):
            self._kill(self._forwarders[index])
            self.counts["forwarder kills"] += 1
        if kind in ("server", "both"):
            self._server.start()
        if kind in ("forwarder", "both"):
            self._forwarders[index] = self._start()
        if kind == "freeze":
            self._forwarders[index].send_signal(signal.SIGSTOP)
            time.sleep(1.5 * LEASE)
            self._forwarders[index].send_signal(signal.SIGCONT)
            self.counts["freezes"] += 1

    def _take(self):
        try:
            while not self._ended.is_set():
                self._take_all()
            self._take_all()
        except Exception as error:
            self._failure = error

    def _take_all(self):
        for key in self.keys:
            for message in self._stream.take(key):
                self.taken[key][message.seq] = message.payload


def judged(pushed, taken):
    """What is wrong with what was taken, by key: a list of sentences."""
    problems = []
    for key, messages in taken.items():
        numbers = [int(payload) for _, payload in sorted(messages.items())]
        counted = Counter(numbers)
        lost = [number for number in range(pushed[key]) if number not in counted]
        twice = [number for number, times in counted.items() if times > 1]
        moved = [after for before, after in itertools.pairwise(numbers) if after < before]
        for found, what in ((lost, "lost"), (twice, "sent twice"), (moved, "out of order")):
            if found:
                problems.append(f"{key}: {len(found):,} {what}, the first {found[0]}")
    return problems


def storm(messages, keys, kills, seed, plant=None):
    """One storm: what is wrong, and counts."""
    folder = tempfile.mkdtemp(prefix="sqlspace-storm-")
    one = Storm(folder, keys, seed, plant)
    begun = time.monotonic()
    try:
        one.run(messages, kills)
    finally:
        shutil.rmtree(folder)
    taken = sum(map(len, one.taken.values()))
    counts = {"messages": messages, "taken": taken, "keys": keys, **one.counts, "seed": seed}
    counts["seconds"] = round(time.monotonic() - begun, 1)
    return judged(one.pushed, one.taken), counts


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/storm --forward", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--keys", type=int, default=6)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10_000))
    parser.add_argument("--plant", choices=PLANTS, help="a bug, to see that it is found")
    given = parser.parse_args()
    logging.getLogger("sqlspace").addHandler(logging.NullHandler())
    problems, counts = storm(given.messages, given.keys, given.kills, given.seed, given.plant)
    print(json.dumps(counts))
    for problem in problems[:SHOWN]:
        print(problem)
    print(f"{len(problems)} violations")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
