"""The power cut at every write: no promise is broken, and a broken one would be found."""

import os
import random
import tempfile
import threading

import pytest
from children import eventually
from disks import DRAWN, Disk, Event
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from powercuts import Explorer, Walk, look
from proof import tried
from runs import MEMORY, VERBS, Member, Plant, Run

from sqlspace import commits, entries, identity, session, taking, upkeep

# So many images in the suite; `scripts/crash` goes on for as long as one likes.
IMAGES = 20_000
SEED = 1

# How many examples, and then not the same ones in every run.
EXAMPLES = os.environ.get("SQLSPACE_EXAMPLES")


# -- the disk


WRITES = [Event("write", "", 0, b"a" * 600), Event("write", "", 600, b"b" * 600)]


def images(disk, mode, number=200):
    return {disk.image(mode, random.Random(seed)).get("") for seed in range(number)}


def test_what_was_synced_is_there():
    """Whatever the power cut does to the rest."""
    disk = Disk({"": b""})
    for event in [*WRITES, Event("sync", ""), Event("write", "", 100, b"c" * 100)]:
        disk.apply(event)
    for mode in ("none", "all", "torn", "sectors", "junk"):
        assert all(
            len(left) == 1200 and left[200:] == b"a" * 400 + b"b" * 600
            for left in images(disk, mode)
        )
    assert images(disk, "none") == {b"a" * 600 + b"b" * 600}


def test_what_was_not_synced_may_be_there_in_part():
    """Nothing, all, the first of it, any sectors of it, or rubbish of the same length."""
    disk = Disk({"": b""})
    for event in WRITES:
        disk.apply(event)
    whole = b"a" * 600 + b"b" * 600
    assert images(disk, "none") == {b""}
    assert images(disk, "all") == {whole}
    torn = images(disk, "torn")
    assert len(torn) > 50
    assert all(whole.startswith(left) for left in torn)
    sectors = images(disk, "sectors")
    assert bytes(512) + b"a" * 88 + b"b" * 600 in sectors  # the second, the third and on
    assert all(len(left) == 1200 for left in images(disk, "junk"))
    assert not images(disk, "junk") & sectors - {whole}


def test_a_sync_that_failed_leaves_undecided_what_later_ones_do_not_write():
    """The pages are clean in the cache; what is written after that, and synced, stands."""
    disk = Disk({"": b"x" * 1000})
    for event in [
        Event("write", "", 0, b"a" * 1000),
        Event("failed", ""),
        Event("write", "", 200, b"b" * 100),
        Event("sync", ""),
    ]:
        disk.apply(event)
    assert images(disk, "none") == {b"x" * 200 + b"b" * 100 + b"x" * 700}
    assert images(disk, "all") == {b"a" * 200 + b"b" * 100 + b"a" * 700}


def test_a_name_is_durable_with_its_directory():
    """A file that was made, or deleted, may or may not be there until then."""
    disk = Disk({"-journal": b"old"})
    disk.apply(Event("create", "-wal"))
    disk.apply(Event("write", "-wal", 0, b"new"))
    disk.apply(Event("sync", "-wal"))
    disk.apply(Event("delete", "-journal"))
    assert disk.image("none", random) == {"-journal": b"old"}
    assert disk.image("all", random) == {"-wal": b"new"}
    disk.apply(Event("sync", "-wal", directory=True))
    assert disk.image("none", random) == {"-wal": b"new"}


# -- the store


def test_no_power_cut_breaks_a_promise():
    """Nothing that was acknowledged is lost, and nothing that was taken comes back."""
    explorer = Explorer(goes_on=0.0005)
    seed = SEED
    while explorer.images < IMAGES and not explorer.violations:
        explorer.explore(seed)
        seed += 1
    assert explorer.violations == []
    tried(
        f"power cuts, in {explorer.runs} runs of {explorer.deeds:,} calls",
        f"{explorer.images:,} images",
        seeds=f"{SEED} to {seed - 1}",
    )


def test_an_image_is_made_again_from_its_name():
    """The same writes, the same dice: a failure is replayed, down to a second power cut."""
    seen = {}

    class Noting(Explorer):
        def make(self, disk, mode, dice):
            files = super().make(disk, mode, dice)
            seen[self.at] = files
            return files

    first = Noting(goes_on=0.02, watch=lambda explorer: explorer.images < 1000)
    first.explore(SEED)
    deepest = max(seen, key=lambda image: image.count("/"))
    assert deepest.count("/") == 6
    known = seen.pop(deepest)
    Noting().replay(deepest)
    assert seen[deepest] == known


@pytest.mark.parametrize("sync", [True, "group"])
def test_what_was_judged_absent_stays_so_when_the_first_commit_is_repeated(sync, tmp_path):
    """Lost, it is made again byte for byte; the push behind it must not come back with it."""
    plant = Plant(sync=sync, verbs=("push",), deeds=(1, 1))
    run = Run("first", {}, {}, plant=plant)
    run()
    push = run.deeds[1]
    frame = (push.begin, push.begin + 1)  # of the first commit: a header and a page
    may_be_lost = run.events[push.begin + 2].kind != "sync"
    walk, disk = Walk(run), Disk({})
    for number, event in enumerate(run.events[: push.end - 1]):
        walk.go(number)
        if number not in frame or not may_be_lost:
            disk.apply(event)
    files = disk.image("all", random)
    explorer = Explorer(plant=plant)
    explorer.go_through(walk.next_run("second", files, look(str(tmp_path / "queue.db"), files)))
    assert explorer.images > 50
    assert explorer.violations == []


# What hypothesis draws, it can also simplify: the shortest history that breaks a promise.
dice = st.randoms(use_true_random=False)


class Machine(RuleBasedStateMachine):
    """Two stores, and the power that goes off now and then."""

    @initialize(dice=dice)
    def begin(self, dice):
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.path = os.path.join(self.folder.name, "image.db")
        self.cuts = 0
        self.go_on(Run("machine", {}, {}), dice)

    def go_on(self, run, dice):
        self.run = run
        run.random = dice
        run.__enter__()

    @rule(verb=st.sampled_from(sorted(set(VERBS))), dice=dice)
    def work(self, verb, dice):
        self.run.random = dice
        self.run.step(verb)

    @rule(at=st.floats(0, 1), mode=st.sampled_from((*DRAWN, "none", "all")), dice=dice)
    def cut(self, at, mode, dice):
        """The power goes off somewhere since it was on, and the stores go on with what is left."""
        run = self.run
        last = len(run.events)
        run.__exit__()
        walk = Walk(run)
        first = run.deeds[0].end  # before that there is no store
        for number in range(first + round(at * (last - first)) + 1):
            walk.go(number)
            if number >= first:
                walk.states[look(self.path, walk.disk.image("all", dice)).state] = number
        files = walk.disk.image(mode, dice)
        seen = look(self.path, files)
        walk.judge(seen)
        self.cuts += 1
        name = f"machine {self.cuts}"
        self.go_on(walk.next_run(name, files, seen), dice)

    def teardown(self):
        if hasattr(self, "run"):
            self.run.__exit__()
            self.folder.cleanup()


TestPowerCutsAnywhere = Machine.TestCase
TestPowerCutsAnywhere.settings = settings(
    max_examples=int(EXAMPLES or 30),
    stateful_step_count=30,
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# -- planted bugs: each must be found


def answer_before_the_commit(run, patch):
    """A pull returns what it saw, and takes it behind its caller's back."""
    sound = taking.Grab.run
    late = []

    def only_look(grab):
        if type(grab) is not taking.Grab or isinstance(threading.current_thread(), Member):
            return sound(grab)
        if not grab.probe(grab.database._session.connection):
            return False
        late.append(grab)
        return True

    def tell(deed):
        type(run).tell(run, deed)
        while late:
            grab = late.pop()
            sound(taking.Grab(grab.database, grab.keys))

    patch.setattr(taking.Grab, "run", only_look)
    patch.setattr(run, "tell", tell, raising=False)


def answer_the_crowd_before_the_commit(run, patch):
    """Whoever joined is told that it is done when it is carried out."""
    sound = commits.together

    def together(connection, operations, cover):
        operations = list(operations)
        others = len(operations) - 1
        sound(connection, operations, cover)
        for operation in operations:
            operation.finished = True
            operation.latch.release()
        # One of them leads, and can't return yet.
        eventually(lambda: sum(each.ended is not None for each in run.members) >= others)

    patch.setattr(commits, "together", together)


def without(constant, text, *, by=""):
    """That part of a statement is gone."""

    def plant(_, patch):
        module = upkeep if hasattr(upkeep, constant) else entries
        statement = getattr(module, constant)
        assert text in statement
        patch.setattr(module, constant, statement.replace(text, by))

    return plant


def keep_a_journal(_, patch):
    patch.setattr(identity.Identity, "stands", lambda _: True)  # the -wal is gone
    patch.setattr(Run, "another", lambda _: None)  # another store would go back to the -wal


def nothing_before_the_first_write(run, patch):
    """Pushes of one key: the first pages of the next one are those of the one that was cut off."""
    patch.setattr(session.Session, "boot", lambda self: setattr(self, "booted", True))
    patch.setattr(run, "key", lambda: "a", raising=False)
    patch.setattr(run, "payload", lambda: Run.payload(run)[:20].ljust(900), raising=False)


def pragma(name, value):
    return lambda store: store._database._session.connection.pragma(name, value)


PLANTS = {
    "sync=False": Plant(sync=False),
    "synchronous=OFF": Plant(sync=True, opened=pragma("synchronous", "OFF")),
    "a disk that ignores syncs": Plant(deaf=True),
    "journal DELETE": Plant(
        sync=True, opened=pragma("journal_mode", "DELETE"), patch=keep_a_journal
    ),
    "a payload returned before its tombstone's commit": Plant(patch=answer_before_the_commit),
    "a group answered before its commit": Plant(
        sync=True, patch=answer_the_crowd_before_the_commit
    ),
    "sync='group' without its own sync": Plant(
        sync="group", patch=lambda _, patch: patch.setattr(commits, "sync", lambda _: None)
    ),
    "a lease acked without its token": Plant(patch=without("ACK", "token = ?3 AND", by="?3 AND")),
    "a live entry pruned": Plant(
        patch=without("DELETE_TAKEN", "taken_no <= ?1 AND taken_no IS NOT NULL", by="seq <= ?1")
    ),
    "a seq used again after compact": Plant(
        patch=without("DELETE_TAKEN", "AND seq < (SELECT max(seq) FROM sqlspace_entries)")
    ),
    "no commit before the first write": Plant(
        sync=True, patch=nothing_before_the_first_write, verbs=("push",), deeds=(30, 2)
    ),
}


# Where images are few, what the calls return shows it.
MOST = {"a lease acked without its token": 20, "a seq used again after compact": 20}
GOES_ON = {"no commit before the first write": 0.3}
FIRST = {"no commit before the first write": 6}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name):
    """A proof in which this doesn't fail would prove nothing."""
    most = MOST.get(name, 2000)
    first = FIRST.get(name, SEED)

    def is_going_on(explorer):
        return len(explorer.violations) < 20 and explorer.images < begin + most

    explorer = Explorer(plant=PLANTS[name], watch=is_going_on, goes_on=GOES_ON.get(name, 0.002))
    for seed in range(first, first + 40):
        begin = explorer.images
        explorer.explore(seed)
        if explorer.violations:
            break
    assert explorer.violations
    tried(
        f"planted: {name}",
        f"{explorer.images:,} images",
        seeds=f"{first} to {seed}" if seed > first else first,
        found=f"caught {len(explorer.violations)} times",
    )
