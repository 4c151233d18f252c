"""The power cut at every write of a store, with every image that may be left, and a judge.

Behind every event of a `Run` the images are made that a disk may then hold, and looked at:

- The file is whole, and in one of the states that were committed, none older than the last call
  that returned. (The state behind an event is what the image with all of it holds.)
- What the callers were told is true, whatever the file says: what was pushed is there, in its
  place, what was pulled is not, a lease holds, and a call that was cut off did all or nothing.
- In some images the stores go on to work, and the power is cut again: no seq is used twice, and
  what was judged once is judged the same for ever.

The name of an image, SEED/EVENT/MODE and so on, says how it came about, so it can be made again.
"""

import contextlib
import os
import random
import tempfile
from typing import NamedTuple

import apsw
from disks import DRAWN, Disk
from runs import MEMORY, SOUND, Run, Violation, likeliest, live_rows

import sqlspace

__all__ = ["Explorer", "Walk", "look"]

GENERATIONS = 3
SELECT_ROWS = "SELECT * FROM sqlspace_entries ORDER BY seq"
SELECT_SCHEMA = "SELECT * FROM sqlspace_schema ORDER BY version"


# -- looking at what is left


class Seen(NamedTuple):
    """What an image holds."""

    state: int  # a hash of all of it
    live: dict  # payload to (seq, key, state, token, deadline)
    top: int


def look(path, files):
    """What these files hold.

    Raises:
        apsw.Error: They can't be read.
        Violation: They are damaged.
    """
    lay(path, files)
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE, vfs="unix-excl")
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        found = connection.pragma("integrity_check")
        if found != "ok":
            raise Violation(f"integrity_check: {found}")
        rows = connection.execute(SELECT_ROWS).fetchall()
        schema = connection.execute(SELECT_SCHEMA).fetchall()
        live = live_rows(connection)
    finally:
        connection.close()
    return Seen(hash((tuple(rows), tuple(schema))), live, rows[-1][0] if rows else 0)


def lay(path, files):
    for end in ("", "-wal", "-journal"):
        if end in files:
            with open(path + end, "wb") as file:
                file.write(files[end])
        elif os.path.exists(path + end):
            os.remove(path + end)


def check_made(path, files):
    """A file whose making was cut off can be made, or used, by the next one to open it."""
    lay(path, files)
    with sqlspace.open(path) as store:
        store.push("a", b"1")
        if store.pullp("a") != b"1":
            raise Violation("what was pushed into it is not there")
    for end in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + end)


# -- cutting


class Walk:
    """Through the events of a run, with what was told until then.

    Args:
        run: That is done.
    """

    def __init__(self, run):
        self.run = run
        self.disk = Disk(run.files, deaf=run.plant.deaf)
        self.facts = dict(run.before)
        self.states = {}  # each state, and behind which event the file was last in it
        self.floor = 0  # no state older than the one behind this event
        self.top = run.top_before  # the highest seq that anybody was told
        self.made = not run.first
        self.now = run.began
        self.coming = sorted(run.deeds, key=lambda deed: deed.begin)
        self.under_way = []
        self.verdicts = {}

    def go(self, number):
        """Behind so many events."""
        if number:
            self.disk.apply(self.run.events[number - 1])
        while self.coming and self.coming[0].begin <= number:
            self.under_way.append(self.coming.pop(0))
            self.now = max(self.now, self.under_way[-1].now)
            self.verdicts.clear()
        for deed in [each for each in self.under_way if each.end <= number]:
            self.under_way.remove(deed)
            for payload, (_, after) in deed.effects.items():
                self.facts[payload] = after
                if after is not None and after.seq is not None:
                    self.top = max(self.top, after.seq)
            self.verdicts.clear()
            self.made = self.made or not deed.raised
            if deed.alone and deed.effects:  # else nothing was promised
                self.floor = deed.end

    def judge(self, seen):
        """Raises Violation."""
        if seen.state not in self.verdicts:
            self.verdicts[seen.state] = self.verdict(seen)
        if verdict := self.verdicts[seen.state]:
            raise Violation(verdict)

    def verdict(self, seen):
        """What is wrong with it; None: nothing."""
        doubtful = {}
        for deed in self.under_way:
            for payload, facts in (*deed.effects.items(), *deed.might.items()):
                doubtful.setdefault(payload, []).extend(facts)
        for payload, fact in self.facts.items():
            row = seen.live.get(payload)
            if payload not in doubtful and not self.fits(fact, row):
                return f"{payload[:40]!r} is {row}, and was told to be {fact}"
        for payload, row in seen.live.items():
            if payload not in self.facts and payload not in doubtful:
                return f"{payload[:40]!r} is {row}, and nobody has pushed it"
        for payload, facts in doubtful.items():
            if not any(self.fits(fact, seen.live.get(payload)) for fact in facts):
                return f"{payload[:40]!r} is {seen.live.get(payload)}, which is none of {facts}"
        for deed in self.under_way:
            whole = deed.is_whole(
                lambda payload, fact: (
                    len(doubtful[payload]) > 2 or self.fits(fact, seen.live.get(payload))
                )
            )
            if not whole:
                return f"{deed.name} is half done: {deed.effects or deed.might}"
        if self.states.get(seen.state, -1) < self.floor:
            return f"the file is in no state that was committed since event {self.floor}"
        return None

    def fits(self, fact, row):
        return row is None if fact is None else fact.fits(row, self.now)

    def next_run(self, name, files, seen):
        """What goes on after a power cut: what was under way is as it was seen, for ever."""
        facts, top = dict(self.facts), self.top
        for deed in self.under_way:
            for payload, either in (*deed.effects.items(), *deed.might.items()):
                row = seen.live.get(payload)
                if fitting := [fact for fact in either if self.fits(fact, row)]:
                    facts[payload] = fact = likeliest(fitting, row)
                    top = max(top, fact.seq or 0 if fact else 0)  # dedupe may find it
        return Run(name, files, facts, top, self.now, self.run.plant)


class Explorer:
    """Cuts the power behind every event of a run, and of the runs that go on after that.

    Args:
        each: So many images of each mode that is drawn.
        goes_on: The part of the images in which the stores go on to work.
        plant: What is wrong with the runs.
        watch: Called with this before each image; when it is false, that is the end.

    Attributes:
        images, runs, deeds: How many there were.
        at: The name of the last image.
        violations: (the image's name, what is wrong with it).
    """

    def __init__(self, *, each=1, goes_on=0.002, plant=SOUND, watch=lambda _: True):
        self.each = each
        self.goes_on = goes_on
        self.plant = plant
        self.watch = watch
        self.images = self.runs = self.deeds = 0
        self.violations = []
        self.at = ""

    def explore(self, seed):
        """All of the run with this seed."""
        self.go_through(self.first_run(str(seed)))

    def replay(self, image):
        """One image, by its name, and nothing of what comes after it."""
        seed, *steps = image.split("/")
        only = [(int(number), mode) for number, mode in zip(steps[::2], steps[1::2], strict=True)]
        self.go_through(self.first_run(seed), only)

    def go_through(self, run, only=()):
        """Do it, and cut the power behind each of its events.

        Args:
            run: That is not done yet.
            only: Just this image, as (event, mode), and what comes of it.
        """
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            self._path = os.path.join(folder, "image.db")
            self._go_through(run, only)

    def first_run(self, name):
        """With nothing on the disk."""
        return Run(name, {}, {}, plant=self.plant)

    def begins(self, run):
        """Behind which event the first power cut is."""
        return 0

    def ends(self, run):
        """Behind which event the last one is."""
        return len(run.events)

    def _go_through(self, run, only):
        self.runs += 1
        try:
            run()
        except (Violation, sqlspace.SpaceError) as error:
            self._note(run.name, error)
        self.deeds += len(run.deeds)
        walk = Walk(run)
        for number in range((only[0][0] if only else self.ends(run)) + 1):
            walk.go(number)
            if number < self.begins(run):
                continue
            for mode in self._modes(walk, number, only):
                if not self.watch(self):
                    return
                self._look(walk, number, mode, only)

    def make(self, disk, mode, dice):
        """The files of an image."""
        return disk.image(mode.rstrip("0123456789"), dice)

    def _modes(self, walk, number, only):
        modes = ["all"]  # the first, for it says which state the file is in
        if only:
            last, mode = only[0]
            return [*modes, mode] if number == last and mode != "all" else modes
        if walk.disk.is_certain():
            return modes
        return [*modes, "none", *(f"{mode}{n}" for mode in DRAWN for n in range(self.each))]

    def _look(self, walk, number, mode, only):
        self.at = image = f"{walk.run.name}/{number}/{mode}"
        self.images += 1
        dice = random.Random(image)
        files = self.make(walk.disk, mode, dice)
        try:
            if not walk.made:
                check_made(self._path, files)
                return
            seen = look(self._path, files)
            if mode == "all":
                walk.states[seen.state] = number
            walk.judge(seen)
        except (Violation, sqlspace.SpaceError, apsw.Error) as error:
            self._note(image, error)
            return
        if only:
            goes_on = only[0] == (number, mode) and len(only) > 1
        else:
            goes_on = dice.random() < self.goes_on and image.count("/") < 2 * GENERATIONS
        if goes_on:
            self._go_through(walk.next_run(image, files, seen), only[1:])

    def _note(self, image, error):
        self.violations.append((image, f"{type(error).__name__}: {error}"))
