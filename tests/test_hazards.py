"""What may happen to any store, and what must come of it: the hazards that no module has alone.

`DEFENCES` says for every known hazard which code guards against it, and which test fails without.
"""

import importlib
import os
import pathlib
import random
import re
import subprocess
import sys

import apsw
import pytest
from clocks import YEAR_SECONDS, install
from proof import tried

import sqlspace
from sqlspace import LeaseError

# hazard: (guard, as module.name; test, as file.name, of tests/)
DEFENCES = {
    # silent loss or corruption
    "a fork, and parent and child go on": (
        "session.Session.abandon",
        "test_processes.test_a_forked_child_is_safe_when_its_parent_ends",
    ),
    "a fork while others are inside SQLite": (
        "database.Database.before_fork",
        "test_processes.test_a_fork_while_other_threads_are_inside_verbs_does_not_lock_up",
    ),
    "a fork beside a connection of the application's": (
        "connection.holds_lock",
        "test_processes.test_an_inherited_connection_of_the_application_is_refused",
    ),
    "a fork inside a transaction": (
        "forks.detach",
        "test_transaction.test_a_child_that_was_forked_inside_rolls_nothing_of_its_parents_back",
    ),
    "a fork while SQLite waits": (
        "session.Session.abandon",
        "test_committer.test_a_child_that_is_forked_while_sqlite_waits_does_nothing_and_ends",
    ),
    "Python's sqlite3 on the same file": (
        "guard.Guard",
        "test_guard.test_a_look_with_another_library_loses_acknowledged_pushes_unless_it_is_refused",
    ),
    "our own opening and closing of the file": (
        "connection.open_verified",
        "test_hazards.test_no_descriptor_of_the_database_is_opened_past_sqlite",
    ),
    "unlinked, replaced, moved before a write": (
        "database.Database.lead",
        "test_doorbell.test_a_file_that_moved_underneath_takes_no_more_entries",
    ),
    "the same, before the acknowledgement": (
        "identity.Identity.stands",
        "test_doorbell.test_a_file_that_moves_during_the_commit_is_noticed_before_the_answer",
    ),
    "a second hard link": (
        "connection.check_in_place",
        "test_open.test_a_file_with_a_second_hard_link_is_refused",
    ),
    "an old -wal beside a restored file": (
        "store.Store.backup",
        "test_bad_input.test_a_backup_refuses_what_is_left_of_another_file",
    ),
    "Ctrl-C anywhere in a verb": (
        "waiting.surely",
        "test_committer.test_ctrl_c_anywhere_undoes_the_call_it_strikes_and_no_other",
    ),
    "any other exception of a signal's handler": (
        "commits.is_interrupt",
        "test_committer.test_whatever_a_signals_handler_raises_undoes_the_call_it_strikes_and_no_other",
    ),
    "a writer frozen inside its commit": (
        "committer.Committer.submit",
        "test_turnstile.test_a_frozen_writer_blocks_nobody_beyond_busy_timeout",
    ),
    "two threads on one connection": (
        "committer.Committer",
        "test_committer.test_sixteen_threads_with_all_verbs_and_ctrl_c_do_each_thing_once",
    ),
    "an SQLite with the WAL-reset bug": (
        "connection._SQLITE_NEEDED",
        "test_hazards.test_an_sqlite_with_the_wal_reset_bug_is_refused_at_the_import",
    ),
    "planted triggers and views, seqs near the end": (
        "schema.examine",
        "test_open.test_a_schema_that_was_tampered_with_is_refused",
    ),
    "a trigger planted while the store is open": (
        "connection.connect",
        "test_hazards.test_a_trigger_that_is_planted_while_the_store_is_open_does_not_run",
    ),
    "another application's database": (
        "schema.foreign",
        "test_open.test_another_applications_file_is_refused_in_wal_mode",
    ),
    # availability
    "a disk too full for the -shm": (
        "reserve.is_tight",
        "test_reserve.test_where_the_shm_has_no_room_an_open_is_refused",
    ),
    "eight processes create the file at once": (
        "connection._patiently",
        "test_open.test_eight_processes_open_a_new_path_at_once_and_all_succeed",
    ),
    "a VACUUM beside writers": (
        "database.Database.checkpoint",
        "test_hazards.test_compact_leaves_no_long_wal_behind",
    ),
    "a reader that never ends": (
        "browsing.live",
        "test_hazards.test_who_reads_without_end_does_not_keep_the_wal_from_being_cut",
    ),
    "Ctrl-C while waiting for the write lock": (
        "session._Patience",
        "test_turnstile.test_ctrl_c_ends_the_wait_for_the_lock_at_once",
    ),
    "a user who may only read; permissions": (
        "connection.check_in_place",
        "test_open.test_what_may_not_be_read_and_written_is_refused_before_any_statement",
    ),
    "a directory, a pipe, a loop of links": (
        "connection.check_in_place",
        "test_open.test_what_is_no_regular_file_is_refused",
    ),
    "no more descriptors": (
        "database.Database",
        "test_hazards.test_an_open_without_descriptors_is_one_store_error_at_whatever_point",
    ),
    "no more memory": (
        "database.Database.mapped",
        "test_hazards.test_a_verb_without_memory_is_one_store_error_and_loses_nothing",
    ),
    "network file systems": (
        "mounts.network_file_system",
        "test_open.test_a_network_file_system_is_refused_unless_told_otherwise",
    ),
    "a relative path and chdir": (
        "opening.check_path",
        "test_open.test_a_relative_path_stays_the_same_file_after_chdir",
    ),
    "a clock that jumps": (
        "rules.OVER",
        "test_hazards.test_a_clock_that_jumps_by_years_loses_and_doubles_nothing",
    ),
    "the interpreter's end with threads that wait": (
        "watch.Watch",
        "test_doorbell.test_the_interpreter_ends_although_daemon_threads_wait",
    ),
    "the same, in blocks of deliveries": (
        "delivery.Renewals.end",
        "test_delivery.test_an_interpreter_ends_while_daemon_threads_are_inside_of_blocks",
    ),
    # over JetStream
    "a NATS server that gets SIGKILL": (
        "jetstream.connection.Connection.request",
        "test_jetstream.test_a_server_that_dies_is_waited_for_and_nothing_is_lost",
    ),
    "a claim whose answer was lost": (
        "jetstream.receipts.Receipts.undo",
        "test_jetstream.test_a_claim_that_was_given_up_without_an_answer_lands_in_vain",
    ),
    "a taker that dies over an entry": (
        "jetstream.receipts.Receipts.sweep",
        "test_jetstream.test_the_entry_of_a_taker_that_died_is_passed_by_and_then_deleted",
    ),
    "a taker that was taken for dead": (
        "jetstream.receipts.DOOMED",
        "test_jetstream.test_a_taker_that_comes_back_after_its_entry_was_taken_off_it_loses_nothing",
    ),
    "a taker that slept for longer than receipts stay": (
        "jetstream.receipts.TRUST_SECONDS",
        "test_jetstream.test_a_slow_claim_of_an_entry_whose_receipt_is_gone_takes_nothing",
    ),
    "a ring that comes for a taker that was canceled": (
        "jetstream.bells.Bells",
        "test_jetstream.test_a_ring_that_came_for_a_taker_that_was_canceled_wakes_another",
    ),
    "a fork beside a loop": (
        "jetstream.threads.JetStream",
        "test_jetstream.test_a_forked_child_connects_anew",
    ),
}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.mark.parametrize(("guard", "test"), DEFENCES.values(), ids=DEFENCES)
def test_every_hazard_has_its_guard_and_its_test(guard, test):
    """The list is true: what it names is there."""
    module, _, name = guard.partition(".")
    found = importlib.import_module(f"sqlspace.{module}")
    for each in name.split("."):
        found = getattr(found, each)
    file, _, name = test.partition(".")
    text = pathlib.Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.MULTILINE)


WATCHED = """
opened = []

def hear(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):
        if os.path.realpath(os.fsdecode(arguments[0])) in (path, path + "-shm"):
            opened.append(arguments)

path = argv[0]
sqlspace.open(path).close()
sys.addaudithook(hear)
with sqlspace.open(path, busy_timeout=5) as store, sqlspace.open(path) as second:
    store.push("k", b"x", dedupe="d")
    second.push_many("k", [b"x"] * 3)
    store.pull("k"), second.claim("k").ack(), store.peek("k"), store.len("k"), store.keys()
    with store.transaction() as together:
        together.put("k", b"x")
    list(store.entries("k")), list(store.history("k")), store.stats()
    try:
        store.pull("none", 0.01)
    except sqlspace.DeadlineError:
        pass
    store.compact(), store.backup(path + "-copy")
    from sqlspace import checkup
    list(checkup.look(path, allow_network=False, busy_timeout=5))
tell(opened)
"""


def test_no_descriptor_of_the_database_is_opened_past_sqlite(path, child):
    """To close one would drop all locks that SQLite has on it, in the whole process."""
    process = child(WATCHED, path)
    process.expect("[]")
    process.finish()


OLD = """
import apsw, sys
apsw.sqlite_lib_version = lambda: sys.argv[1]
import sqlspace
"""


@pytest.mark.parametrize(("version", "taken"), [("3.51.2", False), ("3.7.0", False), ("3.51.3", 1)])
def test_an_sqlite_with_the_wal_reset_bug_is_refused_at_the_import(version, taken):
    """From 3.7.0 to 3.51.2 it could lose commits."""
    done = subprocess.run(
        [sys.executable, "-c", OLD, version], capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == bool(taken)
    assert taken or f"needs SQLite 3.51.3 or later inside apsw, not {version}" in done.stderr


def test_a_trigger_that_is_planted_while_the_store_is_open_does_not_run(path):
    """The look at the schema is at the open; afterwards no trigger and no view runs."""
    with sqlspace.open(path) as store:
        other = apsw.Connection(path)
        other.execute(
            "CREATE TRIGGER mine AFTER INSERT ON sqlspace_entries BEGIN"
            " DELETE FROM sqlspace_entries; END"
        )
        other.close()
        store.push("k", b"x")
        assert store.pull_many("k", 2) == [b"x"]


def test_compact_leaves_no_long_wal_behind(path):
    """The rewriting goes through the -wal, which would be as long as the file for ever."""
    with sqlspace.open(path) as store, sqlspace.open(path) as other:
        store.push_many("k", [b"x" * 10_000] * 300)
        other.push("k", b"y")
        store.compact()
        assert os.stat(path + "-wal").st_size == 0
        assert other.len("k") == 301


@pytest.mark.parametrize("reader", ["entries", "history"])
def test_who_reads_without_end_does_not_keep_the_wal_from_being_cut(path, reader):
    """It holds no transaction between what it yields, so a checkpoint gets to the end."""
    with sqlspace.open(path, history=None) as store:
        store.push_many("k", [b"x"] * 5000)
        if reader == "history":
            store.pull_many("k", 5000)
        reading = iter(getattr(store, reader)("k"))
        assert next(reading).seq == 1
        store.push("k", b"y")
        store.compact()
        assert os.stat(path + "-wal").st_size == 0


NO_DESCRIPTORS = """
import contextlib, resource

path, hard = argv[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with sqlspace.open(path) if argv[1] == "used before" else contextlib.nullcontext() as store:
    if store is not None:
        store.push("k", b"x")
import apsw, inotify_simple, ctypes
for more in range(100):
    highest = max(int(each) for each in os.listdir("/proc/self/fd")[:-1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, hard))
    try:
        store = sqlspace.open(path)
    except sqlspace.StoreError as error:
        assert path in str(error), error
        assert isinstance(error.__cause__, (OSError, apsw.Error)), error
        continue
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    break
tell("failed" if more else "never failed")
store.push("k", b"x")
assert store.pull("k") == b"x"
store.close()
"""


@pytest.mark.parametrize("process", ["new", "used before"])
def test_an_open_without_descriptors_is_one_store_error_at_whatever_point(path, child, process):
    """With one more each time, until there are enough; then all is well."""
    started = child(NO_DESCRIPTORS, path, process)
    started.expect("failed")
    started.finish()


NO_MEMORY = """
import apsw

big = b"x" * 5_000_000
def all_or_none():
    with store.transaction() as together:
        together.push("k", b"small")
        together.push("k", big)

with sqlspace.open(argv[0]) as store:
    store.push("k", b"kept")
    assert store.len("k") == 1
    for verb in (lambda: store.push("k", big), lambda: store.push_many("k", [b"small", big]),
                 lambda: store.put("k", big), all_or_none):
        apsw.hard_heap_limit(apsw.memory_used() + 100_000)
        try:
            verb()
        except sqlspace.StoreError as error:
            assert argv[0] in str(error) and "memory" in str(error.__cause__)
            tell("refused")
        apsw.hard_heap_limit(0)
        assert [entry.payload for entry in store.entries("k")] == [b"kept"]
    store.push("k", big)
    assert store.pull_many("k", 3) == [b"kept", big]
"""


def test_a_verb_without_memory_is_one_store_error_and_loses_nothing(path, child):
    """SQLite is denied what a payload takes; afterwards all goes on."""
    process = child(NO_MEMORY, path)
    process.expect(*["refused"] * 4)
    process.finish()


# -- the clock

STEPS = 500
LONGEST_SECONDS = 100.0


class Storm:
    """Verbs at random while the clock jumps; what must hold is asserted after each."""

    def __init__(self, store, clock, seed):
        self.store, self.clock, self.random = store, clock, random.Random(seed)
        self.pushed, self.mortal = set(), set()  # payloads; the latter have a ttl
        self.gone = set()  # pulled, or acked
        self.deliveries = []  # with what this clock can't touch: until when it holds
        self.monotonic = 0.0
        self.jumps = 0

    def jump(self):
        self.jumps += 1
        self.deliveries = [(delivery, None) for delivery, _ in self.deliveries]  # no promise holds
        self.clock.micros = 1_800_000_000_000_000  # START, so that they don't add up
        self.clock.go(self.random.uniform(-40, 40) * YEAR_SECONDS)

    def creep(self):
        seconds = self.random.choice([0.0, 0.001, 1.0, 20.0])
        self.monotonic += seconds
        self.clock.go(seconds)

    def key(self):
        return self.random.choice("ab")

    def seconds(self):
        return self.random.uniform(1, LONGEST_SECONDS)

    def push(self):
        payload = b"%d" % len(self.pushed)
        ttl = self.seconds() * 2 if self.random.random() < 0.2 else None
        delay = self.random.choice([None, 0.5, ttl / 2 if ttl else self.seconds()])
        self.store.push(self.key(), payload, ttl=ttl, delay=delay)
        self.pushed.add(payload)
        if ttl:
            self.mortal.add(payload)

    def first(self, key):
        return next((e for e in self.store.entries(key) if e.state == "ready"), None)

    def pull(self):
        key = self.key()
        expected = self.first(key)
        payload = self.store.pullp(key)
        assert payload == (expected and expected.payload), "the ready one of the lowest seq"
        if payload is not None:
            self.see(payload)
            self.gone.add(payload)

    def claim(self):
        key, lease = self.key(), self.seconds()
        expected = self.first(key)
        delivery = self.store.claimp(key, lease=lease, max_attempts=self.random.choice([None, 9]))
        assert (delivery and delivery.seq) == (expected and expected.seq)
        if delivery is not None:
            self.see(delivery.payload)
            self.deliveries.append((delivery, self.monotonic + lease))

    def see(self, payload):
        """It is handed out: it was pushed, is not gone, and no live lease holds it."""
        assert payload in self.pushed - self.gone
        for delivery, until in self.deliveries:
            held = until is not None and self.monotonic < until
            assert delivery.payload != payload or not held, "delivered twice within a live lease"

    def settle(self):
        if not self.deliveries:
            return
        at = self.random.randrange(len(self.deliveries))
        delivery, until = self.deliveries.pop(at)
        kind, length = self.random.choice(["ack", "nack", "extend"]), self.seconds()
        try:
            if kind == "ack":
                delivery.ack()
                assert delivery.payload not in self.gone, "acked after it was pulled or acked"
                self.gone.add(delivery.payload)
            elif kind == "nack":
                delivery.nack(self.random.choice([0, length]))
            else:
                delivery.extend(length)
                self.deliveries.append((delivery, self.monotonic + length))
        except LeaseError:
            assert until is None or self.monotonic >= until, "a live lease was lost"

    def check_end(self):
        """No jumps any more: all that is held is over in time, and each entry is there once."""
        self.clock.go(2 * 2 * LONGEST_SECONDS + 61)  # a time to live is up to twice the longest
        keys = self.store.keys()
        live = [entry for key in keys for entry in self.store.entries(key)]
        assert {entry.state for entry in live} <= {"ready"}
        assert not self.mortal & {entry.payload for entry in live if entry.key in ("a", "b")}
        found = [entry.payload for entry in live]
        assert len(set(found)) == len(found)
        assert not self.gone & set(found)
        assert self.pushed - self.mortal <= self.gone | set(found)


@pytest.mark.parametrize("seed", range(6))
def test_a_clock_that_jumps_by_years_loses_and_doubles_nothing(path, monkeypatch, seed):
    """Order and safety never depend on it; without a jump every lease holds; nothing sticks."""
    clock = install(monkeypatch)
    with sqlspace.open(path, sync=False, history=None) as store:
        storm = Storm(store, clock, seed)
        verbs = [storm.push] * 4 + [storm.pull, storm.claim, storm.claim, storm.settle, storm.creep]
        for _ in range(STEPS):
            storm.random.choice(verbs)()
            if storm.random.random() < 0.03:
                storm.jump()
        storm.check_end()
        assert storm.jumps > 3
        assert storm.gone
    tried(
        "a clock that jumps by years",
        f"{storm.jumps} jumps, {STEPS} verbs",
        seeds=seed,
        found="0 lost, 0 twice, 0 stuck",
    )
