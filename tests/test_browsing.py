"""Looking into a store that others have written to, past every verb."""

import subprocess
import sys

import apsw
import pytest

import sqlspace

SECONDS = 60  # until a test gives up

PLANT = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA wal_autocheckpoint=0")
connection.execute("UPDATE sqlspace_entries SET headers = CAST(? AS TEXT) WHERE seq = 2",
                   (bytes.fromhex(sys.argv[2]),))
connection.close()
"""

BROKEN = {
    "no JSON": b"{from",
    "nothing": b"",
    "a list": b'["from"]',
    "a number": b"5",
    "an object of numbers": b'{"from": 5}',
    "an object of objects": b'{"from": {"a": "b"}}',
    "no UTF-8": b'{"from": "\xff"}',
    "too deep": b"[" * 10_000,
}


@pytest.fixture
def path(tmp_path):
    """A store with three entries, the second of them with headers."""
    path = str(tmp_path / "queue.db")
    with sqlspace.open(path) as store:
        store.push("mail", b"one")
        store.push("mail", b"two", headers={"from": "me"})
        store.push("mail", b"three")
    return path


def plant(path, headers):
    """What another program does to the second entry."""
    argv = [sys.executable, "-c", PLANT, path, headers.hex()]
    subprocess.run(argv, check=True, timeout=SECONDS)


@pytest.mark.parametrize("headers", BROKEN.values(), ids=BROKEN)
def test_headers_that_are_no_object_of_strings_are_damage_and_the_entry_stays(path, headers):
    """The error is ours, names file, key and entry, and nothing is lost by looking."""
    plant(path, headers)
    with sqlspace.open(path) as store:
        with pytest.raises(sqlspace.CorruptError) as told:
            store.get("mail", 2)
        entries = store.entries("mail")
        assert next(entries).payload == b"one"
        with pytest.raises(sqlspace.CorruptError) as told_again:
            next(entries)
        assert store.len("mail") == 3
    assert str(told.value) == str(told_again.value)
    for part in (path, "entry 2", "'mail'"):
        assert part in str(told.value)
    assert isinstance(told.value.__cause__, ValueError)


@pytest.mark.parametrize("headers", [b"{}", b' {"from": "gr\xc3\xbc\xc3\x9fe"}\n', b'{"a": "\\n"}'])
def test_headers_that_others_wrote_well_are_read(path, headers):
    """However they space and escape them."""
    plant(path, headers)
    with sqlspace.open(path) as store:
        assert store.get("mail", 2) in list(store.entries("mail"))


@pytest.mark.parametrize("change", ["claim", "nack"])
def test_an_entry_that_changes_while_its_key_is_read_is_read_once(tmp_path, change):
    """Leased or given back between two of the statements: neither twice, nor left out."""
    path = tmp_path / "moving.db"
    with sqlspace.open(path) as store, sqlspace.open(path) as other:
        store.push_many("mail", [b"one", b"two"])
        held = other.claim("mail") if change == "nack" else None
        changes = [held.nack if held else lambda: other.claim("mail")]

        reader = store._database._session.open_reader(store._database.options)
        looks = []

        def second(event):
            if "seq > " in event["sql"]:
                looks.append(event["sql"])
            if len(looks) == 2 and changes:
                changes.pop()()

        reader.trace_v2(apsw.SQLITE_TRACE_STMT, second)
        assert [entry.payload for entry in store.entries("mail")] == [b"one", b"two"]
        assert not changes
