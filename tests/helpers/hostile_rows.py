"""Hostile rows and objects: what somebody's SQL can do to a file that SQLite still finds sound."""

import contextlib
import os
import random

import apsw
from hostile import CALM, NOW, Look, base, ensure_same, lay_out, payloads, picture, raw, use

import sqlspace

__all__ = ["case", "plant"]

ENDS = [0, 1, -1, 7, NOW - 1, NOW, NOW + 1, 1 << 31, 1 << 53, (1 << 62) - 1, 1 << 62, (1 << 63) - 1,
        -(1 << 63), -(1 << 62)]  # fmt: skip
WRONG = [1.5, float("inf"), "text", b"blob", None]
JSON = ["", "{", "{}", "[]", "null", "1", '"a"', '{"a":1}', '{"a":null}', '{"a":"b","a":"c"}',
        '{"a":{"b":"c"}}', "[" * 20_000, '{"a":' * 20_000, '{"\\ud800":"\\udfff"}', '{"a":"b"}x',
        '{"sqlspace-key":"plain"}', '{"sqlspace-key":""}', '{"sqlspace-key":"odd/dead"}',
        '{"sqlspace-seq":"x","sqlspace-reason":"\\u0000"}', "{" + "9" * 5000 + "}",
        '{"a":' + "9" * 5000 + "}", "\0", '{"a":"' + "b" * 9000 + '"}']  # fmt: skip
BYTES = [b"", b"\0", b"\xff", b"a\0b", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"k" * 1024,
         b"k" * 1025, b"odd", b"odd/dead", b"/dead", b"\x1b[2J", b"x" * 20_000]  # fmt: skip
INTEGERS = ["state", "pushed_at", "due_at", "delay", "expires_at", "deadline", "lease", "attempts",
            "max_attempts", "taken_at", "taken_no"]  # fmt: skip
TABLE = "sqlspace_entries"

# An error of open, and nothing else.
TAMPERED = [
    *(
        f"CREATE TRIGGER mine {when} {what} ON {TABLE} BEGIN DELETE FROM {TABLE}; END"
        for when in ("BEFORE", "AFTER")
        for what in ("INSERT", "UPDATE", "DELETE", "UPDATE OF state")
    ),
    "CREATE TRIGGER mine INSTEAD OF UPDATE ON sqlspace_keys BEGIN SELECT 1; END",
    f"CREATE TRIGGER sqlspace_mine AFTER INSERT ON {TABLE} BEGIN SELECT RAISE(IGNORE); END",
    "CREATE TRIGGER mine AFTER UPDATE ON sqlspace_schema BEGIN DELETE FROM sqlspace_entries; END",
    f"ALTER TABLE {TABLE} RENAME TO hidden; CREATE VIEW {TABLE} AS SELECT * FROM hidden",
    f"ALTER TABLE {TABLE} RENAME COLUMN token TO tokens",
    f"CREATE UNIQUE INDEX mine ON {TABLE} (seq)",
    f"CREATE INDEX mine ON {TABLE} (abs(seq)) WHERE key <> ''",
    *(
        f"DROP INDEX sqlspace_entries_{name}; CREATE INDEX sqlspace_entries_{name} ON {how}"
        for name, how in [
            ("live", f"{TABLE} (key, state, seq) WHERE state < 2"),
            ("live", f"{TABLE} (key, seq, state) WHERE state < 3"),
            ("last", f"{TABLE} (deadline)"),
            ("dedupe", f"{TABLE} (key, dedupe) WHERE dedupe IS NOT NULL"),
            ("taken", f"{TABLE} (taken_no DESC) WHERE taken_no IS NOT NULL"),
        ]
    ),
    "DROP VIEW sqlspace_live; CREATE VIEW sqlspace_live AS SELECT * FROM sqlspace_entries",
    "DROP VIEW sqlspace_outbox; CREATE TABLE sqlspace_outbox (key, payload)",
    "UPDATE sqlite_schema SET sql = replace(sql, 'CHECK', 'CHECK ')",
    "UPDATE sqlite_schema SET sql = replace(sql, '< 3', '<  3') WHERE type = 'index'",
    "UPDATE sqlspace_schema SET file_id = NULL",
    "UPDATE sqlspace_schema SET boots = 9223372036854775807",
    "UPDATE sqlspace_schema SET boots = 4611686018427387904",
    "UPDATE sqlspace_schema SET boots = -1",
    "UPDATE sqlspace_schema SET version = 9223372036854775807 WHERE version = 1",
    "INSERT INTO sqlspace_schema VALUES (99, 'later', 1, NULL, NULL)",
    "DELETE FROM sqlspace_schema",
    *(
        f"INSERT INTO {TABLE} (seq, key, pushed_at) VALUES ({seq}, 'odd', 1)"
        for seq in (0, -1, 1 << 62, (1 << 63) - 1, -(1 << 63))
    ),
    f"UPDATE {TABLE} SET taken_no = 9223372036854775807 WHERE state = 3",
    f"UPDATE {TABLE} SET taken_no = 4611686018427387904 WHERE state = 3",
]


def _value(rng, column):
    if column in INTEGERS:
        if column == "state":
            return rng.choice([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, -1, 99, *ENDS])
        return rng.choice([*ENDS, rng.choice(ENDS) + rng.randrange(-9, 9), None, None])
    if column in ("payload", "token"):
        return rng.choice([None, b"", rng.randbytes(9), b"%d" % rng.getrandbits(64)])
    if column == "headers":
        return rng.choice([*JSON, None])
    return rng.choice(BYTES)


def _bounded(value):
    return max(-(1 << 63), min((1 << 63) - 1, value)) if isinstance(value, int) else value


def _write(rng, database, note):
    """One row changed or added; what the table itself refuses, it refuses."""
    columns = rng.sample(
        [*INTEGERS, "payload", "headers", "key", "dedupe", "token"], rng.choice([1, 1, 2, 4])
    )
    values = [_bounded(_value(rng, column)) for column in columns]
    marks = [
        "CAST(? AS TEXT)" if column in ("key", "headers", "dedupe") else "?" for column in columns
    ]
    note(f"{dict(zip(columns, values, strict=True))!a:.300}")
    if rng.random() < 0.6:
        seqs = database.execute(f"SELECT seq FROM {TABLE} WHERE key <> ?", (CALM,)).fetchall()
        sets = ", ".join(f"{column} = {mark}" for column, mark in zip(columns, marks, strict=True))
        sql = f"UPDATE {TABLE} SET {sets} WHERE seq = ?"
        values.append(rng.choice(seqs)[0])
    else:
        for column, value in (("pushed_at", NOW), ("key", b"odd"), ("payload", rng.randbytes(9))):
            if column not in columns:
                columns.append(column)
                values.append(value)
                marks.append("CAST(? AS TEXT)" if column == "key" else "?")
        sql = f"INSERT INTO {TABLE} ({', '.join(columns)}) VALUES ({', '.join(marks)})"
    with contextlib.suppress(apsw.Error):
        database.execute(sql, values)


def _dodge(rng, database, note):
    """Values of a wrong type, past STRICT."""
    (sql,) = database.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (TABLE,)).fetchone()
    change = "UPDATE sqlite_schema SET sql = ? WHERE name = ?"
    version = database.pragma("schema_version")
    database.execute(change, (sql.replace("STRICT", "").replace("NOT NULL", ""), TABLE))
    database.pragma("schema_version", version + 1)
    for _ in range(rng.choice([1, 3])):
        column = rng.choice([*INTEGERS, "payload", "headers", "key", "token"])
        value = rng.choice(WRONG)
        note(f"{column} = {value!r}")
        with contextlib.suppress(apsw.Error):
            database.execute(
                f"UPDATE {TABLE} SET {column} = ? WHERE seq = ?", (value, rng.randrange(1, 60))
            )
    database.execute(change, (sql, TABLE))
    database.pragma("schema_version", version + 2)


def plant(rng, path, way, note):
    """Spoil rows, the types of values, or the objects of a store's file."""
    database = raw(path)
    if way in ("tampered", "triggers"):
        what = rng.choice([each for each in TAMPERED if way == "tampered" or "TRIGGER" in each])
        note(what)
        database.execute(what)
    elif way == "types":
        _dodge(rng, database, note)
    else:
        for _ in range(rng.choice([1, 1, 3, 10])):
            _write(rng, database, note)
    database.close()


def _ensure_calm(store, look, calm):
    """The one key that nobody touched is served, in order, unless no taking can have a number."""
    try:
        found = store.pull_many(CALM, 1000)
    except sqlspace.StoreError as error:
        assert "taken_no" in str(error)
        found = [row[1] for row in look.rows() if row[0] == CALM.encode()]
    assert found == list(calm), "the calm key has other entries"


def case(number, directory, note):
    """Spoil rows, or what they stand in, and use the store; or do so while it is open."""
    rng = random.Random(f"rows {number}")
    path = os.path.join(directory, "queue.db")
    kind = rng.choice(["plain", "plain small", "killed", "embedded"])
    lay_out(base(kind), path)
    way = rng.choice(["rows", "rows", "rows", "while open", "types", "tampered"])
    triggers = way == "while open" and rng.random() < 0.3
    note(f"{kind}, {way}")
    embed = kind == "embedded"
    history = rng.choice([0, 3, None])
    store = sqlspace.open(path, embed=embed, history=history) if way == "while open" else None
    plant(rng, path, "triggers" if triggers else way, note)
    look = Look(path)
    try:
        before = picture(path)
        if store is None:
            try:
                store = sqlspace.open(path, embed=embed, history=history)
            except sqlspace.StoreError as error:
                note(ascii(error))
                assert path in str(error)
                ensure_same(path, before)
                return
        assert way != "tampered", "it was opened"
        sound = way != "types" and look.is_sound()
        calm = payloads(look.rows(), CALM)
        with store:
            use(store, rng, note, look if sound else None)
            if way != "types":
                _ensure_calm(store, look, calm)
        assert not sound or look.is_sound()
    finally:
        look.close()
        if store is not None:
            store.close()
