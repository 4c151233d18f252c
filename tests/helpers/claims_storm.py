"""Workers that claim, and a storm that kills and freezes them; what they leave is for the proof.

`run` takes its parameters as arguments, so that a campaign can run it for hours:

    python tests/helpers/claims_storm.py SECONDS ENTRIES SEED …
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter

import apsw
from claims_proof import FOLLOW, Evidence, Row, Rule, judge

import sqlspace

LEASE = 0.25
WORK_SECONDS = 0.003  # in the mean
RULES = {
    "plain/0": Rule(ordered=False, max_attempts=None),
    "plain/1": Rule(ordered=False, max_attempts=None),
    "tries": Rule(ordered=False, max_attempts=4),
    "turn/0": Rule(ordered=True, max_attempts=None),
    "turn/1": Rule(ordered=True, max_attempts=None),
    "turn/tries": Rule(ordered=True, max_attempts=3),
}
# Where there are turns, a key goes no faster than one entry at a time.
SHARES = {
    "plain/0": 0.34,
    "plain/1": 0.34,
    "tries": 0.2,
    "turn/0": 0.05,
    "turn/1": 0.05,
    "turn/tries": 0.02,
}
POISON = "poison"  # no handler can do it
SELECT_ROWS = """
SELECT seq, key, state, attempts, lower(hex(token)), taken_no, CAST(payload AS TEXT), headers
  FROM sqlspace_entries
"""

SELECT_LEFT = """
SELECT 1 FROM sqlspace_entries WHERE state < 3 AND key <> ? AND key NOT LIKE '%/dead' LIMIT 1
"""


class Failed(Exception):
    """What a handler raises on purpose."""


# -- a worker


def offset():
    """The wall clock less the monotonic one, in nanoseconds."""
    while True:
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        if after - before < 50_000:  # not frozen in between
            return wall - (before + after) // 2


class Worker:
    """Claims, works, fails, settles, and logs it all.

    Args:
        path: Of the store.
        log: Of its own, that isn't there yet.
        seed: Of its whims.
        draining: Whether it ends when all is done, and fails no more than it must; otherwise it
            goes on until SIGTERM.
    """

    def __init__(self, path, log, seed, *, draining):
        self.log = os.open(log, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND)
        self.random = random.Random(seed)
        self.draining = draining
        self.over = draining
        self.path = path

    def run(self):
        """Until it is killed, or told to end."""
        signal.signal(signal.SIGTERM, self.end)
        self.write("wall", offset())
        with sqlspace.open(self.path, sync=False, history=None) as store:
            self.store = store
            ways = (self.as_a_block, self.by_hand, self.together, self.many)
            while not self.over or (self.draining and any(map(store.len, RULES))):
                key = self.random.choice(list(RULES))
                self.random.choice(ways[: 3 if RULES[key].ordered else 4])(key)

    def end(self, *_):
        self.over = True

    def write(self, *words):
        os.write(self.log, (" ".join(map(str, words)) + "\n").encode())

    def chance(self, part):
        return not self.draining and self.random.random() < part

    def is_bad(self, delivery):
        """What its handler finds, after some work."""
        if not self.draining:
            time.sleep(min(self.random.expovariate(1 / WORK_SECONDS), LEASE / 4))
        return delivery.payload.decode().endswith(POISON) or self.chance(0.04)

    # -- the ways to work

    def as_a_block(self, key):
        delivery = self.claim(key)
        if delivery is None:
            return
        way = error = None
        try:
            with delivery:
                way = "nack" if self.is_bad(delivery) else "ack"
                if self.chance(0.01):
                    time.sleep(LEASE * 1.5)  # it is renewed meanwhile
                self.begin(way, [delivery])
                if way == "nack":
                    raise Failed
        except Failed:  # whether the nack met a LeaseError, the end of a block doesn't say
            error = None if delivery._settled else sqlspace.LeaseError()
        except sqlspace.LeaseError as lost:
            error = lost
            if way is None:  # it was lost before the block began
                way = "ack"
                self.begin(way, [delivery])
        self.ended(way, [delivery], error)

    def by_hand(self, key):
        delivery = self.claim(key)
        if delivery is None or self.chance(0.01):  # forgotten: its lease runs out
            return
        if self.chance(0.01):
            time.sleep(LEASE * self.random.uniform(0.5, 1.5))
        self.settle(delivery)

    def settle(self, delivery):
        if self.is_bad(delivery):
            delay = self.random.choice((0.0, 0.0, 0.02))
            self.do("nack", [delivery], lambda: delivery.nack(delay), delay)
        else:
            self.do("ack", [delivery], delivery.ack)

    def together(self, key):
        delivery = self.claim(key)
        if delivery is None:
            return
        if self.is_bad(delivery):

            def undone():
                with self.store.transaction() as transaction:
                    transaction.push(FOLLOW, b"0")
                    transaction.ack(delivery)
                    raise Failed

            self.do("undone", [delivery], undone)
            self.settle(delivery)
            return

        def ack_and_push():
            with self.store.transaction() as transaction:
                seq = transaction.push(FOLLOW, b"%d" % delivery.seq)
                transaction.ack(delivery)
            return seq

        self.do("tx", [delivery], ack_and_push)

    def many(self, key):
        deliveries = self.claim_many(key, self.random.randint(2, 20))
        good = [each for each in deliveries if not self.is_bad(each)]
        if self.chance(0.02):
            time.sleep(LEASE * self.random.uniform(0.5, 1.5))
        for each in deliveries:
            if each not in good:
                self.settle(each)
        if good and not self.do("ack", good, lambda: self.store.ack_many(good)):
            for each in good:  # none of them was acked, so each may be
                self.settle(each)

    # -- what is logged

    def claim(self, key):
        rule = RULES[key]
        self.write("B", time.monotonic_ns(), "claim", 1, key)
        try:
            delivery = self.store.claim(
                key, 0.02, lease=LEASE, max_attempts=rule.max_attempts, ordered=rule.ordered
            )
        except sqlspace.DeadlineError:
            delivery = None
        self.claimed([] if delivery is None else [delivery])
        return delivery

    def claim_many(self, key, limit):
        self.write("B", time.monotonic_ns(), "claim", limit, key)
        found = self.store.claim_many(key, limit, lease=LEASE, max_attempts=RULES[key].max_attempts)
        self.claimed(found)
        return found

    def claimed(self, deliveries):
        ended = time.monotonic_ns()
        items = [
            f"{token(each)} {each.seq} {each.attempts} {ends(each)} {each.payload.decode()}"
            for each in deliveries
        ]
        self.write("E", ended, "claim", ",".join(items))

    def begin(self, way, deliveries, delay=0.0):
        self.write("B", time.monotonic_ns(), way, int(delay * 1e9), *map(token, deliveries))

    def ended(self, way, deliveries, error, follow=0):
        ended = time.monotonic_ns()
        result = "ok" if error is None else "lost"
        self.write("E", ended, way, result, follow, *map(ends, deliveries))

    def do(self, way, deliveries, step, delay=0.0):
        """Settle, and log that; whether it was done."""
        self.begin(way, deliveries, delay)
        error = follow = None
        try:
            follow = step()
        except (sqlspace.LeaseError, Failed) as caught:
            error = caught if isinstance(caught, sqlspace.LeaseError) else None
        self.ended(way, deliveries, error, follow or 0)
        return error is None


def token(delivery):
    return delivery._grant.token.hex()


def ends(delivery):
    """When its lease ends, as far as it knows, on the monotonic clock."""
    return delivery._grant.deadline * 1000 - offset()


# -- the storm


class Storm:
    """Processes that work, and what befalls them.

    Args:
        folder: For the store and the logs.
        processes: How many work at a time.
        seed: Of all that is random.
    """

    def __init__(self, folder, processes, seed):
        self.path = os.path.join(folder, "queue.db")
        self.folder = folder
        self.random = random.Random(seed)
        self.processes = processes
        self.seed = seed
        self.logs = []
        self.pids = {}  # with the time until which it is frozen
        self.counts = Counter()
        self.pushed = {}

    def push(self, entries):
        with sqlspace.open(self.path, sync=False, history=None) as store:
            for key, share in SHARES.items():
                payloads = [
                    f"{n}-{POISON if self.random.random() < 0.03 and self.may_fail(key) else 'x'}"
                    for n in range(int(entries * share))
                ]
                seqs = store.push_many(key, [each.encode() for each in payloads])
                self.pushed.update(
                    (seq, (key, each)) for seq, each in zip(seqs, payloads, strict=True)
                )

    def may_fail(self, key):
        return RULES[key].max_attempts is not None

    def start(self, *, draining=False):
        """One more worker."""
        log = os.path.join(self.folder, f"log-{len(self.logs)}")
        self.logs.append(log)
        worker_seed = self.random.random()
        pid = os.fork()
        if pid == 0:
            code = 1
            worker = None
            try:
                worker = Worker(self.path, log, worker_seed, draining=draining)
                worker.run()
                code = 0
            except BaseException:
                if worker is not None:
                    worker.write("error", repr(traceback.format_exc()))
            finally:
                os._exit(code)
        self.pids[pid] = 0.0

    def rage(self, seconds):
        """Kill and freeze, and start anew, until the time is over or all is done."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self.is_work_left():
            self.rage_a_while()
        self.thaw(float("inf"))

    def rage_a_while(self):
        for _ in range(64):
            while len(self.pids) < self.processes:
                self.start()
            time.sleep(self.random.uniform(0.0, 0.05))
            self.thaw(time.monotonic())
            what = self.random.random()
            if what < 0.01:
                self.kill(*self.pids)
                self.counts["kills of all"] += 1
            elif what < 0.4:
                self.kill(self.random.choice(list(self.pids)))
            elif what < 0.5:
                self.freeze(self.random.choice(list(self.pids)))

    def is_work_left(self):
        connection = apsw.Connection(self.path, apsw.SQLITE_OPEN_READONLY)
        try:
            return bool(connection.execute(SELECT_LEFT, (FOLLOW,)).fetchall())
        finally:
            connection.close()  # before the next fork

    def kill(self, *pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            del self.pids[pid]
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            self.counts["kills" if code == -signal.SIGKILL else "failures"] += 1

    def freeze(self, pid):
        if not self.pids[pid]:
            os.kill(pid, signal.SIGSTOP)
            self.pids[pid] = time.monotonic() + LEASE * self.random.uniform(1.1, 3)
            self.counts["freezes"] += 1

    def thaw(self, now):
        for pid, until in self.pids.items():
            if until and until <= now:
                os.kill(pid, signal.SIGCONT)
                self.pids[pid] = 0.0

    def join(self):
        """All end by themselves, and well."""
        codes = []
        for pid in list(self.pids):
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            del self.pids[pid]
        assert codes == [0] * len(codes), f"workers ended with {codes}; see {self.folder}"

    def calm(self):
        """End the workers, and have others do what is left."""
        for pid in self.pids:
            os.kill(pid, signal.SIGTERM)
        self.join()
        for _ in range(4):
            self.start(draining=True)
        self.join()

    def evidence(self):
        with sqlspace.open(self.path, sync=False, history=None) as store:
            assert not any(map(store.len, RULES)), "drained"
        connection = apsw.Connection(self.path, apsw.SQLITE_OPEN_READONLY)
        try:
            integrity = connection.pragma("integrity_check")
            rows = [Row(*row) for row in connection.execute(SELECT_ROWS)]
        finally:
            connection.close()
        return Evidence(RULES, self.pushed, [lines(log) for log in self.logs], rows, integrity)


def lines(log):
    """The whole lines of a log: the last one may have been cut off."""
    if not os.path.exists(log):  # killed before it began
        return []
    with open(log, encoding="utf-8") as file:
        return file.read().split("\n")[:-1]


def run(folder, *, seconds, processes, entries, seed):
    """A storm of so many seconds, its calm, and the judgement: problems and counts."""
    storm = Storm(folder, processes, seed)
    try:
        storm.push(entries)
        storm.rage(seconds)
        storm.calm()
    finally:
        for pid in storm.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    problems, counts = judge(storm.evidence())
    return problems, {**storm.counts, **counts}


def main(seconds, entries, *seeds):
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            problems, counts = run(
                folder, seconds=float(seconds), processes=8, entries=int(entries), seed=int(seed)
            )
            print(f"seed {seed}, {time.monotonic() - began:.1f} s:", counts, flush=True)
            for problem in problems[:20]:
                print("   ", problem)


if __name__ == "__main__":
    main(*sys.argv[1:])
