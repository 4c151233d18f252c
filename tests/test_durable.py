"""The Space protocol over a Store, and what becomes of a value that can't be read."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
from clocks import install

import sqlspace
from sqlspace import ClosedError, DeadlineError, DecodeError
from sqlspace.testing import check_space


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch):
    return install(monkeypatch)


def test_a_space_over_a_store_keeps_the_protocols_law(tmp_path):
    """Every law of the conformance suite."""
    number = iter(range(1000))
    opened = []

    def make():
        opened.append(sqlspace.open(tmp_path / f"{next(number)}.db", sync=False))
        return opened[-1].space()

    check_space(make)
    for store in opened:
        store.close()
    assert isinstance(opened[0].space(), sqlspace.Space)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1.5, "", "☂\0\u2028", [], [1, [2, None]], {}, {"a": {"b": [False]}}, 10**50],
    ids=repr,
)
def test_a_value_that_json_has_comes_back(store, value):
    """By each verb that gives one."""
    space = store.space()
    for _ in range(2):
        space.out("k", value)
    assert space.rd("k") == space.rdp("k") == value
    assert [space.in_("k"), space.inp("k")] == [value, value]
    assert space.len("k") == 0


def test_a_value_is_plain_json_in_the_file(store):
    """Whoever reads the store by another language can read it; a tuple comes back as a list."""
    space = store.space()
    space.out("k", {"é": (1, 2)})
    assert store.peek("k") == b'{"\xc3\xa9":[1,2]}'
    assert space.inp("k") == {"é": [1, 2]}
    store.push("k", b" [1,\n2] ")
    assert space.inp("k") == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", {1, 2}, object(), "\ud800"])
def test_what_json_has_not_is_refused_before_anything_is_added(store, value):
    """TypeError or ValueError, as the codec says."""
    with pytest.raises((TypeError, ValueError)):
        store.space().out("k", value)
    assert store.keys() == []


def test_a_codec_of_the_callers_own(store):
    """Any two functions; nothing of the default is left."""
    space = store.space(dumps=str.encode, loads=bytes.decode)
    space.out("k", "plain")
    assert store.peek("k") == b"plain"
    assert space.in_("k") == "plain"
    space = store.space(dumps=bytearray, loads=len)
    space.out("k", b"12345")
    assert space.inp("k") == 5


@pytest.mark.parametrize("result", ["text", None, 5, [b"x"]])
def test_what_dumps_returns_must_be_bytes(store, result):
    """A TypeError that says whose fault it is, and nothing is added."""
    with pytest.raises(TypeError, match="what dumps returns must be bytes-like"):
        store.space(dumps=lambda _: result).out("k", 1)
    assert store.keys() == []


def test_what_dumps_raises_comes_through(store):
    """It is the caller's own."""

    def dumps(_):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        store.space(dumps=dumps).out("k", 1)
    assert store.keys() == []


@pytest.mark.parametrize("name", ["dumps", "loads"])
def test_a_codec_must_be_callable(store, name):
    """Told at once, by its name."""
    with pytest.raises(TypeError, match=f"{name} must be callable, not str"):
        store.space(**{name: "json"})


def test_values_have_a_time_to_live(store, clock):
    """As a push has."""
    space = store.space()
    space.out("k", 1, ttl=5)
    space.out("k", 2)
    clock.go(5)
    assert (space.len("k"), space.rdp("k")) == (1, 2)
    assert space.in_("k") == 2
    assert [stone.outcome for stone in store.history("k")] in (["expired", "taken"], ["taken"])
    with pytest.raises(ValueError, match="ttl"):
        space.out("k", 1, ttl=0)


def test_values_that_are_taken_leave_tombstones_as_a_pull_does(store):
    """The space is the store's verbs, and nothing beside them."""
    space = store.space()
    space.out("k", 1)
    space.inp("k")
    assert [stone.outcome for stone in store.history("k")] == ["taken"]


# -- what can't be read

TAKES = {
    "in_": lambda space, key: space.in_(key),
    "in_ in no time": lambda space, key: space.in_(key, 0),
    "inp": lambda space, key: space.inp(key),
}
READS = {
    "rd": lambda space, key: space.rd(key),
    "rd in no time": lambda space, key: space.rd(key, 0),
    "rdp": lambda space, key: space.rdp(key),
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_a_taking_verb_moves_what_it_can_not_read_to_the_dead_letters(store, take):
    """DecodeError with all that is known; the next one is taken by the next call."""
    seq = store.push("k", b"{", headers={"a": "b"})
    store.push("k", b"2")
    space = store.space()
    with pytest.raises(DecodeError) as caught:
        take(space, "k")
    error = caught.value
    assert (error.key, error.seq, error.payload) == ("k", seq, b"{")
    assert isinstance(error.__cause__, json.JSONDecodeError)
    assert "under 'k/dead' now" in str(error)
    [letter] = store.entries("k/dead")
    assert (letter.payload, letter.headers["a"]) == (b"{", "b")
    assert letter.headers["sqlspace-reason"] == "unreadable"
    assert letter.headers["sqlspace-key"] == "k"
    assert [stone.outcome for stone in store.history("k")] == ["dead"]
    assert take(space, "k") == 2
    assert store.requeue("k") == 1
    assert store.pull("k", 0) == b"{"


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_reading_verb_leaves_what_it_can_not_read(store, read):
    """It changes nothing, however often."""
    seq = store.push("k", b"\xff")
    for _ in range(2):
        with pytest.raises(DecodeError, match="it stays") as caught:
            read(store.space(), "k")
        assert (caught.value.key, caught.value.seq, caught.value.payload) == ("k", seq, b"\xff")
        assert isinstance(caught.value.__cause__, UnicodeDecodeError)
    assert [entry.payload for entry in store.entries("k")] == [b"\xff"]
    assert store.len("k/dead") == 0


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_what_can_not_be_read_under_a_key_too_long_stays(store, take):
    """There is no KEY/dead for it: nothing is lost, and the error says where it is."""
    key = "k" * 1020
    store.push(key, b"{")
    with pytest.raises(DecodeError, match="it stays"):
        take(store.space(), key)
    assert store.pull(key, 0) == b"{"


@pytest.mark.parametrize("how", ["delayed", "lapsed", "nacked"])
@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_what_has_come_due_and_can_not_be_read_is_moved_too(store, clock, take, how):
    """It stands in nobody's way, though its row said until now that it was held."""
    store.push("k", b"{", delay=5 if how == "delayed" else 0)
    if how != "delayed":
        claimed = store.claim("k", lease=5)
    if how == "nacked":
        claimed.nack(5)
    store.push("k", b"2")
    clock.go(5)
    space = store.space()
    with pytest.raises(DecodeError, match="under 'k/dead' now"):
        take(space, "k")
    assert store.len("k/dead") == 1
    assert take(space, "k") == 2


def test_a_bad_head_that_arrives_while_a_call_waits_is_moved(store):
    """The wait ends with the error."""
    errors = []

    def take():
        try:
            store.space().in_("k", 60)
        except DecodeError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    store.push("k", b"{")
    thread.join()
    assert [error.payload for error in errors] == [b"{"]
    assert store.len("k/dead") == 1


def test_what_another_claims_while_it_is_decoded_is_not_buried(path):
    """Nothing is taken from under a worker's hands."""
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as other:
        store.push("k", b"bad")
        claimed = []

        def loads(_):
            claimed.append(other.claim("k", 0))
            raise ValueError

        with contextlib.suppress(sqlspace.DecodeError):
            store.space(loads=loads).inp("k")
        claimed[0].ack()
        assert store.len("k/dead") == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_of_loads_takes_nothing(store, error):
    """It is no fault of the entry's: that stays."""

    def loads(_):
        raise error("mine")

    store.push("k", b"1")
    space = store.space(loads=loads)
    for take in (*TAKES.values(), *READS.values()):
        with pytest.raises(error, match="mine"):
            take(space, "k")
    assert store.pull("k", 0) == b"1"


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_a_codec_that_uses_the_store_gets_a_clear_error(store, take):
    """The entry is read in the middle of a call, so another can't begin; nothing hangs."""
    seen = []

    def loads(payload):
        try:
            store.len("k")
            store.push("k", b"x")
        except ValueError as error:
            seen.append(str(error))
            raise
        return payload

    store.push("k", b"1")
    with pytest.raises(DecodeError) as caught:
        take(store.space(loads=loads), "k")
    assert isinstance(caught.value.__cause__, ValueError)
    assert "a codec, can't use it" in seen[0]
    assert store.pull("k/dead", 0) == b"1"
    assert store.keys() == []


def test_values_are_decoded_before_they_are_taken(store):
    """Nobody else has taken it, and it isn't gone, while it is read."""
    ready = []

    def loads(payload):
        with sqlspace.open(store.path, sync=False) as other:
            ready.append(other.peek("k"))
        return payload

    store.push("k", b"1")
    assert store.space(loads=loads).inp("k") == b"1"
    assert set(ready) == {b"1"}


@pytest.mark.parametrize("verb", ["in_", "inp", "rd", "rdp"])
def test_an_alarm_in_the_middle_of_the_codec_is_no_verdict_over_the_entry(store, verb):
    """What a signal's handler raises comes through as it is; the entry stays, and can be read."""
    strikes = [TimeoutError("the alarm")]

    def loads(payload):
        if strikes:
            raise strikes.pop()
        return json.loads(payload)

    store.push("k", b"1")
    space = store.space(loads=loads)
    with pytest.raises(TimeoutError, match="the alarm"):
        getattr(space, verb)("k")
    assert store.keys() == ["k"]
    assert space.inp("k") == 1


# -- shared


def test_two_processes_share_a_space(store, child):
    """Values go there and back."""
    process = child(
        """
        with sqlspace.open(argv[0], sync=False).space() as space:
            space.out("back", [space.in_("there", 60), space.rd("there", 60)])
        """,
        store.path,
    )
    space = store.space()
    space.out("there", {"a": 1})
    space.out("there", 2)
    assert space.in_("back", 60) == [{"a": 1}, 2]
    process.finish()


def test_closing_a_space_closes_its_store(path):
    """It is the same thing; verbs of both say so, and an out adds nothing."""
    store = sqlspace.open(path, sync=False)
    with store.space() as space:
        space.out("k", 1)
        assert repr(path) in repr(space)
    space.close()
    for use in (
        lambda: space.out("k", 2),
        lambda: space.in_("k"),
        lambda: space.rd("k"),
        lambda: space.inp("k"),
        lambda: space.rdp("k"),
        lambda: space.len("k"),
        lambda: store.len("k"),
    ):
        with pytest.raises(ClosedError):
            use()
    with sqlspace.open(path, sync=False) as store:
        assert store.pull_many("k", 9) == [b"1"]


def test_a_wait_in_a_space_ends_as_every_wait_does(store):
    """Its time is over; its context was canceled; nothing was taken."""
    space = store.space()
    for verb in (space.in_, space.rd):
        with pytest.raises(DeadlineError):
            verb("k", 0.01)
    context = sqlspace.Context()
    context.cancel()
    space.out("k", 1)
    for verb in (space.in_, space.rd):
        with pytest.raises(sqlspace.CanceledError):
            verb("k", context=context)
    assert space.inp("none", "default") == space.rdp("none", "default") == "default"
    assert space.len("k") == 1


def test_pickle_is_never_used(store, monkeypatch):
    """Neither to write nor to read: what others have put into the file must not run here."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (store.path + "-trap",)

    store.push("k", pickle.dumps(Trap()))
    with pytest.raises(DecodeError):
        store.space().in_("k")
    assert not os.path.exists(store.path + "-trap")
    code = (
        "import sys, sqlspace\n"
        "with sqlspace.open(sys.argv[1], sync=False).space() as space:\n"
        "    space.out('k', [1]); space.in_('k')\n"
        "sys.exit('pickle' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, store.path], check=False)
    assert done.returncode == 0
