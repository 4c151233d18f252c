"""The disk fails at every operation there is: what a call says of it is true, now and later."""

import contextlib

import apsw
import pytest
from disks import Disk, Recorder
from faults import SCRIPTS, Fault, FaultyRun, Injector
from proof import tried
from runs import SOUND, VERBS, Plant

import sqlspace
from sqlspace import commits, connection
from sqlspace.commits import Commits
from sqlspace.database import Database
from sqlspace.errors import StoreError
from sqlspace.taking import Grab

# So many faults of each sort in the suite; `scripts/crash` has all of them, and seeds.
SAMPLE = 3
SEEDS = range(1, 3)


# -- the disk


def test_of_a_write_without_room_half_is_written(tmp_path):
    """And noted, so that a power cut may leave it."""
    path = str(tmp_path / "x.db")
    recorder = Recorder(path, "recorder of halves")
    try:
        file = recorder.xOpen(path, [apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_CREATE | 2, 0])
        recorder.before = Fault("write2-enospc-once")
        recorder.before.armed = True
        file.xWrite(b"a" * 512, 0)
        with pytest.raises(apsw.FullError):
            file.xWrite(b"b" * 512, 512)
        file.xClose()
    finally:
        recorder.unregister()
    disk = Disk({})
    for event in recorder.events:
        disk.apply(event)
    assert disk.image("all", None)[""] == b"a" * 512 + b"b" * 256
    assert (tmp_path / "x.db").read_bytes() == b"a" * 512 + b"b" * 256


def test_each_open_file_is_told_once_that_a_sync_has_failed(tmp_path):
    """As Linux does: the second to sync hears of it, though its own went well."""
    path = str(tmp_path / "x.db")
    recorder = Recorder(path, "recorder of syncs")
    flags = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_READWRITE
    try:
        one, two = (recorder.xOpen(path, [flags, 0]) for _ in range(2))
        recorder.before = Fault("sync1-eio-once")
        recorder.before.armed = True
        for file in (one, two):
            with pytest.raises(apsw.IOError):
                file.xSync(apsw.SQLITE_SYNC_NORMAL)
            file.xSync(apsw.SQLITE_SYNC_NORMAL)
        for file in (one, two):
            file.xClose()
    finally:
        recorder.unregister()
    kinds = [event.kind for event in recorder.events]
    assert kinds == ["create", "failed", "sync", "sync", "sync"]


# -- the store


def test_a_call_that_the_disk_fails_says_what_became_of_it():
    """Whichever operation fails, once or from then on: at every power cut that follows, too."""
    injector = Injector(sample=SAMPLE, goes_on=0)
    for script in SCRIPTS:
        injector.explore(script)
    injector.sample = 1
    for seed in SEEDS:
        injector.explore(seed)
    assert injector.violations == []
    tried(
        f"faults of the disk, and power cuts, in {injector.deeds:,} calls",
        f"{injector.faults:,} faults, {injector.images:,} images",
        seeds=f"{', '.join(SCRIPTS)}, {SEEDS[0]} to {SEEDS[-1]}",
    )


def test_the_scripts_have_every_verb_do_something():
    """Otherwise their faults would prove nothing."""
    done = set()
    for script in SCRIPTS:
        run = FaultyRun(script, SOUND)
        run()
        assert not any(deed.raised for deed in run.deeds)
        assert all(run.fault.counts.values())
        done |= {deed.name for deed in run.deeds if deed.effects}
    assert done >= {*VERBS} - {"another", "later", "crowd", "compact"}


def test_a_fault_is_made_again_from_the_name_of_its_image():
    """The same operations, the same fault, the same image."""
    seen = {}

    class Noting(Injector):
        def make(self, disk, mode, dice):
            files = seen[self.at] = super().make(disk, mode, dice)
            return files

    first = Noting(sample=1, watch=lambda injector: injector.images < 400, part=1)
    first.explore(SEEDS[0])
    image = max((each for each in seen if "-once/" in each and "sectors" in each), key=len)
    known = seen.pop(image)
    Noting().replay(image)
    assert seen[image] == known


# -- planted bugs: each must be found


def fence(statement):
    """What is committed after a commit that failed."""
    return lambda _, patch: patch.setattr(commits, "UPDATE_BOOTS", statement)


def ignore_the_own_sync(_, patch):
    sound = commits.sync

    def sync(descriptor):
        with contextlib.suppress(OSError):
            sound(descriptor)

    patch.setattr(commits, "sync", sync)


def checkpoint_instead(_, patch):
    """It relies on a -wal that may not be on the disk."""

    def _sync(self, session):
        try:
            commits.sync(session.wal_descriptor)
        except OSError as error:
            try:
                session.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.Error:
                raise self._undecided() from error

    patch.setattr(Commits, "_sync", _sync)


def undo_what_was_rolled_back(run, patch):
    """Somebody else has taken it meanwhile."""

    def take(other, key):
        run.do("pullp", lambda: other.pullp(key), lambda payload: run.gone((key,), [payload]))

    def take_back(self, session, error, operation):
        connection.roll_back(session.connection)
        session.turnstile.leave()
        if isinstance(operation, Grab) and run.fault.over:
            with sqlspace.open(run.path, vfs=run.recorder.name) as other:
                take(other, operation.head.key)
            operation.undo(session.connection)

    patch.setattr(Commits, "take_back", take_back)


def do_not_confirm_a_vacuum(_, patch):
    sound = Database.vacuum

    def vacuum(self):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Commits, "confirm", lambda *_: None)
            sound(self)

    patch.setattr(Database, "vacuum", vacuum)


def plainly(self):
    return StoreError(f"{self._path}: the disk failed")


# With the script, and how the syncs fail that show it.
PLANTS = {
    "no fence after a commit that failed": ("full", "once", fence("SELECT 1")),
    "a fence that writes nothing": (
        "full",
        "once",
        fence("UPDATE sqlspace_schema SET boots = boots WHERE version = 1"),
    ),
    "undecided, reported as a plain StoreError": (
        "full",
        "stuck",
        lambda _, patch: patch.setattr(Commits, "_undecided", plainly),
    ),
    "an own sync's failure ignored": ("group", "once", ignore_the_own_sync),
    "nothing done after an own sync that failed": (
        "group",
        "once",
        lambda _, patch: patch.setattr(commits, "sync_anew", lambda _: None),
    ),
    "a checkpoint after an own sync that failed": ("group", "once", checkpoint_instead),
    "a -wal that was left behind, trusted": (
        "full",
        "stuck",
        lambda _, patch: patch.setattr(connection, "_secure", lambda *_: None),
    ),
    "VACUUM not confirmed": ("group", "once", do_not_confirm_a_vacuum, 50),
    "undone, though it was rolled back": ("full", "once", undo_what_was_rolled_back),
}
OPENING = 8  # so many syncs make the file; others are named with what is planted


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name):
    """A proof in which this doesn't fail would prove nothing."""
    script, how, patch, first = (*PLANTS[name], OPENING)[:4]
    injector = Injector(part=0.5, goes_on=0, plant=Plant(patch=patch))
    syncs = FaultyRun(script, SOUND)
    syncs()
    for number in range(first, syncs.fault.counts["sync"] + 1):
        injector.replay(f"{script}!sync{number}-eio-{how}")
        if injector.violations:
            break
    assert injector.violations
    tried(
        f"planted: {name}",
        f"{injector.faults:,} faults, {injector.images:,} images",
        seeds=script,
        found=f"caught {len(injector.violations)} times",
    )
