"""The demonstration proves what it says, and would not if it weren't so."""

import contextlib
import glob
import importlib.util
import os
import signal
import subprocess
import sys

import pytest
from children import eventually

DEMO = os.path.join(os.path.dirname(__file__), "..", "scripts", "demo.py")
spec = importlib.util.spec_from_file_location("demo", DEMO)
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)

TEXT = b"".join(b"line %d \xff\n" % n if n % 7 else b"\n" for n in range(300)) + b"no newline"


def start(folder, *arguments):
    environment = {**os.environ, "TMPDIR": str(folder), "DEMO_CALLER": str(folder)}
    environment.pop("FORCE_COLOR", None)
    return subprocess.Popen(
        [sys.executable, DEMO, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, *arguments):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def workers(folder):
    """The command lines of a demonstration's processes, where there is /proc."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            found.append(file.read())
    return [line for line in found if b"--work" in line and os.fsencode(folder) in line]


def seed_for(push_moment, pull_moment):
    wanted = push_moment, pull_moment
    return next(
        seed
        for seed in range(1000)
        if (demo.make_plan(seed, 301).push_moment, demo.make_plan(seed, 301).pull_moment) == wanted
    )


@pytest.mark.parametrize(
    ("push_moment", "pull_moment", "decision"),
    [
        (demo.AFTER_PUSH, demo.UNCONFIRMED, "is in the store"),
        (demo.BEFORE_PUSH, demo.IN_HAND, "isn't in the store"),
    ],
)
def test_every_line_comes_out_once_and_what_died_in_hand_is_named(
    tmp_path, push_moment, pull_moment, decision
):
    """Two kills, each at a moment that leaves something undecided, and the proof stands."""
    (tmp_path / "text").write_bytes(TEXT)
    seed = seed_for(push_moment, pull_moment)
    code, out, err = run(tmp_path, "--seed", str(seed), "text")
    assert (code, err) == (0, "")
    assert f"{push_moment}; another takes its place" in out
    assert decision in out
    lost = int(f"{pull_moment}; another" in out and pull_moment == demo.IN_HAND)
    assert f"PROVEN  301 lines went in, {301 - lost} came out, each exactly once" in out
    assert ("which is gone" in out) == bool(lost)
    assert "NOT PROVEN" not in out
    (folder,) = tmp_path.glob("sqlspace-demo-*")
    assert [path.name for path in folder.iterdir() if path.suffix == ".db"] == ["queue.db"]
    assert not (folder / "work").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent", "No such file"), (".", "Is a directory"), ("empty", "there is nothing to push")],
)
def test_what_is_no_input_is_refused_in_one_line(tmp_path, name, words):
    """Exit status 2, nothing on stdout, nothing left behind."""
    (tmp_path / "empty").touch()
    code, out, err = run(tmp_path, name)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_file(tmp_path, number):
    """Ctrl-C while producers push."""
    (tmp_path / "text").write_bytes(TEXT * 1000)
    process = start(tmp_path, "text")
    for line in process.stdout:
        if "pushed" in line:  # all work by then
            break
    if os.path.isdir("/proc/self"):
        assert len(workers(tmp_path)) >= 7
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped" in err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    # One that was just being started leaves by itself, when it sees that the demonstration is gone.
    eventually(lambda: workers(tmp_path) == [], "the workers' end")


LINES = {number: b"text %d\n" % number for number in range(1, 65)}


def evidence():
    """What a clean run leaves: logs, deliveries, history."""
    logs = [
        [(line, line) for line in LINES if demo.owner(line) == one] for one in range(demo.PRODUCERS)
    ]
    delivered = [
        (line % demo.CONSUMERS, b"%d %d %b" % (demo.owner(line), line, LINES[line]))
        for line in LINES
    ]
    taken = {key: [line for line in LINES if demo.key_of(line) == key] for key in demo.KEYS}
    return logs, delivered, taken


def lose(logs, delivered, taken):
    del delivered[10], delivered[20]


def double(logs, delivered, taken):
    delivered.append(delivered[30])


def swap(logs, delivered, taken):
    delivered[0], delivered[48] = delivered[48], delivered[0]


def alter(logs, delivered, taken):
    delivered[5] = (delivered[5][0], delivered[5][1].replace(b"text", b"test"))


def invent(logs, delivered, taken):
    delivered.append((0, b"0 999 text"))


def push_twice(logs, delivered, taken):
    logs[2].insert(3, (logs[2][2][0], 1000))


def skip(logs, delivered, taken):
    del logs[1][4]


def leave_behind(logs, delivered, taken):
    taken["lines/2"].pop()


def take_out_of_order(logs, delivered, taken):
    taken["lines/3"].reverse()


def take_what_nobody_pushed(logs, delivered, taken):
    taken["lines/0"].append(1000)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose, "never came out: lines 11, 22"),
        (double, "more than once: line 31"),
        (swap, "on one way"),
        (alter, "altered"),
        (invent, "from nowhere"),
        (push_twice, "noted in place of"),
        (skip, "noted in place of"),
        (leave_behind, "lines/2: pushed and never taken: seq 62"),
        (take_out_of_order, "lines/3: not taken in the order"),
        (take_what_nobody_pushed, "lines/0: taken and never pushed: seq 1000"),
    ],
)
def test_the_verifier_finds_a_planted_fault(spoil, words):
    """A proof counts for something only if a fault would have failed it."""
    pieces = evidence()
    assert demo.verify(LINES, *pieces, 0).problems == []
    spoil(*pieces)
    problems = demo.verify(LINES, *pieces, 1).problems
    assert any(words in problem for problem in problems), problems


def test_a_killed_consumer_explains_one_line_and_no_more():
    """One missing line is named as in hand; without a kill it is a loss."""
    logs, delivered, taken = evidence()
    del delivered[10]
    assert demo.verify(LINES, logs, delivered, taken, 1)[:2] == ([], [11])
    assert demo.verify(LINES, logs, delivered, taken, 0).problems == ["never came out: line 11"]
