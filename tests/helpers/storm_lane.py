"""What a thread of a storm's worker does: every verb of a store, all of it logged; see `history`.

Each kind of key has its own verbs, so that the judge can be exact.
"""

import contextlib
import itertools
import random
import time
from collections import deque

from history import do
from leases import FOLLOW, Rule, follow_up

import sqlspace

__all__ = ["DRAINED", "LEASE", "QUEUES", "RULES", "Lane", "offset"]

LEASE = 0.25
WORK_SECONDS = 0.002  # in the mean
FULL = 200  # entries of a key
RULES = {
    "plain/0": Rule(ordered=False, max_attempts=None),
    "plain/1": Rule(ordered=False, max_attempts=None),
    "tries": Rule(ordered=False, max_attempts=4),
    "turn": Rule(ordered=True, max_attempts=None),
    "turn/tries": Rule(ordered=True, max_attempts=3),
}
QUEUES = ["queue/0", "queue/1", "queue/2"]
TIMED, WIPED, PUT, ONCE = "timed", "wiped", "put", "once"
MOVE_FROM, MOVE_TO, KEPT = "move/from", "move/to", "once/kept"  # the latter two keep what they get
DRAINED = [*QUEUES, TIMED, WIPED, PUT, ONCE, MOVE_FROM]
POISON = "!"  # no handler can do it
DEDUPES_SECONDS = 0.1  # so long, all workers push with the same few ids
PLAIN = [key for key, rule in RULES.items() if rule == Rule(ordered=False, max_attempts=None)]


class Failed(Exception):
    """What a handler raises on purpose."""


def offset():
    """The wall clock less the monotonic one, in nanoseconds."""
    while True:
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        if after - before < 50_000:  # not frozen in between
            return wall - (before + after) // 2


class Lane:
    """One thread's work."""

    def __init__(self, worker, log, seed):
        self.worker, self.log, self.store = worker, log, worker.store
        self.task = worker.task
        self.random = random.Random(seed)
        self.pushed = 0
        self.aside = deque()  # deliveries that are settled late, and when
        forgets = self.task.history is not None
        self.weights = {
            self.push: 14,
            self.take: 16,
            self.peek: 3,
            self.move: 4,
            self.put: 2,
            self.take_put: 2,
            self.wipe: 4,
            self.time: 4,
            self.push_once: 5,
            self.push_work: 6,
            self.work: 20,
            self.compact: 0.1 if forgets else 0,
        }
        if self.task.draining:
            self.weights = {self.work: 1}

    def run(self):
        """Until it is told to end, or what it drains is empty."""
        while not self.worker.over.is_set():
            self.worker.leave_if_orphaned()
            if self.task.draining and not any(map(self.store.len, RULES)):
                break
            self.step()

    def step(self):
        """One operation, or a few that belong together."""
        if self.aside and self.aside[0][0] < time.monotonic():
            _, late = self.aside.popleft()
            self.settle_by("ack", [late], late.ack)
        self.random.choices(list(self.weights), list(self.weights.values()))[0]()

    def chance(self, part):
        return not self.task.draining and self.random.random() < part

    def payload(self, mark=""):
        self.pushed += 1
        return f"{self.log.name}.{self.pushed}{mark}"

    def do(self, step, what, *given, result=lambda _: None, refused=(sqlspace.BusyError,)):
        return do(self.log.write, step, what, *given, result=result, refused=refused)

    # -- pushing and pulling

    def push(self, key=None, **options):
        """Of one, or of several at once; `options` are in seconds."""
        key = key or self.random.choice([*QUEUES, MOVE_FROM])
        many = self.random.random() < 0.12 and "dedupe" not in options
        payloads = [self.payload() for _ in range(self.random.randint(2, 8) if many else 1)]
        told = {
            name: value if name == "dedupe" else int(value * 1e9) for name, value in options.items()
        }

        def step():
            if many:
                return self.store.push_many(key, [each.encode() for each in payloads], **options)
            return [self.store.push(key, payloads[0].encode(), **options)]

        self.do(step, "push", key, payloads, told, result=lambda seqs: seqs)

    def take(self, keys=None):
        keys = keys or self.random.sample(QUEUES, 3)
        timeout = self.random.choice((0.0, 0.005, 0.02))
        way = self.random.randrange(4)
        key, limit = keys[0], 1
        if way == 0:
            return self.taken(keys, 1, lambda: self.any_of(keys, timeout))
        if way == 1:
            limit = self.random.randint(1, 6)
            return self.taken([key], limit, lambda: self.store.pull_many(key, limit))
        if way == 2:
            return self.taken([key], 1, lambda: self.some(self.store.pullp(key)))
        return self.taken([key], 1, lambda: self.waited(key, timeout))

    def taken(self, keys, limit, step):
        return self.do(
            step,
            *("take", keys, limit),
            result=lambda found: [
                each if isinstance(each, tuple) else (keys[0], each.decode()) for each in found
            ],
        )

    def any_of(self, keys, timeout):
        try:
            key, payload = self.store.pull_any(keys, timeout)
        except sqlspace.DeadlineError:
            return []
        return [(key, payload.decode())]

    def waited(self, key, timeout):
        try:
            return [self.store.pull(key, timeout)]
        except sqlspace.DeadlineError:
            return []

    def some(self, payload):
        return [] if payload is None else [payload]

    def peek(self):
        key = self.random.choice(DRAINED)
        self.do(
            lambda: self.some(self.store.peek(key)),
            *("peek", [key]),
            result=lambda found: [(key, each.decode()) for each in found],
        )

    def move(self):
        """Take one and push another, in one transaction."""
        payload, undoes = self.payload(), self.random.random() < 0.2

        def step():
            with contextlib.suppress(Failed), self.store.transaction() as together:
                taken = together.pullp(MOVE_FROM)
                if taken is None:
                    raise Failed
                seq = together.push(MOVE_TO, payload.encode())
                self.log.write(["N", taken.decode()])
                if undoes:
                    raise Failed
            return None if undoes or taken is None else seq

        self.do(
            step,
            *("unmove" if undoes else "move", MOVE_FROM, MOVE_TO, payload),
            result=lambda seq: seq,
        )

    def drain(self):
        """Take all that stands ready, or is about to."""
        for key in DRAINED:
            while self.drain_some(key) or self.store.len(key):
                pass

    def drain_some(self, key):
        return self.taken([key], 1000, lambda: self.store.pull_many(key, 1000))

    def put(self):
        payload = self.payload()
        step = lambda: self.store.put(PUT, payload.encode())  # noqa: E731  # as short as its use
        self.do(step, "put", PUT, payload, result=lambda seq: seq)

    def take_put(self):
        self.take([PUT])

    def wipe(self):
        if self.random.random() < 0.1:
            self.do(lambda: self.store.clear(WIPED), "clear", WIPED, result=lambda count: count)
        elif self.random.random() < 0.5:
            self.push(WIPED)
        else:
            self.take([WIPED])

    def time(self):
        if self.random.random() < 0.5:
            return self.take([TIMED])
        options = {}
        if self.random.random() < 0.5:
            options["delay"] = self.random.uniform(0.001, 0.05)
        if self.random.random() < 0.5:
            options["ttl"] = self.random.uniform(0.06, 0.3)
        return self.push(TIMED, **options)

    def push_once(self):
        """With an id that others push with as well, just now."""
        key = self.random.choice((ONCE, KEPT))
        if key == ONCE and self.random.random() < 0.4:
            return self.take([ONCE])
        moment = int(time.monotonic() / DEDUPES_SECONDS)
        return self.push(key, dedupe=f"{moment}/{self.random.randrange(4)}")

    def compact(self):
        self.do(self.store.compact, "compact")

    # -- leases

    def push_work(self):
        key = self.random.choice(list(RULES))
        mark = POISON if RULES[key].max_attempts and self.random.random() < 0.05 else ""
        payload = self.payload(mark)
        self.do(
            lambda: [self.store.push(key, payload.encode(), max_len=FULL, timeout=0)],
            *("push", key, [payload], {}),
            result=lambda seqs: seqs,
            refused=(sqlspace.BusyError, sqlspace.DeadlineError),
        )

    def work(self):
        key = self.random.choice(list(RULES))
        ways = [self.as_a_block, self.by_hand, self.together, self.in_a_row]
        if not RULES[key].ordered:
            ways.append(self.many)
        self.random.choice(ways)(key)

    def is_bad(self, delivery):
        """What its handler finds, after some work."""
        if self.chance(0.05):
            time.sleep(self.random.uniform(0.0, LEASE * 0.8))
        elif not self.task.draining:
            time.sleep(self.random.expovariate(1 / WORK_SECONDS))
        return delivery.payload.decode().endswith(POISON) or self.chance(0.04)

    def as_a_block(self, key):
        for delivery in self.claim(key):
            self.run_block(delivery)

    def in_a_row(self, key):
        """By `consume`, until there is nothing for a moment."""
        rule = RULES[key]
        context = sqlspace.Context(timeout=self.random.uniform(0.0, 0.03))
        deliveries = self.store.consume(
            key, lease=LEASE, max_attempts=rule.max_attempts, ordered=rule.ordered, context=context
        )
        while delivery := self.claimed([key], 1, lambda: list(itertools.islice(deliveries, 1))):
            self.run_block(*delivery)

    def run_block(self, delivery):
        way, result = None, "ok"
        try:
            with delivery:
                way = "nack" if self.is_bad(delivery) else "ack"
                if self.chance(0.01):
                    time.sleep(LEASE * 1.5)  # it is renewed meanwhile
                self.begin(way, [delivery])
                if way == "nack":
                    raise Failed
        except Failed:  # what hindered the nack, the end of a block doesn't say
            result = "ok" if delivery._settled else "no"
        except sqlspace.BusyError:
            result = "no"
        except sqlspace.LeaseError:
            result = "lost"
            if way is None:  # before the block began
                way = "ack"
                self.begin(way, [delivery])
        self.ended([delivery], result)

    def by_hand(self, key):
        for delivery in self.claim(key):
            if self.chance(0.01):  # forgotten: its lease runs out
                return
            if self.chance(0.05):
                lease = self.random.uniform(0.5, 2) * LEASE
                self.settle_by("extend", [delivery], lambda: delivery.extend(lease), lease)  # noqa: B023
            if self.chance(0.5):
                ripe = time.monotonic() + LEASE * self.random.uniform(0.5, 2)
                self.aside.append((ripe, delivery))
            else:
                self.settle(delivery)

    def settle(self, delivery):
        if self.is_bad(delivery):
            delay = self.random.choice((0.0, 0.0, 0.02))
            self.settle_by("nack", [delivery], lambda: delivery.nack(delay), delay)
        else:
            self.settle_by("ack", [delivery], delivery.ack)

    def together(self, key):
        for delivery in self.claim(key):
            payload = follow_up(delivery.seq, token(delivery)).encode()
            undoes = self.is_bad(delivery)

            def step():
                with self.store.transaction() as transaction:
                    seq = transaction.push(FOLLOW, payload)  # noqa: B023
                    transaction.ack(delivery)  # noqa: B023
                    if undoes:  # noqa: B023
                        raise Failed
                return seq

            self.settle_by("undone" if undoes else "tx", [delivery], step)
            if undoes:
                self.settle(delivery)

    def many(self, key):
        limit = self.random.randint(2, 20)
        rule = RULES[key]
        deliveries = self.claimed(
            [key],
            limit,
            lambda: self.store.claim_many(key, limit, lease=LEASE, max_attempts=rule.max_attempts),
        )
        good = [each for each in deliveries if not self.is_bad(each)]
        if self.chance(0.02):
            time.sleep(LEASE * self.random.uniform(0.5, 1.5))
        for each in deliveries:
            if each not in good:
                self.settle(each)
        if good and not self.settle_by("ack", good, lambda: self.store.ack_many(good)):
            for each in good:  # none of them was acked, so each may be
                self.settle(each)

    def claim(self, key):
        """One delivery, or none."""
        rule = RULES[key]
        both = key in PLAIN and self.random.random() < 0.3
        keys = self.random.sample(PLAIN, 2) if both else [key]

        def step():
            with contextlib.suppress(sqlspace.DeadlineError):
                timeout = self.random.choice((0, 0.02))
                return [
                    self.store.claim(
                        *(keys if both else key, timeout),
                        lease=LEASE,
                        max_attempts=rule.max_attempts,
                        ordered=rule.ordered,
                    )
                ]
            return []

        return self.claimed(keys, 1, step)

    def claimed(self, keys, limit, step):
        return (
            self.do(
                step,
                *("claim", keys, limit),
                result=lambda found: [
                    (
                        *(token(each), each.seq, each.attempts, ends(each)),
                        *(each.key, each.payload.decode()),
                    )
                    for each in found
                ],
            )
            or []
        )

    def begin(self, way, deliveries, delay=0.0):
        tokens = list(map(token, deliveries))
        self.log.write(["B", time.monotonic_ns(), way, int(delay * 1e9), tokens])

    def ended(self, deliveries, result, follow=0):
        ended = time.monotonic_ns()
        self.log.write(["E", ended, [result, follow, *map(ends, deliveries)]])

    def settle_by(self, way, deliveries, step, delay=0.0):
        """Settle, and log that; whether it was done."""
        self.begin(way, deliveries, delay)
        follow, result = 0, "ok"
        try:
            follow = step() or 0
        except sqlspace.LeaseError:
            result = "lost"
        except sqlspace.BusyError:
            result = "no"
        except Failed:
            pass
        self.ended(deliveries, result, follow)
        return result == "ok"


def token(delivery):
    return delivery._grant.token.hex()


def ends(delivery):
    """When its lease ends, as far as it knows, on the monotonic clock."""
    return delivery._grant.deadline * 1000 - offset()
