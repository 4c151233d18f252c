"""A file's lines through one sqlspace store, with a dead endpoint and two kills on the way.

The plot, each role a process of its own that opens the same file with sync=True:

- Four producers push every line as a message of its own: line n by producer n // 4 % 4, under the
  key `lines/{n % 4}`. Each notes what was acknowledged (line and seq, one write) in a log.
- Three consumers compete for all four keys and hand each message to an endpoint over a socket. The
  endpoint is down at first. Nobody pulls what can't be delivered, so the file holds everything.
- In the outage one producer gets SIGKILL. The push after its last acknowledged one is undecided: it
  may stand in the store or not. The producer that takes its place asks the store, and then either
  notes the seq it found or pushes that line again.
- The endpoint comes up. One consumer gets SIGKILL, and another takes its place. What the dead one
  had taken and not delivered is gone, and is named at the end: a pull is at most once.
- At last one process waits and another pushes single messages, to see how fast waiting ends.

The seed decides who is killed, at which message, and at which of three moments: at two of them the
victim stands still until the signal comes, so that it strikes exactly there; at the third, inside
the push or the pull, it strikes wherever it does. `verify` judges only what lies on the disk at the
end: the logs of the producers, what the endpoint wrote, and the history in the store's own file.
"""

import argparse
import contextlib
import fileinput
import itertools
import json
import mmap
import os
import random
import select
import shlex
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apsw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import sqlspace

KEYS = [f"lines/{number}" for number in range(4)]
PRODUCERS = 4
CONSUMERS = 3
STOP = "stop"  # the key of the messages that send a consumer home; last in the order of its pulls
BEFORE_PUSH, IN_PUSH, AFTER_PUSH = "before its push", "inside its push", "after its push"
IN_PULL, IN_HAND, UNCONFIRMED = "inside its pull", "with a message in hand", "after its delivery"

RECORD = struct.Struct("=QQ")  # a producer's log: a line's number, its seq
PARCEL = struct.Struct("=II")  # to the endpoint and in its file: from whom, how long; the payload
LONGEST_LINE = 999_000_000  # bytes; what surely fits into a row with its frame
DEFAULT_LINES = 40_000
DEFAULT_SECONDS = 5  # as long as one process would push at least; a slow disk gets fewer lines
PINGS = 200
STALLED_SECONDS = 60


def owner(line: int) -> int:
    """Which producer pushes a line."""
    return line // len(KEYS) % PRODUCERS


def key_of(line: int) -> str:
    return KEYS[line % len(KEYS)]


# -- the workers


def work(task: dict[str, Any]) -> None:
    """What a worker process does."""
    if task["role"] != "endpoint":  # which has to finish first
        threading.Thread(target=leave_with_director, daemon=True).start()
    {"producer": produce, "consumer": consume, "endpoint": receive, "listener": listen}[
        task["role"]
    ](task)


def leave_with_director() -> None:
    os.read(0, 1)
    os._exit(3)


def tell(task: dict[str, Any], *words: object) -> None:
    """One line to the director, in one write to the pipe that all workers share."""
    os.write(1, (" ".join(map(str, (task["name"], *words))) + "\n").encode())


def strike(task: dict[str, Any], number: int, moment: str) -> None:
    """If the seed says so, ask for SIGKILL; and wait for it, unless it is to come unforeseen."""
    if task["fatal"] == [number, moment]:
        tell(task, "strike")
        while moment not in (IN_PUSH, IN_PULL):
            signal.pause()


def read_log(path: str) -> list[tuple[int, int]]:
    """What a producer had acknowledged: line and seq, in its order."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        notes = file.read()
        return list(RECORD.iter_unpack(notes[: len(notes) // RECORD.size * RECORD.size]))
    return []


def produce(task: dict[str, Any]) -> None:
    """Push this producer's lines, from where its log ends."""
    me, path = task["number"], f"producer-{task['number']}.log"
    done = len(read_log(path))
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.truncate(log, done * RECORD.size)
    with sqlspace.open(task["store"], history=None) as store, open("input", "rb") as file:
        lines = (pair for pair in enumerate(file, 1) if owner(pair[0]) == me)
        for number, (line, text) in enumerate(itertools.islice(lines, done, None), done + 1):
            seq = None
            payload = b"%d %d %b" % (me, line, text)
            if task["heir"] and number == done + 1:
                seq = find(store, key_of(line), payload)
                tell(task, "decided", done, line, seq or "absent")
            if seq is None:
                strike(task, number, BEFORE_PUSH)
                strike(task, number, IN_PUSH)
                seq = store.push(key_of(line), payload)
                strike(task, number, AFTER_PUSH)
            os.write(log, RECORD.pack(line, seq))


def find(store: sqlspace.Store, key: str, payload: bytes) -> int | None:
    """The seq of an undecided push, or None: it didn't happen.

    Its author is dead, and in the outage nobody pulls: what isn't among the live entries never was.
    """
    return next((entry.seq for entry in store.entries(key) if entry.payload == payload), None)


def consume(task: dict[str, Any]) -> None:
    """Pull from all keys in turn, and deliver."""
    with sqlspace.open(task["store"], history=None) as store, connected() as endpoint:
        for number in itertools.count(1):
            turn = number % len(KEYS)
            strike(task, number, IN_PULL)
            key, payload = store.pull_any([*KEYS[turn:], *KEYS[:turn], STOP])
            if key == STOP:
                return
            strike(task, number, IN_HAND)
            endpoint.sendall(PARCEL.pack(task["life"], len(payload)) + payload)
            strike(task, number, UNCONFIRMED)
            if not endpoint.recv(1):
                raise ConnectionError("the endpoint is gone")


def connected() -> socket.socket:
    """A connection to the endpoint, tried for until it is up, as with any endpoint."""
    while True:
        endpoint = socket.socket(socket.AF_UNIX)
        try:
            endpoint.connect("endpoint")
            return endpoint
        except OSError:
            endpoint.close()
            time.sleep(0.02)


def receive(_: dict[str, Any]) -> None:
    """Be the endpoint: write down what comes, then confirm it."""
    lock = threading.Lock()
    with open("delivered", "ab", buffering=0) as file, open("tally", "ab", buffering=0) as tally:

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while len(head := self.rfile.read(PARCEL.size)) == PARCEL.size:
                    payload = self.rfile.read(PARCEL.unpack(head)[1])
                    if len(payload) < PARCEL.unpack(head)[1]:
                        return  # its sender died on the way
                    with lock:
                        file.write(head + payload)
                        tally.write(b".")
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self.wfile.write(b"!")

        with socketserver.ThreadingUnixStreamServer("endpoint", Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            os.read(0, 1)  # until the director hangs up
            server.shutdown()


def listen(task: dict[str, Any]) -> None:
    """Wait for single messages, and tell how long each was on its way."""
    with sqlspace.open(task["store"], history=None) as store:
        for _ in range(PINGS):
            tell(task, "listening")
            sent_ns = int(store.pull("ping"))
            tell(task, "heard", time.monotonic_ns() - sent_ns)


# -- the proof


class Verdict(NamedTuple):
    """What came of it.

    Attributes:
        problems: What is missing, doubled, altered or out of order; empty if it is proven.
        in_hand: Lines that were taken and not delivered, as many as a killed consumer explains.
        deliveries: Of each consumer.
    """

    problems: list[str]
    in_hand: list[int]
    deliveries: dict[int, int]


def verify(
    lines: Any,
    logs: list[list[tuple[int, int]]],
    delivered: Iterable[tuple[int, bytes]],
    taken: dict[str, list[int]],
    killed_consumers: int,
) -> Verdict:
    """Compare what came out with what went in.

    Args:
        lines: The input's lines, by their numbers from 1.
        logs: Each producer's: line and seq of what was acknowledged.
        delivered: What the endpoint wrote: from which consumer, and the payload.
        taken: Of each key the seqs of its history, in the order of taking.
        killed_consumers: Each explains one message that was taken and not delivered.
    """
    problems: list[str] = []
    pushed: dict[str, list[int]] = {key: [] for key in KEYS}
    for producer, log in enumerate(logs):
        expected = (line for line in range(1, len(lines) + 1) if owner(line) == producer)
        for line, (noted, _) in itertools.zip_longest(expected, log, fillvalue=(None, None)):
            if line != noted:
                problems.append(f"producer {producer}: line {noted} noted in place of {line}")
                break
        if any(seq >= later for (_, seq), (_, later) in itertools.pairwise(log)):
            problems.append(f"producer {producer}: its seqs don't grow")
        for line, seq in log:
            pushed[key_of(line)].append(seq)
    for key in KEYS:
        if any(seq >= later for seq, later in itertools.pairwise(taken[key])):
            problems.append(f"{key}: not taken in the order of its seqs")
        for what, seqs in (
            ("pushed and never taken", set(pushed[key]) - set(taken[key])),
            ("taken and never pushed", set(taken[key]) - set(pushed[key])),
        ):
            if seqs:
                problems.append(f"{key}: {what}: {some('seq', sorted(seqs))}")

    counts = bytearray(len(lines) + 1)
    last: dict[tuple[int, str, int], int] = {}
    deliveries: dict[int, int] = {}
    for consumer, payload in delivered:
        deliveries[consumer] = deliveries.get(consumer, 0) + 1
        producer, line, text = split(payload)
        if not 1 <= line <= len(lines) or producer != owner(line) or text != lines[line]:
            problems.append(f"came out altered or from nowhere: {payload[:60]!r}")
            continue
        counts[line] = min(255, counts[line] + 1)
        way = (consumer, key_of(line), producer)
        if last.get(way, 0) > line:
            problems.append(f"line {line} came after line {last[way]} on one way")
        last[way] = line
    doubled = [line for line in range(1, len(lines) + 1) if counts[line] > 1]
    absent = [line for line in range(1, len(lines) + 1) if not counts[line]]
    if doubled:
        problems.append(f"came out more than once: {some('line', doubled)}")
    if len(absent) > killed_consumers:
        problems.append(f"never came out: {some('line', absent)}")
        absent = []
    return Verdict(problems, absent, deliveries)


def split(payload: bytes) -> tuple[int, int, bytes]:
    """Of a payload the producer, the line's number, and the line."""
    try:
        producer, line, text = payload.split(b" ", 2)
        return int(producer), int(line), text
    except ValueError:
        return -1, -1, payload


def some(what: str, numbers: list[int]) -> str:
    """A few of many numbers, for a message."""
    shown = ", ".join(map(str, numbers[:5]))
    return f"{what}{'s' * (len(numbers) > 1)} {shown}" + (
        f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
    )


class Lines:
    """The lines of a file that isn't empty, by their numbers from 1; they stay on the disk."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._ends = array("Q", itertools.accumulate(map(len, file), initial=0))
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, line: int) -> bytes:
        return self._bytes[self._ends[line - 1] : self._ends[line]]


def read_delivered(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        while head := file.read(PARCEL.size):
            consumer, size = PARCEL.unpack(head)
            yield consumer, file.read(size)


# -- the director


class DemoError(Exception):
    """The demonstration can't go on."""


class InputError(Exception):
    """There is no input to demonstrate with."""


class Plan(NamedTuple):
    """What the seed decides: whose which message is the last, and at which moment."""

    producer: int
    push: int
    push_moment: str
    consumer: int
    pull: int
    pull_moment: str


def make_plan(seed: int, lines: int) -> Plan:
    chance = random.Random(seed)
    share = [
        sum(owner(line) == one for line in range(1, min(lines, 20_000) + 1)) for one in range(4)
    ]
    producer = chance.choice([one for one in range(PRODUCERS) if share[one]])

    def early(count: int) -> int:
        return chance.randint(max(1, count // 10), max(1, count // 2))

    return Plan(
        producer,
        early(share[producer]),
        chance.choice([BEFORE_PUSH, IN_PUSH, AFTER_PUSH]),
        chance.randrange(CONSUMERS),
        early(min(lines, 20_000) // CONSUMERS),
        chance.choice([IN_PULL, IN_HAND, UNCONFIRMED]),
    )


class Screen:
    """What the person sees: bars on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.rich = self.console.is_terminal and not self.console.is_dumb_terminal
        self.began = self._shown = time.monotonic()
        self._progress: Progress | None = None

    def say(self, label: str = "", text: str = "", style: str = "") -> None:
        """One line, its label in front."""
        if self.rich:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(width=10, justify="right", style="dim")
            grid.add_column(overflow="fold")
            grid.add_row(label, Text(text, style))
            self.console.print(grid)
        else:
            print(f"{label:>10}  {text}".rstrip(), flush=True)

    def command(self, line: str) -> None:
        """One to copy: on one line, however long."""
        self.console.print(Text(line, "cyan"), soft_wrap=True)

    def event(self, text: str, style: str = "") -> None:
        self.say(f"{time.monotonic() - self.began:.1f} s", text, style)

    def show(self, pushed: int, delivered: int, total: int, *, up: bool) -> None:
        held = max(0, pushed - delivered)
        if not self.rich:
            if time.monotonic() - self._shown >= 2:
                self._shown = time.monotonic()
                self.event(f"pushed {pushed:,}, held {held:,}, delivered {delivered:,}")
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("[dim]{task.description:>10}[/] "),
                BarColumn(40, complete_style="cyan", finished_style="cyan"),
                TextColumn("{task.completed:>9,}  [dim]{task.fields[note]}[/]"),
                console=self.console,
                transient=True,
            )
            for name in ("pushed", "held", "delivered"):
                self._progress.add_task(name, total=total, note="")
            self._progress.start()
        notes = (f"of {total:,}", "in the file", "" if up else "the endpoint is down")
        for bar, count, note in zip(
            self._progress.task_ids, (pushed, held, delivered), notes, strict=True
        ):
            self._progress.update(bar, completed=count, note=note)

    def hide(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Crew:
    """The worker processes. None of them outlives the director."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._out, self._in = os.pipe()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._unread = b""

    def start(self, name: str, role: str, **task: Any) -> None:
        order = json.dumps({"role": role, "name": name, **task})
        with open(os.path.join(self._folder, f"{name}.err"), "ab") as errors:
            self._processes[name] = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--work", order],
                stdin=subprocess.PIPE,
                stdout=self._in,
                stderr=errors,
                cwd=self._folder,
                process_group=0,  # Ctrl-C is the director's
            )

    def kill(self, name: str) -> None:
        self._processes[name].kill()

    def hang_up(self, name: str) -> None:
        """Close the worker's stdin."""
        stdin = self._processes[name].stdin
        assert stdin is not None
        stdin.close()

    def events(self) -> Iterator[tuple[str, list[str]]]:
        """What was told within a tenth of a second, then who ended, after all that it told."""
        ended = [name for name, process in self._processes.items() if process.poll() is not None]
        if not ended:
            select.select([self._out], [], [], 0.1)
        while select.select([self._out], [], [], 0)[0]:
            self._unread += os.read(self._out, 65536)
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            name, *words = line.decode().split(" ")
            yield name, words
        for name in ended:
            code = self._dismiss(name)
            if code not in (0, -signal.SIGKILL):
                with open(os.path.join(self._folder, f"{name}.err"), errors="replace") as errors:
                    last = ([line for line in errors.read().splitlines() if line] or ["no word"])[
                        -1
                    ]
                raise DemoError(f"{name} ended with {code}: {last}")
            yield name, ["ended", str(code)]

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
        for name in list(self._processes):
            self._dismiss(name)
        os.close(self._in)
        os.close(self._out)

    def _dismiss(self, name: str) -> int:
        process = self._processes.pop(name)
        assert process.stdin is not None
        process.stdin.close()
        return process.wait()


class Show:
    """One demonstration, from the first push to the proof.

    Args:
        folder: For the store; in its `work`, the input and all that the workers write.
        plan: Who is killed, and when.
        lines: Of the input.
        screen: Where it is seen.
    """

    def __init__(self, folder: str, plan: Plan, lines: Lines, screen: Screen) -> None:
        self.path = os.path.join(folder, "queue.db")
        self.work = os.path.join(folder, "work")
        self.plan = plan
        self.lines = lines
        self.screen = screen
        self.crew = Crew(self.work)
        self.pushing, self.pulling = PRODUCERS, CONSUMERS
        self.undecided = True  # until the killed producer's heir has asked the store, nobody pulls
        self.decision = ""
        self.struck: set[str] = set()  # whom the signal was sent
        self.killed: set[str] = set()  # and who died of it
        self.times: dict[str, float] = {}  # of what happened, on the monotonic clock
        self.most_held = 0

    def start(self, role: str, number: int, *, heir: bool) -> None:
        plan, doomed = self.plan, [0, ""]
        if not heir and role == "producer" and number == plan.producer:
            doomed = [plan.push, plan.push_moment]
        if not heir and role == "consumer" and number == plan.consumer:
            doomed = [plan.pull, plan.pull_moment]
        task = {"number": number, "heir": heir, "fatal": doomed, "store": self.path}
        self.crew.start(f"{role}-{number}", role, life=CONSUMERS if heir else number, **task)

    def play(self, store: sqlspace.Store) -> None:
        """Everything up to the last delivery."""
        total, screen = len(self.lines), self.screen
        screen.event(
            f"{PRODUCERS} producers push; {CONSUMERS} consumers wait: the endpoint is down"
        )
        for number in range(PRODUCERS):
            self.start("producer", number, heir=False)
        for number in range(CONSUMERS):
            self.start("consumer", number, heir=False)
        before, changed_at = (0, 0), time.monotonic()
        while self.pulling:
            for name, words in self.crew.events():
                self.hear(name, words)
            pushed, delivered = now = self.counts()
            if now != before:
                before, changed_at = now, time.monotonic()
                self.times.setdefault("first push", changed_at)
            if pushed == total:
                self.times.setdefault("last push", changed_at)
            self.most_held = max(self.most_held, pushed - delivered)
            enough = pushed >= min(total * 2 // 5, 16_000) or not self.pushing
            if "up" not in self.times and not self.undecided and enough:
                screen.event(f"the endpoint comes up; the file holds {pushed:,} messages", "green")
                self.crew.start("endpoint", "endpoint")
                self.times["up"] = time.monotonic()
            if not self.pushing and "stop" not in self.times:
                self.times["stop"] = time.monotonic()
                store.push_many(STOP, [b""] * (CONSUMERS + 1))  # one may die with its consumer
            screen.show(pushed, delivered, total, up="up" in self.times)
            if time.monotonic() - changed_at > STALLED_SECONDS:
                raise DemoError(
                    f"nothing has moved for {STALLED_SECONDS} s: {pushed:,} of {total:,} pushed, "
                    f"{delivered:,} delivered"
                )
        self.times["end"] = time.monotonic()
        store.clear(STOP)
        self.crew.hang_up("endpoint")
        while ("endpoint", ["ended", "0"]) not in list(self.crew.events()):
            pass
        screen.hide()
        screen.event("everything has come out")

    def counts(self) -> tuple[int, int]:
        """How many were pushed, and how many delivered: the files in which that is noted grow."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.work)}
        logs = sum(sizes.get(f"producer-{number}.log", 0) for number in range(PRODUCERS))
        return logs // RECORD.size, sizes.get("tally", 0)

    def hear(self, name: str, words: list[str]) -> None:
        """Act on what a worker told, and on its end."""
        role, number = name.split("-") if "-" in name else (name, "")
        match role, *words:
            case _, "strike":
                self.struck.add(name)
                self.crew.kill(name)
            case "producer", "decided", acknowledged, line, seq:
                self.undecided = False
                found = (
                    f"isn't in the store: producer {number} pushes it again"
                    if seq == "absent"
                    else f"is in the store, as seq {int(seq):,}: nobody pushes it again"
                )
                self.decision = (
                    f"{int(acknowledged):,} acknowledged; line {int(line):,}, undecided, {found}"
                )
                self.screen.event(self.decision)
            case "producer", "ended", "0":
                self.pushing -= 1
                self.undecided = self.undecided and int(number) != self.plan.producer
            case "consumer", "ended", "0":
                self.pulling -= 1
            case _, "ended", _:
                if name not in self.struck - self.killed:
                    raise DemoError(f"{name} was killed, and not by this demonstration")
                self.killed.add(name)
                self.screen.event(f"{self.blow(role)}; another takes its place", "yellow")
                self.start(role, int(number), heir=True)

    def blow(self, role: str) -> str:
        """Whom the signal struck, and when."""
        plan = self.plan
        if role == "producer":
            return (
                f"SIGKILL to producer {plan.producer} at message {plan.push:,}, {plan.push_moment}"
            )
        return f"SIGKILL to consumer {plan.consumer} at message {plan.pull:,}, {plan.pull_moment}"

    def ping(self, store: sqlspace.Store) -> list[float]:
        """Milliseconds from the call of a push to the return of a pull that waited, sorted."""
        self.crew.start("listener", "listener", store=self.path)
        found: list[float] = []
        while True:
            for _, words in self.crew.events():
                match words:
                    case ["listening"]:
                        time.sleep(0.005)  # that it has fallen asleep is what is measured
                        store.push("ping", b"%d" % time.monotonic_ns())
                    case ["heard", waited_ns]:
                        found.append(int(waited_ns) / 1e6)
                    case ["ended", _]:
                        return sorted(found)

    def prove(self, store: sqlspace.Store) -> Verdict:
        """Judge by what lies on the disk."""
        logs = [
            read_log(os.path.join(self.work, f"producer-{number}.log"))
            for number in range(PRODUCERS)
        ]
        taken = {key: [tombstone.seq for tombstone in store.history(key)] for key in KEYS}
        delivered = read_delivered(os.path.join(self.work, "delivered"))
        dead = sum(name.startswith("consumer") for name in self.killed)
        verdict = verify(self.lines, logs, delivered, taken, dead)
        verdict.problems.extend(f"{key}: something is left" for key in store.keys())  # noqa: SIM118
        return verdict

    def report(self, store: sqlspace.Store, verdict: Verdict, pings: list[float]) -> None:
        """The closing screen of what is proven."""
        say, total = self.screen.say, len(self.lines)
        out = total - len(verdict.in_hand)
        first, last, up, end = (self.times[at] for at in ("first push", "last push", "up", "end"))
        say()
        proven = f"{total:,} lines went in, {out:,} came out, each exactly once and in order"
        if verdict.in_hand:
            proven += "; 1 died in the hands of the killed consumer"
        say("PROVEN", proven, "bold green")
        say("", "in order: of each key and producer, by the takings in the file's own history")
        say()
        pushing, pulling = last - first, end - up
        if total >= 1000:
            say(
                "pushed", f"{total / pushing:,.0f}/s by {PRODUCERS} processes, each one on the disk"
            )
            say("pulled", f"{out / pulling:,.0f}/s by {CONSUMERS} processes, each one delivered")
        say("held", f"{self.most_held:,} messages at the most")
        p50_ms, p99_ms = pings[len(pings) // 2], pings[len(pings) * 99 // 100]
        say(
            "woken",
            f"in {p50_ms:.2f} ms (p50), {p99_ms:.2f} ms (p99), from calling push in one process to "
            f"the return of a pull that waited in another; {len(pings)} times, both on the disk",
        )
        say()
        for role, fate in (
            ("producer", self.decision),
            ("consumer", self.left_by_consumer(store, verdict)),
        ):
            if any(name.startswith(role) for name in self.killed):
                say("killed", f"{self.blow(role)}: {fate}")
            else:
                say("killed", f"no {role}: the one that the seed chose was done too soon")
        say()
        say("look", "into the file, which stays:")
        for query in (
            "SELECT * FROM sqlspace_tombstones LIMIT 5",
            "SELECT key, count(*), min(taken), max(taken) FROM sqlspace_tombstones GROUP BY key",
            "SELECT * FROM sqlspace_keys",
        ):
            self.screen.command(f"sqlite3 {shlex.quote(self.path)} '{query}'")

    def left_by_consumer(self, store: sqlspace.Store, verdict: Verdict) -> str:
        """What became of what the killed consumer had."""
        words = f"{verdict.deliveries.get(self.plan.consumer, 0):,} delivered; "
        if not verdict.in_hand:
            return words + "it had nothing in hand that wasn't"
        line = verdict.in_hand[0]
        seq = dict(read_log(os.path.join(self.work, f"producer-{owner(line)}.log")))[line]
        taken_at = next(each.taken_at for each in store.history(key_of(line)) if each.seq == seq)
        clock = time.strftime("%H:%M:%S", time.localtime(taken_at))
        return (
            f"{words}it had line {line:,} in hand (seq {seq:,}, taken at {clock}), which is gone. "
            "pull is at most once; claim is the form that brings such work back"
        )


# -- the input, and the frame of it all


def take_input(name: str | None, target: str, limit: int) -> str:
    """Copy the input, so that it stays as it is; what to call it.

    Args:
        name: Of the file; None: the standard library's sources, as many lines as the limit.
        target: Where the copy goes.
        limit: Lines of the standard library.
    """
    if name is None:
        library = os.path.dirname(os.__file__)
        sources = sorted(each for each in os.listdir(library) if each.endswith(".py"))
        with (
            open(target, "wb") as copy,
            fileinput.input(
                [os.path.join(library, source) for source in sources], mode="rb"
            ) as texts,
        ):
            copy.writelines(itertools.islice(texts, limit))
        name = f"Python's own sources in {library}"
    else:
        try:
            path = os.path.join(os.environ.get("DEMO_CALLER", ""), name)
            with open(path, "rb") as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy)
        except OSError as error:
            raise InputError(f"{name}: {error.strerror}") from error
    with open(target, "rb") as copy:
        longest = max(map(len, copy), default=0)
    if not longest:
        raise InputError(f"{name} is empty: there is nothing to push")
    if longest > LONGEST_LINE:
        raise InputError(f"{name}: a line of {longest:,} bytes is too long for one message")
    return name


def affordable_lines(folder: str) -> int:
    """How many lines make a demonstration of a bearable length on this disk."""
    with sqlspace.open(os.path.join(folder, "trial.db")) as store:
        began = time.monotonic()
        for done in itertools.count(1):
            store.push("trial", b"x" * 40)
            rate = done / (time.monotonic() - began)
            if done == 500 or time.monotonic() - began > 0.5:
                return min(DEFAULT_LINES, max(100, int(rate * DEFAULT_SECONDS) // 100 * 100))
    raise AssertionError


def demonstrate(name: str | None, seed: int, folder: str) -> int:
    """All of it; the exit status."""
    screen = Screen()
    desk = os.path.join(folder, "work")
    os.mkdir(desk)
    limit = DEFAULT_LINES if name is not None else affordable_lines(desk)
    called = take_input(name, os.path.join(desk, "input"), limit)
    lines = Lines(os.path.join(desk, "input"))
    screen.say(
        "sqlspace", "store-and-forward in one SQLite file, with a dead endpoint and two kills"
    )
    size = os.stat(os.path.join(desk, "input")).st_size
    screen.say("input", f"{called}: {len(lines):,} line{'s' * (len(lines) > 1)}, {size:,} bytes")
    screen.say("file", os.path.join(folder, "queue.db"))
    screen.say("seed", f"{seed} (--seed {seed} kills the same ones at the same messages)")
    screen.say()
    show = Show(folder, make_plan(seed, len(lines)), lines, screen)
    try:
        with sqlspace.open(show.path, history=None) as store:
            show.play(store)
            pings = show.ping(store)
            verdict = show.prove(store)
            if not verdict.problems:
                show.report(store, verdict, pings)
    finally:
        screen.hide()
        show.crew.end()
    file = apsw.Connection(show.path, flags=apsw.SQLITE_OPEN_READONLY)
    if (integrity := file.pragma("integrity_check")) != "ok":
        verdict.problems.append(f"the file is damaged: {integrity}")
    file.close()
    for problem in verdict.problems:
        screen.say("NOT PROVEN", problem, "bold red")
    if verdict.problems:
        screen.say("kept", f"{folder}, with the workers' logs")
        return 1
    shutil.rmtree(desk)
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="A file's lines through one sqlspace store."
    )
    parser.add_argument("file", nargs="?", help="any file; else Python's own sources")
    parser.add_argument("--seed", type=int, help="decides who is killed, and when")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10_000) if arguments.seed is None else arguments.seed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = tempfile.mkdtemp(prefix="sqlspace-demo-")
    try:
        return demonstrate(arguments.file, seed, folder)
    except InputError as error:
        shutil.rmtree(folder)
        print(f"scripts/demo: {error}", file=sys.stderr)
        return 2
    except (DemoError, sqlspace.SpaceError) as error:
        print(f"scripts/demo: NOT PROVEN: {error}\nkept: {folder}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as of `scripts/demo | head`
        shutil.rmtree(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        print("\nscripts/demo: stopped; its processes are ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
