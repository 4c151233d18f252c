"""Other queues in a SQLite file, at the same durability, and Python's two that are in memory.

Each is used as its documentation says, at its best for the same promise: a WAL, and
`synchronous=FULL` (an fsync in each put and get) or `NORMAL` (a crash of the process loses nothing,
a power cut may), both read back from its connections; one put or get is one commit. What isn't
installed, or can't give the promise, has a row that says so.
"""

import importlib
import multiprocessing
import os
import queue
import sqlite3
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import apsw
from bench_rows import Aim, Part, Plan, Row, beside, each
from bench_sides import KEY, LEASE_SECONDS, Side, in_order, in_turns
from bench_together import Client, Crew, Share, in_threads, open_ours, rate

import sqlspace

WAIT_SECONDS = 30.0
"""For SQLite's lock, as sqlspace waits."""
SIZES = {"100 B": 100, "1 KB": 1 << 10, "64 KB": 64 << 10}
AIMED_SIZE = "100 B"
LARGE = 10_000
VERBS = ("push", "pull")
FULL, NORMAL = 2, 1
OURS = "sqlspace"
OURS_CLAIMING = "sqlspace, claim and ack"
THREADS = 16
CREW = 8
MOST_ROUNDS = 4
"""Of crowds, whose members keep each other waiting for a second with some of the peers, and of
sizes that no aim is about."""


def text_of(size: int) -> bytes:
    """A payload of so many bytes that is text as well: there is a queue that holds nothing else."""
    return os.urandom(size // 2).hex().encode()


TEXT = text_of(100)

Opener = Callable[[str, Any], Client]


class Peer(NamedTuple):
    name: str
    open: Opener
    package: str = ""
    per_thread: bool = False
    """Whether each thread needs a client of its own."""
    ours: str = OURS
    """What of ours promises the same."""
    in_memory: bool = False


def _checked(connections: Sequence[Any], sync: bool) -> None:
    """That they promise what is measured.

    Args:
        connections: Of sqlite3, or whatever has its `execute`.
        sync: Whether each commit is to be on the disk.
    """
    for connection in connections:
        found = [
            connection(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
        ]
        if found != ["wal", FULL if sync else NORMAL]:
            raise AssertionError(f"journal_mode and synchronous are {found}")


def _promise(connections: Sequence[sqlite3.Connection], sync: bool) -> None:
    """Have them promise what is measured."""
    for connection in connections:
        connection.execute(f"PRAGMA synchronous={FULL if sync else NORMAL}")
    _checked([connection.execute for connection in connections], sync)


def open_ours_claiming(path: str, sync: Any) -> Client:
    """A Store whose take is a claim and an ack, which is what others call get and ack."""
    store = sqlspace.open(path, sync=sync, history=None)

    def get() -> object:
        delivery = store.claimp(KEY, lease=LEASE_SECONDS)
        if delivery is None:
            return None
        delivery.ack()
        return delivery.payload

    return Client(lambda payload: store.push(KEY, payload), get, store.close)


def open_persist_queue(path: str, sync: bool) -> Client:
    import persistqueue

    found = persistqueue.SQLiteQueue(
        path, auto_commit=True, multithreading=True, timeout=WAIT_SECONDS
    )
    _promise([found._putter, found._getter], sync)
    return Client(
        found.put, _or_none(lambda: found.get(block=False), persistqueue.Empty), found.close
    )


def open_persist_ack_queue(path: str, sync: bool) -> Client:
    import persistqueue

    found = persistqueue.SQLiteAckQueue(
        path, auto_commit=True, multithreading=True, timeout=WAIT_SECONDS
    )
    _promise([found._putter, found._getter], sync)

    def get() -> object:
        try:
            item = found.get(block=False, raw=True)
        except persistqueue.Empty:
            return None
        found.ack(item)
        return item

    def tidy() -> None:
        found.clear_acked_data(max_delete=None, keep_latest=None)

    return Client(found.put, get, found.close, tidy)


def open_litequeue(path: str, sync: bool) -> Client:
    from litequeue import LiteQueue

    found = LiteQueue(path, timeout=WAIT_SECONDS)
    _promise([found.conn], sync)

    def put(payload: bytes) -> None:
        found.put(payload.decode("ascii"))  # it holds text

    def tidy() -> None:
        found.conn.execute("UPDATE [Queue] SET status = 2 WHERE status = 1")  # as done() does
        found.prune()

    return Client(put, found.pop, found.close, tidy)


def open_diskcache(path: str, sync: bool) -> Client:
    from diskcache import Cache, Deque

    cache = Cache(
        path,
        timeout=WAIT_SECONDS,
        eviction_policy="none",
        cull_limit=0,
        disk_min_file_size=1 << 30,  # what it keeps in files of their own it doesn't fsync
        sqlite_synchronous=FULL if sync else NORMAL,
    )
    found = Deque.fromcache(cache)
    _checked([cache._sql], sync)
    return Client(found.append, _or_none(found.popleft, IndexError), cache.close)


def open_huey(path: str, sync: bool) -> Client:
    from huey.storage import SqliteStorage

    # fsync=False would be synchronous=OFF, which promises less than the others do.
    found = SqliteStorage(filename=path, fsync=True, timeout=WAIT_SECONDS, strict_fifo=True)
    _promise([found.conn], sync)
    return Client(found.enqueue, found.dequeue, found.close)


def open_queue(path: str, sync: bool) -> Client:  # noqa: ARG001  # it has neither
    found: queue.Queue[bytes] = queue.Queue()
    return Client(found.put, _or_none(found.get_nowait, queue.Empty), lambda: None)


def open_processes_queue(path: str, sync: bool) -> Client:  # noqa: ARG001  # nor has this
    found: Any = multiprocessing.Queue()

    def get() -> object:
        return found.get()  # its get_nowait doesn't see what put has just been given

    return Client(found.put, get, found.close)


def _or_none(get: Callable[[], object], empty: type[Exception]) -> Callable[[], object]:
    def take() -> object:
        try:
            return get()
        except empty:
            return None

    return take


SQLITE = (
    Peer("persist-queue SQLiteQueue", open_persist_queue, "persist-queue"),
    Peer(
        "persist-queue SQLiteAckQueue",
        open_persist_ack_queue,
        "persist-queue",
        ours=OURS_CLAIMING,
    ),
    Peer("litequeue", open_litequeue, "litequeue", per_thread=True),
    Peer("diskcache Deque", open_diskcache, "diskcache"),
    Peer("huey SqliteStorage", open_huey, "huey"),
)
MEMORY = (
    Peer("queue.Queue", open_queue, in_memory=True),
    Peer("multiprocessing.Queue", open_processes_queue, in_memory=True),
)
OWN = (Peer(OURS, open_ours), Peer(OURS_CLAIMING, open_ours_claiming))
MODULES = {"persist-queue": "persistqueue"}


def installed() -> tuple[list[Peer], list[str]]:
    """Those that are there, and a row's name and reason for each that isn't."""
    there, missing = [], []
    for peer in SQLITE:
        try:
            importlib.import_module(MODULES.get(peer.package, peer.package))
        except ImportError:
            missing.append(peer.name)
        else:
            there.append(peer)
    return there, missing


def versions(packages: Sequence[str]) -> str:
    """Which of them are measured."""
    found = []
    for package in dict.fromkeys(packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def alone(plan: Plan) -> list[Part]:
    """One client that puts and gets, by size and promise."""
    part = Part("Beside other queues, one client", "× its speed", "sqlspace, µs", "it, µs")
    there, missing = installed()
    for sync, most, bound in ((False, plan.times, 2), (True, plan.fsyncs // 2, 1)):
        for size_name, size in SIZES.items():
            # Enough that each batch has its share of checkpoints.
            times = max(2, most // (10 if size > LARGE and not sync else 1))
            measured = [*there, *(() if sync else MEMORY)]
            aimed = size_name == AIMED_SIZE
            rounds = plan.rounds if aimed else min(plan.rounds, MOST_ROUNDS)
            found = _lone_figures(
                replace(plan, rounds=rounds), [*OWN, *measured], sync, times, size
            )
            for peer in measured:
                for verb in VERBS:
                    own, other = found[verb, peer.ours], found[verb, peer.name]
                    counts = aimed and not peer.in_memory
                    row = beside(
                        f"{peer.name}: {_called(verb, peer)}, {size_name}, {_promised(sync)}"
                        + (" (in memory)" if peer.in_memory else ""),
                        each(other, own),
                        own,
                        other,
                        Aim("≥", bound) if counts else None,
                        bar=(_panel("one client", sync), peer.name, verb) if counts else None,
                    )
                    part.rows.append(row)
            plan.step()
    part.rows += [Row(name, [], None, "not installed") for name in missing]
    part.notes.append(
        "Each with a WAL and synchronous=FULL (fsync) or NORMAL (no fsync), read back; theirs is "
        f"SQLite {sqlite3.sqlite_version}, ours {apsw.sqlite_lib_version()}. Between rounds, "
        "untimed, what SQLiteAckQueue and litequeue keep of what was taken is cleared away. huey "
        "is strictly FIFO, as the others are; diskcache keeps large values in the database too, "
        "since it doesn't fsync files. " + versions([peer.package for peer in there])
    )
    return [part]


def _called(verb: str, peer: Peer) -> str:
    return "claim and ack" if (verb, peer.ours) == ("pull", OURS_CLAIMING) else verb


def _promised(sync: bool) -> str:
    return "fsync" if sync else "no fsync"


def _panel(crowd: str, sync: bool) -> str:
    return f"{crowd}, {_promised(sync)}"


def _lone_figures(
    plan: Plan, peers: Sequence[Peer], sync: bool, times: int, size: int
) -> dict[tuple[str, str], list[float]]:
    payload = text_of(size)
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        sides: dict[str, Side] = {}
        for nth, peer in enumerate(peers):
            client = peer.open(os.path.join(place, str(nth)), sync)
            stack.callback(client.close)
            sides[peer.name] = _side(client, payload)
        return in_turns(sides, ("tidy", *VERBS), plan.rounds, times)


def _side(client: Client, payload: bytes) -> Side:
    def push(times: int) -> None:
        for _ in range(times):
            client.put(payload)

    def pull(times: int) -> None:
        for _ in range(times):
            if client.get() is None:
                raise AssertionError("an entry is missing")

    return {"tidy": lambda _: client.tidy(), "push": push, "pull": pull}


Run = Callable[[str, float], list[Share]]
"""Runs a verb for so many seconds in all of a crowd."""


def crowded(plan: Plan) -> list[Part]:
    """16 threads, and 8 processes, with fsync."""
    part = Part("Beside other queues, many clients, fsync", "× its speed", "sqlspace, /s", "it, /s")
    there, missing = installed()
    peers = [*OWN, *there]
    sides: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        for nth, peer in enumerate(peers):
            path = os.path.join(place, str(nth))
            clients = [peer.open(path, True) for _ in range(THREADS if peer.per_thread else 1)]
            for client in clients:
                stack.callback(client.close)
            sides[peer.name] = _thread_run(clients)
        _show_crowd(part, f"{THREADS} threads", there, _rounds(plan, sides))
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        for nth, peer in enumerate(peers):
            sync: object = "group" if peer in OWN else True
            crew = Crew(peer.open, os.path.join(place, str(nth)), sync, CREW)
            sides[peer.name] = _process_run(stack.enter_context(crew))
        _show_crowd(part, f"{CREW} processes", there, _rounds(plan, sides))
    part.rows += [Row(name, [], None, "not installed") for name in missing]
    part.notes.append(
        'Processes: sqlspace with sync="group", the same promise. persist-queue\'s SQLiteQueue '
        "and SQLiteAckQueue may give an entry to two processes."
    )
    return [part]


def _thread_run(clients: Sequence[Client]) -> Run:
    def run(verb: str, seconds: float) -> list[Share]:
        verbs = [clients[nth % len(clients)].verb(verb, TEXT) for nth in range(THREADS)]
        return in_threads(verbs, seconds)

    return run


def _process_run(crew: Crew) -> Run:
    return lambda verb, seconds: crew.run(verb, seconds, TEXT)


class Crowd(NamedTuple):
    """What a side's crowd has done."""

    rates: list[float]
    errors: list[str]


def _rounds(plan: Plan, sides: Mapping[str, Run]) -> dict[tuple[str, str], Crowd]:
    found: dict[tuple[str, str], Crowd] = {}
    for nth in range(min(plan.rounds, MOST_ROUNDS) + 1):
        for verb in VERBS:
            for side in in_order(sides, nth):
                shares = sides[side](verb, plan.seconds)
                crowd = found.setdefault((verb, side), Crowd([], []))
                if nth:
                    crowd.rates.append(rate(shares))
                    crowd.errors.extend(share.error for share in shares if share.errors)
        for side in sides:
            sides[side]("tidy", plan.seconds)
        plan.step()
    return found


def _show_crowd(
    part: Part, name: str, peers: Sequence[Peer], found: Mapping[tuple[str, str], Crowd]
) -> None:
    for peer in peers:
        for verb in VERBS:
            own, other = found[verb, peer.ours], found[verb, peer.name]
            part.rows.append(
                beside(
                    f"{peer.name}: {name}, {_called(verb, peer)}",
                    each(own.rates, other.rates),
                    own.rates,
                    other.rates,
                    Aim("≥", 2),
                    bar=(_panel(name, True), peer.name, verb),
                )
            )
            if other.errors:
                part.notes.append(
                    f"{peer.name}, {name}, {verb}: {len(other.errors)} times {other.errors[-1]}"
                )
            for error in own.errors:
                raise AssertionError(error)
