"""What hostile files and rows have in common: the stores that are spoilt, the verbs, the laws.

The clock stands still, so that a case is the same whenever it runs.
"""

import collections
import contextlib
import functools
import os
import tempfile

import apsw

import sqlspace
import sqlspace.clock
from sqlspace import schema

__all__ = [
    "BESIDE",
    "CALM",
    "KEYS",
    "Look",
    "base",
    "ensure_same",
    "lay_out",
    "picture",
    "raw",
    "use",
]

SECOND = 1_000_000
NOW = 1_800_000_000 * SECOND
sqlspace.clock.now = lambda: NOW

# No case touches the first; all others are fair game.
CALM = "calm"
KEYS = ("odd", "odd/dead", "plain", "late", "json", "none")
BESIDE = ("", "-wal", "-journal")

# Payloads that a space can read, and some that it can't.
VALUES = [b"1", b'{"a":[1,2]}', b"\xff", b"{", b"NaN", b"[" * 9999, b'"\\ud800"', b"9" * 5000]


def _at(now):
    sqlspace.clock.now = lambda: now


def _fill(store):
    """Some of everything, each payload once."""
    payloads = iter(b"%d:" % number + b"x" * (number * 37 % 900) for number in range(1000))
    store.push_many(CALM, [next(payloads) for _ in range(5)])
    for key in ("odd", "plain"):
        store.push_many(key, [next(payloads) for _ in range(6)])
        store.push(key, next(payloads), headers={"name": "value"}, dedupe="once")
        store.push(key, next(payloads), delay=1e6)
        store.push(key, next(payloads), ttl=1e6)
        store.claimp(key, lease=1e6)
        store.claimp(key, lease=1e6, max_attempts=1)
        store.claimp(key, lease=1e6).ack()
        store.claimp(key, max_attempts=1).nack()
        store.claimp(key).nack(1e6)
        store.pull(key)
    _at(NOW - 100 * SECOND)
    store.push_many("late", [next(payloads) for _ in range(4)])
    store.push("late", next(payloads), ttl=50)
    store.push("late", next(payloads), delay=50)
    store.claimp("late", lease=50)
    store.claimp("late", lease=50, max_attempts=1)
    _at(NOW)
    store.push_many("json", VALUES)
    store.push_many(CALM, [next(payloads) for _ in range(5)])


@functools.cache
def base(kind):
    """The bytes of a sound store's file, and of its -wal ("" and "-wal")."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as at:
        path = os.path.join(at, "queue.db")
        database = apsw.Connection(path)
        database.pragma("page_size", 512 if "small" in kind else 4096)
        database.execute("CREATE TABLE app (a, b); INSERT INTO app VALUES (1, zeroblob(3000))")
        if "embedded" not in kind:
            database.execute("DROP TABLE app; VACUUM")
        if "first" in kind:  # as the first version left it
            database.pragma("journal_mode", "wal")
            first = schema.migrations()[0]
            database.execute(first.sql)
            database.execute(schema.INSERT_VERSION, (1, first.name, "0" * 32, 3))
            database.executemany(
                "INSERT INTO sqlspace_entries (key, payload, pushed_at) VALUES (?, ?, ?)",
                [(key, b"%s %d" % (key.encode(), n), n) for n in range(9) for key in (CALM, *KEYS)],
            )
        database.close()
        with (
            sqlspace.open(path, embed="embedded" in kind)
            if "first" not in kind
            else (contextlib.nullcontext()) as store
        ):
            if store:
                _fill(store)
            if "killed" in kind:
                return {name: _read(path + name) for name in ("", "-wal")}
        return {"": _read(path)}


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def lay_out(files, path):
    """Write them, in place of whatever was there."""
    for name in (*BESIDE, "-shm", "-reserve", ".copy"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + name)
    for name, data in files.items():
        with open(path + name, "wb") as file:
            file.write(data)


def picture(path):
    """What may not change of a file that was refused."""
    found = {}
    for name in BESIDE:
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(path + name)
            found[name] = info.st_ino, info.st_mtime_ns, info.st_size, _read(path + name)
    return found


def ensure_same(path, before):
    """A file that was refused is as it was."""
    after = picture(path)
    changed = [
        f"{name or 'the database'}: {old and old[:3]} became {new and new[:3]}"
        for name in BESIDE
        if (old := before.get(name)) != (new := after.get(name))
    ]
    assert not changed, f"it was refused, and has changed: {changed}"


def raw(path):
    """A connection that is stopped by nothing."""
    connection = apsw.Connection(path)
    connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.pragma("ignore_check_constraints", 1)
    connection.pragma("writable_schema", 1)
    connection.pragma("legacy_alter_table", 1)
    return connection


class Look:
    """What is live, row by row, past every index."""

    SELECT = """
    SELECT CAST(key AS BLOB), CAST(ifnull(payload, x'') AS BLOB), expires_at IS NOT NULL
      FROM sqlspace_entries NOT INDEXED WHERE state < 3 ORDER BY seq
    """

    def __init__(self, path):
        self._connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE)
        self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    def rows(self):
        return self._connection.execute(self.SELECT).fetchall()

    def is_sound(self):
        try:
            return self._connection.execute("PRAGMA integrity_check(1)").get == "ok"
        except apsw.Error:
            return False

    def close(self):
        self._connection.close()


def payloads(rows, key=None):
    """How often each stands there."""
    return collections.Counter(row[1] for row in rows if key is None or row[0] == key.encode())


# -- the verbs: each returns the payloads that are gone by it, or the key that it has emptied


def _none(_):
    return []


def _claim(store, rng, key):
    delivery = store.claimp(
        key,
        lease=rng.choice([1e-6, 30, 1e9]),
        max_attempts=rng.choice([None, 1, 5]),
        ordered=rng.random() < 0.3,
    )
    if delivery is None:
        return []
    assert all(type(text) is str for pair in delivery.headers.items() for text in pair)
    assert repr(delivery) and delivery.deadline and delivery.attempts
    return _settle(delivery, rng.randrange(5))


def _settle(delivery, how):
    if how == 0:
        delivery.ack()
        return [delivery.payload]
    if how == 1:
        delivery.nack()
    elif how == 2:
        delivery.nack(5)
    elif how == 3:
        delivery.extend(5)
        delivery.ack()
        return [delivery.payload]
    return []


def _ack_many(store, rng, key):
    found = store.claim_many([key, "plain"], rng.choice([1, 3, 1000]))
    store.ack_many(found)
    return [delivery.payload for delivery in found]


def _transaction(store, rng, key):
    with store.transaction() as together:
        together.push(key, b"new", dedupe="once", max_len=10**6)
        together.peek(key)
        together.len(key)
        return together.pull_many(key, 2)


def _entries(store, rng, key):
    for entry in store.entries(key):
        assert entry.state in ("ready", "delayed", "leased")
        repr(entry)
        if rng.random() < 0.3:
            assert store.get(key, entry.seq) in (entry, None)
    return []


def _history(store, rng, key):
    for stone in store.history(key):
        assert stone.outcome in ("taken", "acked", "expired", "dead")
        assert type(stone.taken_at) is float
    return []


def _space(store, rng, key):
    plain = rng.random() < 0.5
    space = store.space(loads=bytes) if plain else store.space()
    getattr(space, rng.choice(["rdp", "len"]))(key)
    space.out(key, {"some": "value"})
    absent = object()
    value = space.inp(key, absent)
    if value is absent:
        return []
    return [value] if plain else key  # which of its payloads that was, isn't told


def _some(found):
    return [] if found is None else [found]


VERBS = {
    "push": lambda store, rng, key: _none(store.push(key, b"new")),
    "push with all": lambda store, rng, key: _none(
        store.push(key, b"new", ttl=9, delay=1, dedupe="once", headers={"a": "b"}, max_len=10**6)
    ),
    "push_many": lambda store, rng, key: _none(store.push_many(key, [b"new", b"new"], ttl=9)),
    "pull": lambda store, rng, key: [store.pull(key, 0)],
    "pullp": lambda store, rng, key: _some(store.pullp(key)),
    "pull_many": lambda store, rng, key: store.pull_many(key, rng.choice([1, 3, 10**9])),
    "pull_any": lambda store, rng, key: [store.pull_any([key, "plain"], 0)[1]],
    "peek": lambda store, rng, key: _none(store.peek(key)),
    "len": lambda store, rng, key: _none(store.len(key)),
    "wait": lambda store, rng, key: _none(store.wait(key, 0)),
    "wait_empty": lambda store, rng, key: _none(store.wait_empty(key, 0)),
    "put": lambda store, rng, key: _none(store.put(key, b"new")) or key,
    "clear": lambda store, rng, key: _none(store.clear(key)) or key,
    "get": lambda store, rng, key: _none(store.get(key, rng.randrange(1, 60))),
    "remove": lambda store, rng, key: key if store.remove(key, rng.randrange(1, 60)) else [],
    "keys": lambda store, rng, key: _none(list(map(store.len, store.keys()))),
    "entries": _entries,
    "history": _history,
    "claim": _claim,
    "claim_many": _ack_many,
    "requeue": lambda store, rng, key: _none(store.requeue(key)),
    "transaction": _transaction,
    "space": _space,
    "stats": lambda store, rng, key: _none(repr(store.stats())),
    "compact": lambda store, rng, key: _none(store.compact()),
    "backup": lambda store, rng, key: _none(store.backup(f"{store.path}.copy")),
}


def use(store, rng, note, look, verbs=12):
    """Run random verbs; AssertionError if one loses what it doesn't return.

    Args:
        store: An open one.
        rng: Says which.
        note: Is told of each, and of its end.
        look: What is there, or None: then nobody can say.
        verbs: How many.
    """
    for _ in range(verbs):
        name = rng.choice(list(VERBS))
        key = rng.choice(KEYS)
        if name == "backup":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{store.path}.copy")
        before = look.rows() if look else []
        gone = []
        try:
            gone = VERBS[name](store, rng, key)
            note(f"{name} {key}: {ascii(gone)[:80]}")
        except sqlspace.SpaceError as error:
            note(f"{name} {key}: {ascii(error)[:300]}")
        if look is None:
            continue
        missing = payloads(before)
        missing.subtract(payloads(look.rows()))
        missing.subtract([gone] if isinstance(gone, bytes) else () if gone == key else gone)
        missing -= collections.Counter(row[1] for row in before if row[2])  # they have expired
        if gone == key:
            missing -= payloads(before, key)
            missing -= payloads(before, key.removesuffix("/dead"))  # it has died meanwhile
        missing.pop(b"new", None)
        lost = [payload for payload, number in missing.items() if number > 0]
        assert not lost, f"{name} of {key} has lost {lost}"
