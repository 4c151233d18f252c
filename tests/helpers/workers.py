"""What the processes of `test_processes` run; importable by name, for those that are spawned."""

import time

PRODUCERS = CONSUMERS = 4
KEYS = ("red", "green", "blue")


def produce(store, name, number):
    """Push `number` entries, round the keys, now and then several at once."""
    sent = dict.fromkeys(KEYS, 0)
    n = 0
    while n < number:
        key = KEYS[n % len(KEYS)]
        size = min(7 if n % 10 == 0 else 1, number - n)
        some = [b"%d %d" % (name, sent[key] + offset) for offset in range(size)]
        if size == 1:
            store.push(key, some[0])
        else:
            store.push_many(key, some)
        sent[key] += size
        n += size
    store.close()


def consume(store, name, log, ended):
    """Take from all keys, by every verb, until `ended` is set and nothing is left; log each."""
    with open(log, "w", encoding="ascii") as file:
        turn = 0
        while True:
            over = ended.is_set()  # asked before the look
            turn += 1
            order = KEYS[turn % 3 :] + KEYS[: turn % 3]
            began = time.monotonic_ns()
            if turn % 4 == 0:
                key = order[0]
                found = [(key, payload) for payload in store.pull_many(key, 5)]
            else:
                try:
                    found = [store.pull_any(order, 0.0 if over else 0.05)]
                except TimeoutError:
                    found = []
            for key, payload in found:
                file.write(f"{began} {time.monotonic_ns()} {key} {payload.decode()}\n")
            if over and not found and not any(store.len(key) for key in KEYS):
                break
    store.close()


def push_one(store, key, payload):
    """Push what it is told, in a store that came by pickle."""
    store.push(key, payload)
    store.close()


def report_options(store, queue):
    """Say how the store was opened here."""
    options = store._database.options
    queue.put({name: getattr(options, name) for name in type(options).__slots__})
    store.close()
