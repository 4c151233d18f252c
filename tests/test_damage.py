"""Rows and indexes that no sqlspace writes: a clear error or a right answer, and never a loss."""

import contextlib

import apsw
import pytest

import sqlspace
import sqlspace.clock

NOW = 1_800_000_000_000_000


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def later(monkeypatch):
    """Have the clock, which stands still, say so many seconds later."""

    def move(seconds):
        monkeypatch.setattr(sqlspace.clock, "now", lambda: NOW + seconds * 1_000_000)

    move(0)
    return move


@pytest.fixture
def store(path, later):
    with sqlspace.open(path, sync=False, history=0) as store:
        yield store


@contextlib.contextmanager
def spoiling(path):
    """A connection that is stopped by nothing."""
    database = apsw.Connection(path)
    database.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
    database.pragma("writable_schema", 1)
    database.pragma("ignore_check_constraints", 1)
    yield database
    database.close()


def respelled(path, name, old, new, change):
    """Change something while SQLite believes that an object was made otherwise than it was."""
    spell = "UPDATE sqlite_schema SET sql = replace(sql, ?, ?) WHERE name = ?"
    with spoiling(path) as database:
        for before, after, what in ((old, new, change), (new, old, "SELECT 1")):
            database.execute(spell, (before, after, name))
            database.pragma("schema_version", database.pragma("schema_version") + 1)
            database.execute(what)


def behind_the_index(path, name, condition, change):
    """Change rows without an index, which keeps what it had."""
    respelled(path, name, condition, condition.replace("WHERE", "WHERE seq IS NULL AND"), change)


def past_strict(path, change):
    """Have values of any type in the table."""
    respelled(path, "sqlspace_entries", ") STRICT", ")/*  */", change)


@pytest.mark.parametrize("number", [0, 1])
def test_an_entry_with_the_number_of_a_taking_is_no_tombstone(store, path, number):
    """Neither prune nor compact deletes it, nor does the history tell of it."""
    seqs = [store.push("a", b"%d" % number) for number in range(4)]
    with spoiling(path) as database:
        database.execute("UPDATE sqlspace_entries SET taken_no = ? WHERE seq = 1", (number,))
    assert store.remove("a", seqs[3])
    store.compact()
    assert list(store.history("a")) == []
    assert store.pull_many("a", 2) == [b"0", b"1"]
    assert store.pull_many("a", 2) == [b"2"]


def test_a_history_without_times_is_told(path):
    """Somebody else's tombstone may have none."""
    with sqlspace.open(path) as store:
        seq = store.push("a", b"1")
        with spoiling(path) as database:
            database.execute("UPDATE sqlspace_entries SET state = 3, taken_no = 1")
        assert [(stone.seq, stone.taken_at) for stone in store.history("a")] == [(seq, 0.0)]


def test_a_lease_without_a_length_is_counted(store, path):
    """The sums of `stats` are numbers, whatever the clock can't tell."""
    store.push("a", b"1")
    with spoiling(path) as database:
        database.execute("UPDATE sqlspace_entries SET deadline = ?", (NOW * 2,))
    assert (store.stats().keys["a"].ready, store.stats().keys["a"].leased) == (1, 0)


def test_a_key_of_no_utf_8_on_the_last_row_is_in_nobodys_way(store, path):
    """`compact`, `clear` and `remove` look at that row."""
    store.push("a", b"1")
    with spoiling(path) as database:
        sql = (
            "INSERT INTO sqlspace_entries (key, payload, pushed_at) VALUES (CAST(? AS TEXT), ?, 1)"
        )
        database.execute(sql, (b"\xff", b"theirs"))
    assert store.clear("a") == 1
    assert not store.remove("a", 2)
    store.compact()
    with spoiling(path) as database:
        assert database.execute("SELECT payload FROM sqlspace_entries").get == b"theirs"


def test_a_number_of_a_taking_beyond_all_is_a_store_error(store, path):
    """Nothing can be taken behind it; nothing is lost."""
    store.push_many("a", [b"1", b"2"])
    with spoiling(path) as database:
        database.execute("UPDATE sqlspace_entries SET taken_no = ? WHERE seq = 1", ((1 << 63) - 1,))
    for take in (store.pullp, lambda key: store.pull_many(key, 2)):
        with pytest.raises(sqlspace.StoreError, match="taken_no"):
            take("a")
    assert store.len("a") == 2


@pytest.mark.parametrize("verb", ["len", "clear", "pullp", "stats"])
def test_an_index_that_tells_of_a_death_that_isnt_there_ends_in_an_error(store, path, later, verb):
    """It would tell so for ever, and each time a copy went to the dead letters."""
    store.push("a", b"1")
    store.claimp("a", lease=1, max_attempts=1)
    condition = "WHERE deadline IS NOT NULL AND attempts >= max_attempts AND state < 3"
    behind_the_index(
        path, "sqlspace_entries_last", condition, "UPDATE sqlspace_entries SET state = 3"
    )
    later(1000)
    with pytest.raises(sqlspace.CorruptError, match="disagree"):
        getattr(store, verb)(*[] if verb == "stats" else ["a/dead"])


@pytest.mark.parametrize("verb", ["clear", "put", "pullp", "claimp"])
def test_an_index_that_tells_of_a_delay_that_isnt_there_ends_in_an_error(store, path, later, verb):
    """What nobody holds isn't released, nor looked for again."""
    store.push("a", b"1", delay=1)
    behind_the_index(
        path,
        "sqlspace_entries_until",
        "WHERE until_at IS NOT NULL AND state < 3",
        "UPDATE sqlspace_entries SET due_at = NULL, delay = NULL, state = 0",
    )
    later(1000)
    with pytest.raises(sqlspace.CorruptError, match="disagree"):
        getattr(store, verb)("a", *[b"2"] if verb == "put" else [])


def test_a_head_that_can_never_be_taken_ends_in_an_error(store, path):
    """What neither has expired nor hasn't is found by the look, and never by the taking."""
    store.push("a", b"1", ttl=1000)
    made = "pushed_at    INTEGER NOT NULL"
    change = "UPDATE sqlspace_entries SET pushed_at = NULL"
    respelled(path, "sqlspace_entries", made, made.replace("NOT", "/**/"), change)
    with pytest.raises(sqlspace.CorruptError, match="disagree"):
        store.pullp("a")
    with pytest.raises(sqlspace.CorruptError, match="disagree"):
        store.claimp("a")


def test_a_key_that_is_no_text_ends_in_an_error(store, path):
    """SQLite has a BLOB behind all TEXT, so the next key was the same one for ever."""
    store.push("a", b"1")
    past_strict(path, "UPDATE sqlspace_entries SET key = x'62'")
    with pytest.raises(sqlspace.CorruptError, match="disagree"):
        store.keys()


def test_values_of_wrong_types_are_damage_and_payloads_are_bytes(store, path):
    """STRICT lets none of them in."""
    store.push("a", b"1")
    store.push("b", b"1")
    store.push("c", b"1")
    past_strict(path, "UPDATE sqlspace_entries SET pushed_at = x'62' WHERE key = 'a'")
    past_strict(path, "UPDATE sqlspace_entries SET attempts = 'text' WHERE key = 'c'")
    past_strict(path, "UPDATE sqlspace_entries SET payload = 'text' WHERE key = 'b'")
    for look in (lambda: list(store.entries("a")), store.stats):
        with pytest.raises(sqlspace.CorruptError, match="wrong types"):
            look()
    with pytest.raises(sqlspace.CorruptError, match="disagree"):
        store.claimp("c")
    assert store.peek("b") == b"text"
    assert store.pullp("b") == b"text"
