"""The file, as SQL: what any SQLite program can do with it while Stores are open and busy.

All SQL here runs in another process; see `shells`.
"""

import contextlib
import re
import subprocess
import sys
import threading
import time

import pytest
from shells import GREETING, PROGRAMS, SECONDS, Shell

import sqlspace
import sqlspace.waiting

FOR_EVER = 10_000.0

PULLER = f"""
import sys, sqlspace, sqlspace.watch, sqlspace.waiting
sqlspace.waiting.LOOK_AGAIN_SECONDS = sqlspace.watch.LOOK_AGAIN_SECONDS = {FOR_EVER}
with sqlspace.open(sys.argv[1]) as store:
    sys.stdout.buffer.write(store.pull("mail", {SECONDS}))
"""


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


@pytest.fixture(params=PROGRAMS)
def shell(request, store):
    return Shell(request.param, store.path)


@pytest.fixture
def never_look_again(monkeypatch):
    """A wait of this process ends by being woken, or not at all."""
    monkeypatch.setattr("sqlspace.waiting.LOOK_AGAIN_SECONDS", FOR_EVER)
    monkeypatch.setattr("sqlspace.watch.LOOK_AGAIN_SECONDS", FOR_EVER)


def until(condition):
    pause = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to that")


def insert(*rows):
    return "INSERT INTO sqlspace_outbox (key, payload) VALUES " + ", ".join(rows) + ";"


# -- reading


def test_the_outbox_view_shows_what_waits(store, shell):
    """It reads as what it takes: key and payload of every live entry."""
    store.push("mail", b"one")
    store.push("mail", b"two")
    store.pull("mail")
    assert shell("SELECT key, payload FROM sqlspace_outbox;") == ["mail|two"]


def test_the_keys_view_counts_ages_and_bytes(store, shell):
    """Per key: ready, leased, delayed, the oldest one's age, bytes; keys without entries aren't."""
    store.push_many("mail", [b"one", b"three"])
    store.push("log", b"")
    store.push("gone", b"x")
    store.pull("gone")
    rows = shell(
        "SELECT key, ready, leased, delayed, bytes, oldest_seconds BETWEEN 0 AND 600 "
        "FROM sqlspace_keys ORDER BY key;"
    )
    assert rows == ["log|1|0|0|0|1", "mail|2|0|0|8|1"]


def test_the_live_view_has_states_and_times_that_a_person_reads(store, shell):
    """Every live entry is a row, in words."""
    seq = store.push("mail", b"one", headers={"from": "me"})
    (row,) = shell(
        "SELECT seq, key, state, pushed, due, expires, lease_ends, attempts, bytes, payload, "
        "headers FROM sqlspace_live;"
    )
    pattern = rf"{seq}\|mail\|ready\|\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}}\|\|\|\|0\|3\|one\|"
    assert re.fullmatch(pattern + re.escape('{"from":"me"}'), row)


def test_the_tombstones_view_stands_in_the_order_of_taking(store, shell):
    """What was taken last stands last, whatever its seq."""
    first, second = store.push("a", b"1"), store.push("b", b"2")
    store.pull("b")
    store.pull("a")
    rows = shell("SELECT seq, key, outcome FROM sqlspace_tombstones;")
    assert rows == [f"{second}|b|taken", f"{first}|a|taken"]
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    for row in shell("SELECT pushed, taken FROM sqlspace_tombstones;"):
        assert re.fullmatch(rf"{moment}\|{moment}", row)


def test_the_schema_table_tells_the_migrations_and_the_files_id(store, shell):
    """One row a migration; the first has the file's random id."""
    (first, *_) = shell("SELECT version, name, file_id FROM sqlspace_schema ORDER BY version;")
    assert re.fullmatch(r"1\|0001_entries\|[0-9a-f]{32}", first)


@pytest.mark.parametrize(
    "name", ["sqlspace_outbox", "sqlspace_keys", "sqlspace_live", "sqlspace_tombstones"]
)
def test_a_view_takes_no_update_and_no_delete(store, shell, name):
    """Only a push comes through a view; what is in the file stays as it is."""
    store.push("mail", b"one")
    _, complaint = shell.attempt(f"DELETE FROM {name};")
    assert "cannot modify" in complaint
    _, complaint = shell.attempt(f"UPDATE {name} SET key = 'other';")
    assert "cannot modify" in complaint
    assert store.peek("mail") == b"one"


# -- what the clock says

MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
LONG = 3600.0
WORDS = "strftime('%Y-%m-%d %H:%M:%f', {} / 1e6, 'unixepoch')"


@pytest.fixture
def ago(monkeypatch):
    """Have our own clock stand so many seconds behind the shell's, or before it."""

    def set_clock(seconds):
        monkeypatch.setattr(
            "sqlspace.clock.now", lambda: time.time_ns() // 1000 - round(seconds * 1e6)
        )

    return set_clock


def live(shell, columns="key, seq, state, attempts"):
    return shell(f"SELECT {columns} FROM sqlspace_live ORDER BY key, seq;")


def test_a_lease_and_a_delay_stand_in_the_views_with_their_ends(store, shell):
    """Each state in a word, with the one end that it has; and counted by key."""
    ready = store.push("mail", b"ready")
    delayed = store.push("mail", b"late", delay=LONG)
    leased, nacked = store.push("work", b"1"), store.push("work", b"22")
    first, second = store.claim("work", lease=LONG), store.claim("work", lease=LONG)
    second.nack(LONG)
    assert (first.seq, second.seq) == (leased, nacked)
    assert live(shell) == [
        f"mail|{ready}|ready|0",
        f"mail|{delayed}|delayed|0",
        f"work|{leased}|leased|1",
        f"work|{nacked}|delayed|1",
    ]
    ends = [row.split("|") for row in live(shell, "due, expires, lease_ends")]
    shapes = [tuple(bool(re.fullmatch(MOMENT, end)) for end in row) for row in ends]
    due, lease_ends = (True, False, False), (False, False, True)
    assert shapes == [(False, False, False), due, lease_ends, due]
    assert shell("SELECT key, ready, leased, delayed, bytes FROM sqlspace_keys ORDER BY key;") == [
        "mail|1|0|1|9",
        "work|0|1|1|3",
    ]
    assert shell("SELECT count(*) FROM sqlspace_outbox;") == ["4"]


def test_the_ends_in_words_are_those_in_the_table(store, shell):
    """Which entry they belong to, and UTC: what the row says, spelled out."""
    store.push("mail", b"", delay=LONG, ttl=2 * LONG)
    store.push("work", b"", ttl=3 * LONG)
    store.claim("work", lease=LONG)
    rows = zip(
        live(shell, "pushed, due, expires, lease_ends"),
        shell(
            "SELECT "
            + ", ".join(map(WORDS.format, ("pushed_at", "due_at", "expires_at", "deadline")))
            + " FROM sqlspace_entries ORDER BY key, seq;"
        ),
        strict=True,
    )
    for shown, written in rows:
        assert shown == written
        assert len(re.findall(MOMENT, shown)) == 3


def test_what_has_expired_is_in_no_view_before_anybody_has_looked(store, shell, ago):
    """The row is still there; the clock has decided. A lease keeps what it holds."""
    ago(LONG)
    leased = store.push("mail", b"leased", ttl=100.0)
    store.claim("mail", lease=2 * LONG)
    store.push("mail", b"gone", ttl=100.0)
    store.push("mail", b"delayed, and gone", delay=100.0, ttl=200.0)
    store.push("mail", b"given back, and gone", ttl=200.0)
    assert [store.claim("mail", lease=100.0).nack(delay) for delay in (0, 100.0)] == [None, None]
    kept = store.push("mail", b"kept", ttl=2 * LONG)
    assert live(shell) == [f"mail|{leased}|leased|1", f"mail|{kept}|ready|0"]
    assert shell("SELECT key, ready, leased, delayed FROM sqlspace_keys;") == ["mail|1|1|0"]
    assert shell("SELECT payload FROM sqlspace_outbox ORDER BY payload;") == ["kept", "leased"]
    assert shell("SELECT count(*) FROM sqlspace_entries WHERE state < 3;") == ["5"]
    assert shell("SELECT count(*) FROM sqlspace_tombstones;") == ["0"]


def test_what_has_come_due_is_ready_before_anybody_has_looked(store, shell, ago):
    """A delay, a lease and a nack's delay that are over; and ended ends are not shown."""
    ago(LONG)
    seqs = [store.push("mail", b"delayed", delay=100.0), *store.push_many("work", [b"1", b"2"])]
    store.claim("work", lease=100.0)
    store.claim("work", lease=100.0).nack(100.0)
    assert live(shell) == [
        f"mail|{seqs[0]}|ready|0",
        f"work|{seqs[1]}|ready|1",
        f"work|{seqs[2]}|ready|1",
    ]
    assert live(shell, "due, expires, lease_ends") == ["||"] * 3
    assert shell("SELECT key, ready, leased, delayed FROM sqlspace_keys ORDER BY key;") == [
        "mail|1|0|0",
        "work|2|0|0",
    ]
    assert shell("SELECT count(*) FROM sqlspace_entries WHERE state IN (1, 2);") == ["3"]


def test_a_last_lease_that_a_clock_set_which_has_jumped_back_is_over(store, shell, ago):
    """Its time to live, set before the jump, is not over: so the entry is dead, and not expired."""
    seq = store.push("work", b"", ttl=1000.0)
    ago(-700)
    store.claim("work", lease=500.0, max_attempts=1)  # beyond the time to live
    assert live(shell) == [f"work/dead|{seq}|ready|1"]
    assert shell("SELECT key, ready, leased, delayed FROM sqlspace_keys;") == ["work/dead|1|0|0"]
    ago(0)
    assert store.len("work/dead") == 1


def test_what_is_dead_and_not_yet_moved_stands_under_the_dead_key(store, shell, ago):
    """As it will be when somebody comes by; with its number and headers, until then."""
    ago(LONG)
    dead = store.push("work", b"poison", headers={"from": "me"}, ttl=LONG / 2)
    store.claim("work", lease=100.0, max_attempts=1)
    spare = store.push("work", b"once more")
    store.claim("work", lease=100.0, max_attempts=2)
    # It expired while it was leased for the last time: that is no death.
    store.push("work", b"gone", ttl=50.0)
    store.claim("work", lease=100.0, max_attempts=1)
    columns = "key, seq, state, due, expires, lease_ends, attempts, bytes, payload, headers"
    assert live(shell, columns) == [
        f"work|{spare}|ready||||1|9|once more|",
        f'work/dead|{dead}|ready||||1|6|poison|{{"from":"me"}}',
    ]
    asked = "SELECT key, ready, leased, delayed, bytes FROM sqlspace_keys ORDER BY key;"
    assert shell(asked) == ["work|1|0|0|9", "work/dead|1|0|0|6"]
    assert shell("SELECT key FROM sqlspace_outbox ORDER BY key;") == ["work", "work/dead"]
    ago(0)
    assert store.peek("work/dead") == b"poison"  # moves it
    (moved,) = store.entries("work/dead")
    assert moved.seq > dead
    assert live(shell)[-1] == f"work/dead|{moved.seq}|ready|0"
    assert shell(asked) == ["work|1|0|0|9", "work/dead|1|0|0|6"]
    assert f"{dead}|work|dead" in shell("SELECT seq, key, outcome FROM sqlspace_tombstones;")


def test_the_last_lease_is_a_lease_until_it_is_over(store, shell):
    """Only then it is dead."""
    seq = store.push("work", b"")
    store.claim("work", lease=LONG, max_attempts=1)
    assert live(shell) == [f"work|{seq}|leased|1"]


def test_the_tombstones_view_names_each_outcome(store, shell):
    """In the order of taking; what goes by put, clear and remove leaves nothing."""
    seqs = dict(zip("tadxpcr", range(1, 8), strict=True))
    assert [store.push(key, b"") for key in seqs] == list(seqs.values())
    store.put("p", b"")
    store.clear("c")
    store.remove("r", seqs["r"])
    store.pull("t")
    store.claim("a").ack()
    store.claim("d", max_attempts=1).nack()
    claimed = store.push("e", b"", ttl=1e-6)
    store.put("e", b"")  # carries out what has expired
    assert shell("SELECT seq, key, outcome FROM sqlspace_tombstones;") == [
        f"{seqs['t']}|t|taken",
        f"{seqs['a']}|a|acked",
        f"{seqs['d']}|d|dead",
        f"{claimed}|e|expired",
    ]


@pytest.mark.parametrize(("when", "seconds"), [("now", 0), ("later", LONG), ("before", -3000.0)])
def test_the_views_say_of_every_entry_what_the_store_says(store, shell, ago, when, seconds):
    """All combinations of what an entry can have, also when the clock has jumped back since."""
    ago(seconds)
    for held in ("nothing", "delay", "lease", "last lease", "nack", "nack of 0"):
        for ttl in (None, 300.0, 2000.0, 2 * LONG):
            for length in (200.0, 1000.0, 1.5 * LONG):
                if ttl is not None and held == "delay" and length >= ttl:
                    continue
                key = f"{held} {ttl} {length}"
                delay = length if held == "delay" else None
                store.push(key, b"x", ttl=ttl, delay=delay, headers={"key": key})
                if "lease" in held or "nack" in held:
                    most = 1 if held == "last lease" else 5
                    claimed = store.claim(key, lease=length, max_attempts=most)
                    if "nack" in held:
                        claimed.nack(0 if held.endswith("0") else length)
    ago(0)
    in_views = live(
        shell,
        "key, state, attempts, bytes, due IS NULL, expires IS NULL, lease_ends IS NULL, payload, "
        "headers",
    )
    counted = shell("SELECT key, ready, leased, delayed, bytes FROM sqlspace_keys ORDER BY key;")
    words = dict.fromkeys(row.split("|")[1] for row in in_views)
    assert set(words) == {"ready", "delayed", "leased"}
    stats = store.stats().keys  # moves the dead, under new numbers
    entries = [entry for key in stats for entry in store.entries(key)]
    dead = {row.split("|")[0] for row in in_views if "/dead|" in row}
    assert bool(dead) == (when != "now")
    assert dead == {entry.key for entry in entries if entry.key.endswith("/dead")}
    said = [
        f"{e.key}|{e.state}|{e.attempts}|{len(e.payload)}|{e.due_at is None:d}|"
        f"{e.expires_at is None:d}|{e.deadline is None:d}"
        for e in entries
    ]
    shown = [row.rsplit("|", 2)[0] for row in in_views]
    # An entry under a dead key was never claimed there.
    assert [re.sub(r"(/dead\|ready)\|1", r"\1|0", row) for row in shown] == said
    for row in in_views:
        key = row.split("|")[0].removesuffix("/dead")
        assert row.endswith(f'|x|{{"key":"{key}"}}')
    assert counted == [
        f"{key}|{found.ready}|{found.leased}|{found.delayed}|{found.bytes}"
        for key, found in stats.items()
        if found.ready + found.leased + found.delayed
    ]


def test_every_column_is_explained_where_the_shell_shows_the_schema(shell):
    """`.schema` is the reference of the file: a comment behind each name that needs one."""
    (text,) = shell(
        "SELECT replace(sql, char(10), char(1)) FROM sqlite_schema WHERE name = 'sqlspace_entries';"
    )
    lines = text.split("\x01")
    explained = {
        match[1] for line in lines if (match := re.match(r"\s+(?:/\* )?(\w+)\b.*(?:--|: )", line))
    }
    names = set(shell("SELECT name FROM pragma_table_xinfo('sqlspace_entries');"))
    evident = {"pushed_at", "attempts", "max_attempts", "state"}
    assert names - explained <= evident
    assert any(re.search(r"-- +live: 0 ready, 1 delayed, 2 leased", line) for line in lines)
    assert max(map(len, lines)) <= 100


# -- pushing


def test_an_insert_into_the_outbox_is_a_push(store, shell):
    """It stands behind all others, with a seq of its own, and is pulled like them."""
    before = store.push("mail", b"before")
    shell(insert("('mail', 'hello')"))
    after = store.push("mail", b"after")
    (middle,) = [e for e in store.entries("mail") if e.seq not in (before, after)]
    assert before < middle.seq < after
    assert (middle.headers, middle.state, middle.attempts) == ({}, "ready", 0)
    assert [store.pull("mail") for _ in range(3)] == [b"before", b"hello", b"after"]


def test_the_time_of_an_inserted_entry_is_the_clocks(store, shell):
    """Times are Unix microseconds, whoever pushes: it stands between two pushes of ours."""
    store.push("mail", b"before")
    shell(insert("('mail', 'hello')"))
    store.push("mail", b"after")
    before, inserted, after = (e.pushed_at for e in store.entries("mail"))
    assert before - 0.01 <= inserted <= after + 0.01  # the shell's clock has milliseconds


@pytest.mark.parametrize(
    ("literal", "payload"),
    [
        ("'grüße'", "grüße".encode()),
        ("x'00ff0a00'", b"\x00\xff\n\x00"),
        ("''", b""),
        ("x''", b""),
        ("zeroblob(100000)", bytes(100_000)),
        ("5", b"5"),
        ("1.5", b"1.5"),
    ],
)
def test_a_payload_may_be_text_a_blob_or_a_number(store, shell, literal, payload):
    """Text arrives as its UTF-8, a blob as it is, a number as its text."""
    shell(insert(f"('mail', {literal})"))
    assert store.pull("mail") == payload


@pytest.mark.parametrize(
    ("literal", "key"),
    [
        ("printf('%.1024c', 'k')", "k" * 1024),
        ("'schlüssel 🗝'", "schlüssel 🗝"),
        ("char(1114111)", chr(1_114_111)),
        ("char(10)", "\n"),
        ("' '", " "),
    ],
)
def test_whatever_is_a_key_for_push_is_one_for_the_outbox(store, shell, literal, key):
    """1 to 1,024 bytes of UTF-8, with no other rule."""
    shell(insert(f"({literal}, 'x')"))
    assert store.keys() == [key]
    assert store.pull(key) == b"x"


def test_several_rows_are_pushed_in_their_order(store, shell):
    """One statement, many entries."""
    shell(insert("('mail', 'one')", "('log', 'x')", "('mail', 'two')"))
    shell(
        "INSERT INTO sqlspace_outbox (key, payload) "
        "WITH RECURSIVE n (i) AS (SELECT 3 UNION ALL SELECT i + 1 FROM n WHERE i < 9) "
        "SELECT 'mail', i FROM n;"
    )
    assert store.pull_many("mail", 10) == [b"one", b"two", *(b"%d" % i for i in range(3, 10))]
    assert store.pull_many("log", 10) == [b"x"]


def test_a_push_is_part_of_the_applications_own_transaction(store, shell):
    """ROLLBACK takes it back; COMMIT makes it visible, and not before."""
    with shell.start() as process:
        process.stdin.write(
            GREETING + "BEGIN;\n" + insert("('mail', 'no')") + "\nROLLBACK;\n"
            "BEGIN;\n" + insert("('mail', 'yes')") + "\nSELECT 'inside';\n"
        )
        process.stdin.flush()
        for line in process.stdout:
            if line == "inside\n":
                break
        assert store.len("mail") == 0
        process.stdin.write("COMMIT;\n")
        process.stdin.close()
        assert process.wait(SECONDS) == 0
    assert store.pull_many("mail", 10) == [b"yes"]


def test_a_store_waits_for_a_writer_that_knows_no_turnstile(store, shell):
    """While a shell holds the write lock, a push waits; then it stands behind the shell's."""
    begun, done = threading.Event(), threading.Event()

    def push():
        begun.set()
        store.push("mail", b"store")
        done.set()

    with shell.start() as process:
        process.stdin.write(
            GREETING + "BEGIN IMMEDIATE;\n" + insert("('mail', 'shell')") + "\nSELECT 'inside';\n"
        )
        process.stdin.flush()
        for line in process.stdout:
            if line == "inside\n":
                break
        thread = threading.Thread(target=push)
        thread.start()
        assert begun.wait(SECONDS)
        assert not done.wait(0.1)
        process.stdin.write("COMMIT;\n")
        process.stdin.close()
        assert process.wait(SECONDS) == 0
        thread.join(SECONDS)
    assert done.is_set()
    assert store.pull_many("mail", 10) == [b"shell", b"store"]


# -- refusing

BAD_KEYS = {
    "integer": ("5", "key must be TEXT"),
    "blob": ("x'6d61696c'", "key must be TEXT"),
    "NULL": ("NULL", "key must be TEXT"),
    "empty": ("''", "1 to 1024 bytes"),
    "1,025 bytes": ("printf('%.1025c', 'k')", "1 to 1024 bytes"),
    "1,025 bytes of 1,024 characters": ("printf('%.1023c', 'k') || 'ü'", "1 to 1024 bytes"),
    "NUL alone": ("char(0)", "NUL"),
    "NUL inside": ("'a' || char(0) || 'b'", "NUL"),
    "NUL at the end": ("'a' || char(0)", "NUL"),
    "no UTF-8": ("CAST(x'ff' AS TEXT)", "valid UTF-8"),
    "no UTF-8 behind good": ("CAST(x'6d61696cff' AS TEXT)", "valid UTF-8"),
    "cut off": ("CAST(x'61c3' AS TEXT)", "valid UTF-8"),
    "continuation alone": ("CAST(x'80' AS TEXT)", "valid UTF-8"),
    "overlong": ("CAST(x'c1a1' AS TEXT)", "valid UTF-8"),
    "surrogate": ("CAST(x'eda080' AS TEXT)", "valid UTF-8"),
    "beyond Unicode": ("CAST(x'f4908080' AS TEXT)", "valid UTF-8"),
}


@pytest.mark.parametrize("how", ["", "OR IGNORE", "OR REPLACE"])
@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_bad_key_aborts_whatever_the_statement_says(store, shell, name, how):
    """No verb could name such a key, so its entries would be lost."""
    literal, reason = BAD_KEYS[name]
    statement = insert("('good', 'x')", f"({literal}, 'x')").replace("INSERT", f"INSERT {how}")
    _, complaint = shell.attempt(statement)
    assert reason in complaint
    assert shell("SELECT count(*) FROM sqlspace_entries;") == ["0"]


@pytest.mark.parametrize("how", ["", "OR IGNORE", "OR REPLACE"])
def test_a_null_payload_aborts_whatever_the_statement_says(store, shell, how):
    """NULL is the payload of tombstones; and a column that was left out is NULL too."""
    for statement in (
        f"INSERT {how} INTO sqlspace_outbox (key, payload) VALUES ('mail', NULL);",
        f"INSERT {how} INTO sqlspace_outbox (key) VALUES ('mail');",
    ):
        _, complaint = shell.attempt(statement)
        assert "payload must not be NULL" in complaint
    assert shell("SELECT count(*) FROM sqlspace_entries;") == ["0"]


def test_an_abort_leaves_the_applications_transaction_as_it_was(store, path):
    """ABORT, not ROLLBACK: the application may go on and commit the rest."""
    program = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA wal_autocheckpoint=0")
connection.execute("BEGIN")
insert = "INSERT INTO sqlspace_outbox (key, payload) VALUES (?, ?)"
connection.execute(insert, ("mail", "one"))
try:
    connection.execute(insert, (b"mail", "two"))
except sqlite3.IntegrityError as error:
    print(error)
connection.execute(insert, ("mail", "three"))
connection.execute("COMMIT")
connection.close()
"""
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
    assert done.stdout == b"sqlspace: key must be TEXT\n"
    assert store.pull_many("mail", 10) == [b"one", b"three"]


# -- waking


@pytest.mark.usefixtures("never_look_again")
def test_an_insert_wakes_a_pull_of_this_process(store, shell):
    """A shell rings no bell; the waiter sees that the file changes."""
    found = []
    thread = threading.Thread(target=lambda: found.append(store.pull("mail", SECONDS)))
    thread.start()
    until(lambda: "mail" in store._database.bell.tokens())
    shell(insert("('other', 'x')"))
    shell(insert("('mail', 'hello')"))
    thread.join(SECONDS)
    assert found == [b"hello"]


def test_an_insert_wakes_a_pull_of_another_process(store, shell):
    """The same, where the waiter has nothing in common with this process."""
    command = [sys.executable, "-c", PULLER, store.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as puller:
        waiter = sqlspace.waiting.Waiter()
        until(lambda: store._database.bell.awaited("mail", waiter))
        shell(insert("('other', 'x')"))
        shell(insert("('mail', 'hello')"))
        assert puller.communicate(timeout=SECONDS)[0] == b"hello"
    assert puller.returncode == 0


# -- all at once


def test_shells_and_stores_lose_nothing_and_keep_the_order(store, shell):
    """Threads push and pull, a process pulls, shells insert and read: each entry comes out once."""
    rounds, each = 4, 25
    inserts = "\n".join(insert(f"('mail', 'shell {{}} {i:03}')") for i in range(each))
    reads = (
        "SELECT count(*) FROM sqlspace_live;\nSELECT count(*) FROM sqlspace_tombstones;\n"
        "SELECT ready FROM sqlspace_keys WHERE key = 'mail';\n"
    )
    pulled, told = [], threading.Event()

    def push(name):
        for i in range(rounds * each):
            store.push("mail", f"{name} 0 {i:03}".encode())

    def pull():
        # Closed by nobody before it has all: what is pulled last is what says so.
        while (payload := store.pull("mail", SECONDS)) != b"end":
            pulled.append(payload)
        told.set()

    pushers = [threading.Thread(target=push, args=(f"thread-{n}",)) for n in range(2)]
    puller = threading.Thread(target=pull)
    for thread in (*pushers, puller):
        thread.start()
    for number in range(rounds):
        shell(inserts.replace("{}", str(number)) + "\n" + reads)
    for thread in pushers:
        thread.join(SECONDS)
    shell(insert("('mail', 'end')"))
    puller.join(SECONDS)
    assert told.is_set()

    expected = {f"shell {n} {i:03}".encode() for n in range(rounds) for i in range(each)}
    expected |= {f"thread-{n} 0 {i:03}".encode() for n in range(2) for i in range(rounds * each)}
    assert sorted(pulled) == sorted(expected)
    for name in (b"shell", b"thread-0", b"thread-1"):
        own = [payload for payload in pulled if payload.startswith(name)]
        assert own == sorted(own), name
    assert shell("PRAGMA integrity_check;") == ["ok"]


def test_the_shell_leaves_nothing_that_a_store_refuses(store, shell, path):
    """After a shell has written and gone, every Store closed, the file opens as before."""
    shell(insert("('mail', 'hello')"))
    store.close()
    with contextlib.closing(sqlspace.open(path)) as again:
        assert again.pull("mail", 0) == b"hello"
