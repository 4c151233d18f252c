"""Many workers at once, killed and frozen all the while, or threads of one space: no rule broken.

And planted bugs, each of which a storm must find: else it proves nothing.
"""

import os
import re
import subprocess
import sys
import tempfile

import pytest
from lanes import run_on_local, run_on_store
from plants import PLANTS
from proof import tried
from storm import MEMORY, judge_folder, run

import sqlspace

STORM = os.path.join(os.path.dirname(__file__), "helpers", "storm.py")
SEED = 4  # a round of all kinds of sync, with compactions
ROUND_SECONDS = 2.5
ROUNDS = 8  # the seldom bugs are mostly found in the first


def command(folder, *arguments):
    """What scripts/storm does: its exit code, what it tells by name, and all of it."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, STORM, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    lines = re.findall(r"^ *(\w.*?)  (\S+)", done.stdout, re.MULTILINE)
    return done.returncode, dict(lines), done.stdout


@pytest.mark.once
def test_a_storm_breaks_no_rule(tmp_path):
    """Eight processes, killed and frozen at random, on a disk: the command finds nothing."""
    code, told, out = command(tmp_path, "--minutes", 0.2, "--seed", SEED)
    assert (code, told["violations"]) == (0, "0"), out
    for name in ("operations", "kills", "stops", "compactions", "cut off"):
        assert told[name] != "0", name
    assert list(tmp_path.iterdir()) == []
    what = f"{told['operations']} operations, {told['kills']} kills, {told['stops']} stops"
    tried("a kill storm of processes", what, seeds=SEED)


@pytest.mark.once
def test_what_broke_a_rule_is_kept_and_can_be_judged_again(tmp_path):
    """Exit status 1; the folder that it names has the logs and the file, and gives the same."""
    code, told, out = command(tmp_path, "--minutes", 0.03, "--seed", 1, "--plant", "last-first")
    (folder,) = tmp_path.iterdir()
    assert (code, told["kept"]) == (1, f"{folder};"), out
    assert "came out before" in out
    again, retold, _ = command(tmp_path, "--judge", folder / "round-0")
    assert (again, retold["violations"]) == (1, told["violations"])


@pytest.mark.once
@pytest.mark.parametrize("plant", sorted(set(PLANTS) - {"last-first"}))
def test_a_storm_finds_a_planted_bug(tmp_path, plant):
    """Within a few rounds of a second; and who judges again what they left finds the same."""
    memory = MEMORY if os.path.isdir(MEMORY) else tmp_path
    for number in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="sqlspace-storm-", dir=memory) as place:
            problems, _ = run(
                place, seconds=ROUND_SECONDS, processes=8, seed=f"{plant}/{number}", plant=plant
            )
            again, _ = judge_folder(place)
        assert again == problems
        if problems:
            break
    assert problems
    tried(f"a kill storm with a planted bug: {plant}", f"{number + 1} rounds", found="caught")


SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_of_a_local_break_no_rule(seed):
    """There are no seqs: the times prove who was first."""
    problems, counts = run_on_local(sqlspace.Local(), 8, 600, seed)
    assert problems == []
    tried("8 threads on a Local", f"{counts['operations']:,} operations", seeds=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_of_a_store_break_no_rule(tmp_path, seed):
    """All verbs, with commits that they share."""
    with sqlspace.open(tmp_path / "queue.db", sync=False, history=None) as store:
        problems, counts = run_on_store(store, 8, 150, seed)
    assert problems == []
    tried("8 threads on a Store", f"{counts['operations']:,} operations", seeds=seed)


class Stack(sqlspace.Local):
    """The last comes out first."""

    def inp(self, key, default=None):
        with self._lock:
            bag = self._bags.get(key)
            if type(bag) is list and len(bag) > 1:
                bag.insert(0, bag.pop())
        return super().inp(key, default)


class Copier(sqlspace.Local):
    """Now and then what is taken stays."""

    def inp(self, key, default=None):
        value = super().inp(key, default)
        if value is not None and value.endswith("7"):
            self.out(key, value)
        return value


class Sieve(sqlspace.Local):
    """Now and then what is pushed isn't there."""

    def out(self, key, value, *, ttl=None):
        if not value.endswith("7"):
            super().out(key, value, ttl=ttl)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Stack, "came out before"), (Copier, "taken 2 times"), (Sieve, "is lost")],
)
def test_the_judge_finds_a_broken_local(kind, words):
    """What breaks a rule among threads is found as well."""
    problems, _ = run_on_local(kind(), 8, 200, 1)
    assert any(words in problem for problem in problems), problems[:5]
