"""What the clock decides of an entry: the verbs, the views and plain Python all say the same.

The plain Python is `Entry.state` of `helpers/model.py`. Rows are written past every verb, so that
there are also those which no verb would leave behind at that time.
"""

import datetime as dt
import json
import os
import tempfile
import time

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import DEAD, MINUTE, Entry, Hold

import sqlspace
import sqlspace.clock
from sqlspace import browsing

SECOND = 1_000_000
HOUR = 3600 * SECOND
YEAR = 31_557_600 * SECOND
LATE = 1_800_000_000 * SECOND  # a time for a clock of our own
FAR = HOUR // 2  # what is so far from now doesn't change while a test runs

KEYS = ("a", "b", "a/dead")
LOOKED = (*KEYS, "b/dead", "a/dead/dead")

INSERT = """
INSERT INTO sqlspace_entries (seq, key, payload, headers, state, pushed_at, due_at, delay,
                              expires_at, deadline, lease, token, attempts, max_attempts)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
INSERT_TOMBSTONE = """
INSERT INTO sqlspace_entries (seq, key, state, pushed_at, expires_at, attempts, max_attempts,
                              taken_at, taken_no)
VALUES (?, ?, ?, ?, ?, 1, 1, ?, ?)
"""


def draw_entry(draw, begins, lengths):
    """An entry in any state, before it has its seq; times relative to the clock."""
    pushed_at = draw(begins)
    entry = Entry(None, draw(st.sampled_from(KEYS)), b"", {}, pushed_at)
    entry.ttl = draw(st.one_of(st.none(), lengths))
    entry.headers = draw(st.sampled_from(({}, {"from": "me"})))
    entry.attempts = draw(st.integers(0, 2))
    entry.max_attempts = draw(st.sampled_from((None, 1, 2)))
    kind = draw(st.sampled_from((None, "delay", "nack", "lease", "lease")))
    if kind is not None:
        length = draw(lengths)
        entry.hold = Hold(kind, draw(begins) + length, length)
    return entry


@st.composite
def entries(draw, begins, lengths):
    return [draw_entry(draw, begins, lengths) for _ in range(draw(st.integers(1, 12)))]


def write(connection, given):
    """These entries, and no others; each payload is there once. A tombstone stands among them."""
    connection.execute("DELETE FROM sqlspace_entries")
    for seq, entry in enumerate(given, 1):
        entry.seq, entry.payload = seq, b"%d" % seq * seq
        hold = entry.hold
        leased = hold is not None and hold.kind == "lease"
        state = 0 if hold is None else 1 if hold.kind == "delay" else 2
        headers = json.dumps(entry.headers) if entry.headers else None
        end, length = (None, None) if hold is None else (hold.end, hold.length)
        row = (seq, entry.key, entry.payload, headers, state, entry.pushed_at)
        row += (None, None) if leased else (end, length)
        row += (entry.expires_at,)
        row += (end, length, os.urandom(16)) if leased else (None, None, None)
        connection.execute(INSERT, (*row, entry.attempts, entry.max_attempts))
    stone = given[0]
    for number, state in enumerate((3, 4, 5, 6), 1):
        row = (len(given) + number, stone.key, state, stone.pushed_at, stone.expires_at)
        connection.execute(INSERT_TOMBSTONE, (*row, stone.pushed_at, number))


@pytest.fixture(scope="module")
def opened():
    """A store, and somebody else's connection to its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "queue.db")
        with sqlspace.open(path, sync=False) as store:
            connection = apsw.Connection(path)
            yield store, connection
            connection.close()


quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


# -- verbs


def stands_under(entry, now):
    """Where it is seen: what is dead counts as a dead letter, moved or not."""
    return entry.key + DEAD if entry.state(now) == "dead" else entry.key


def state_seen(entry, now):
    """As what it is seen there; "expired" if it isn't."""
    state = entry.state(now)
    return "ready" if state == "dead" else state


@given(
    given=entries(
        st.integers(0, 300).map(lambda seconds: LATE + seconds * SECOND),
        st.sampled_from((1, SECOND, 30 * SECOND, MINUTE, 600 * SECOND)),
    ),
    picks=st.lists(st.tuples(st.integers(0, 100), st.integers(-1, 1)), min_size=1, max_size=6),
)
@quick
def test_every_verb_sees_what_row_and_clock_say(opened, given, picks):
    """`get`, `len`, `peek`, `wait`, `entries` and `keys`, at the edges of all that is timed.

    Each is asked at several times of the same rows: to look changes nothing, but for dead letters,
    which come last.
    """
    store, connection = opened
    write(connection, given)
    edges = sorted({LATE, *(time for entry in given for time in entry.edges())})
    for index, beside in picks:
        now = edges[index % len(edges)] + beside
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlspace.clock, "now", lambda now=now: now)
            for key in LOOKED:
                seen = [entry for entry in given if stands_under(entry, now) == key]
                ready = any(state_seen(entry, now) == "ready" for entry in seen)
                assert browsing.has_ready(store._database, key) == ready
            for key in ("a", "b"):
                compare_looks(store, key, given, now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlspace.clock, "now", lambda: now)
        live = [entry for entry in given if entry.state(now) != "expired"]
        assert store.keys() == sorted({stands_under(entry, now) for entry in live})
        for key in LOOKED:
            seen = [entry for entry in live if stands_under(entry, now) == key]
            assert store.len(key) == len(seen)
            found = {each.payload: each.state for each in store.entries(key)}
            assert found == {entry.payload: state_seen(entry, now) for entry in seen}
            ready = {entry.payload for entry in seen if state_seen(entry, now) == "ready"}
            assert (store.peek(key) in ready) if ready else (store.peek(key) is None)
            assert set(store.pull_many(key, 100)) == ready


def compare_looks(store, key, given, now):
    """All looks that move nothing, at a key that isn't one of dead letters."""
    ours = [entry for entry in given if entry.key == key]
    live = [entry for entry in ours if entry.is_live(now)]
    ready = [entry for entry in live if entry.state(now) == "ready"]
    assert store.len(key) == len(live)
    assert store.peek(key) == (ready[0].payload if ready else None)
    assert [each.seq for each in store.entries(key)] == [entry.seq for entry in live]
    for entry in ours:
        found = store.get(key, entry.seq)
        assert (found and found.state) == (entry.state(now) if entry in live else None)


# -- views, by the real clock


def as_datetime(text):
    return dt.datetime.strptime(text, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=dt.UTC)


def is_near(shown, unix_seconds):
    """Milliseconds are shown."""
    if shown is None or unix_seconds is None:
        return shown is unix_seconds
    return abs(as_datetime(shown).timestamp() - unix_seconds) < 0.002


@st.composite
def entries_far_from_now(draw):
    """None of their edges is near now: times are relative to it."""
    found = draw(
        entries(
            st.sampled_from((-10 * YEAR, -YEAR, -50 * HOUR, -5 * HOUR, 0, 6 * HOUR, YEAR)),
            st.sampled_from((HOUR, 8 * HOUR, 70 * HOUR, 2 * YEAR)),
        )
    )
    return [entry for entry in found if all(abs(edge) > FAR for edge in entry.edges())]


VIEW_LIVE = """
SELECT seq, key, state, pushed, due, expires, lease_ends, attempts, bytes, payload, headers
  FROM sqlspace_live ORDER BY seq
"""


@given(given=entries_far_from_now())
@quick
def test_the_views_say_what_the_verbs_say(opened, given):
    """`sqlspace_live`, `sqlspace_keys` and `sqlspace_outbox`, before and after all has moved."""
    if not given:
        return
    store, connection = opened
    now = time.time_ns() // 1000
    for entry in given:
        entry.pushed_at += now
        if entry.hold is not None:
            hold = entry.hold
            entry.hold = Hold(hold.kind, hold.end + now, hold.length)
    write(connection, given)
    live = [entry for entry in given if entry.state(now) != "expired"]
    # Nobody has moved the dead: they have their old numbers, and stand where they belong.
    assert [row[:3] for row in connection.execute(VIEW_LIVE)] == [
        (entry.seq, stands_under(entry, now), state_seen(entry, now)) for entry in live
    ]
    compare_keys(connection, live, now)
    before = outbox(connection)
    found = {each.seq: each for key in LOOKED for each in store.entries(key)}  # moves them
    assert before == outbox(connection)
    assert sorted(before) == sorted((each.key, each.payload) for each in found.values())
    compare_live(connection, found)
    compare_stats(connection, store)
    for key in LOOKED:
        ready = [each.payload for _, each in sorted(found.items()) if is_ready(each, key)]
        assert store.peek(key) == (ready[0] if ready else None)


def is_ready(entry, key):
    return entry.key == key and entry.state == "ready"


def outbox(connection):
    rows = connection.execute("SELECT key, payload FROM sqlspace_outbox")
    return sorted((key, bytes(payload)) for key, payload in rows)


def compare_keys(connection, live, now):
    """The sums, while the dead still stand where they died."""
    view = {row[0]: row[1:] for row in connection.execute("SELECT * FROM sqlspace_keys")}
    assert set(view) == {stands_under(entry, now) for entry in live}
    for key, (ready, leased, delayed, oldest, size) in view.items():
        seen = [entry for entry in live if stands_under(entry, now) == key]
        states = [state_seen(entry, now) for entry in seen]
        assert (ready, leased, delayed) == tuple(map(states.count, ("ready", "leased", "delayed")))
        assert size == sum(len(entry.payload) for entry in seen)
        age = max(0, now - min(entry.pushed_at for entry in seen)) / SECOND
        assert abs(oldest - age) < FAR / SECOND


def compare_live(connection, found):
    """The view against what `entries` tells of each."""
    rows = {row[0]: row[1:] for row in connection.execute(VIEW_LIVE)}
    assert set(rows) == set(found)
    for seq, row in rows.items():
        entry = found[seq]
        key, state, pushed, due, expires, lease_ends, attempts, size, payload, headers = row
        assert (key, state, attempts) == (entry.key, entry.state, entry.attempts)
        assert (size, payload) == (len(entry.payload), entry.payload)
        assert json.loads(headers or "{}") == entry.headers
        assert is_near(pushed, entry.pushed_at)
        assert is_near(due, entry.due_at)
        assert is_near(expires, entry.expires_at)
        assert is_near(lease_ends, entry.deadline)


def compare_stats(connection, store):
    """The view against `stats`."""
    view = {row[0]: row[1:] for row in connection.execute("SELECT * FROM sqlspace_keys")}
    stats = store.stats().keys
    assert set(view) == {key for key, each in stats.items() if each.bytes}
    for key, (ready, leased, delayed, oldest, size) in view.items():
        found = stats[key]
        assert (ready, leased, delayed, size) == (
            *(found.ready, found.leased, found.delayed),
            found.bytes,
        )
        assert abs(oldest - found.oldest_age) < FAR / SECOND
