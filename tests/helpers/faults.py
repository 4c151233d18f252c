"""A disk that fails: at any one operation, once or for good, while a store is at work.

A run whose name ends with a fault, SEED!KIND NUMBER-ERROR-HOW, works on a disk where the k-th
operation of that kind fails. What a call that raises has promised is held against it:

- A `StoreError`: it did not happen, and no later power cut brings it back.
- An `UndecidedError`: it did, or it did not, all of it; which of both it is, is settled with the
  next call that writes. The store says so at every call and can be closed; a new one works.
- Nothing else is raised, nothing stays locked, and what the store had open is closed with it.

A fault that is stuck is over when a store has become unusable, or after a few calls.

SQLite swallows what fails in a checkpoint behind a commit. An exception of Python's would come
through nevertheless, so here the checkpoint is made, and its failure swallowed, in a hook of ours.
"""

import contextlib
import os
import random

import apsw
from powercuts import Explorer
from runs import Deed, Fact, Run, Violation, likeliest, live_rows

import sqlspace

__all__ = ["SCRIPTS", "Fault", "FaultyRun", "Injector"]

KINDS = {
    "read": apsw.SQLITE_IOERR_READ,
    "write": apsw.SQLITE_IOERR_WRITE,
    "truncate": apsw.SQLITE_IOERR_TRUNCATE,
    "sync": apsw.SQLITE_IOERR_FSYNC,
    "open": apsw.SQLITE_CANTOPEN,
    "delete": apsw.SQLITE_IOERR_DELETE,
}
FAULTS = [(kind, "eio", how) for kind in KINDS for how in ("once", "stuck")]
FAULTS += [("write", "enospc", "once"), ("write", "enospc", "stuck")]
PATIENCE = 3  # so many calls are refused before a fault that is stuck is over
AFTERWARDS = 3  # so many calls later the power is still cut

# Every verb, so that each of its operations fails once.
SCRIPT = (
    *("push", "push_many", "push", "browse", "claim", "extend", "ack", "put", "push", "pullp"),
    *("transaction", "another", "push_many", "pull_any", "claim", "nack", "remove", "pull_many"),
    *("push_many", "pull_any", "bury", "requeue", "compact", "push", "clear", "reopen"),
    *("push", "pullp", "browse"),
)
SCRIPTS = {"full": True, "group": "group"}  # their names, and how a store syncs there


class Fault:
    """What fails.

    Args:
        text: KIND NUMBER-ERROR-HOW, as in "write3-eio-once"; "": nothing.

    Attributes:
        fired: Whether it has struck.
        over: Whether the disk works again.
        armed: Whether it counts and strikes.
        counts: How many operations there were of each kind.
    """

    def __init__(self, text):
        place, self.error, how = text.split("-") if text else ("", "", "")
        self.kind = place.rstrip("0123456789")
        self.number = int(place[len(self.kind) :] or 0)
        self.stuck = how == "stuck"
        self.fired = self.over = self.armed = False
        self.counts = dict.fromkeys(KINDS, 0)

    def __call__(self, event):
        if not self.armed:
            return
        self.counts[event.kind] += 1
        if self.over or not self._strikes(event):
            return
        self.fired = True
        self.over = not self.stuck
        if self.error == "enospc":
            raise apsw.FullError("the disk is full")
        error = apsw.CantOpenError if event.kind == "open" else apsw.IOError
        failure = error("the disk fails")
        failure.extendedresult = KINDS[event.kind]
        raise failure

    def _strikes(self, event):
        if self.fired:
            return self.error == "eio" or event.kind == "write"
        return event.kind == self.kind and self.counts[event.kind] == self.number


class FaultyRun(Run):
    """Goes on after each failure, as a caller would.

    Attributes:
        struck: From the event before the call that the fault has struck, to a few calls behind the
            last one that was refused.
    """

    def __init__(self, name, plant):
        super().__init__(name, {}, {}, plant=plant)
        self.base, _, fault = name.partition("!")
        self.random.seed(self.base)
        self.dice.seed(self.base)
        self.fault = Fault(fault)
        self.fixed = SCRIPTS.get(self.base)
        self.refused = 0
        self.struck = None
        self.failed = []  # each call, and what it raised, until it is told
        self.crowded = False

    def disk(self, event):
        self.fault(event)

    def choose(self):
        super().choose()
        if self.fixed is not None:
            self.sync, self.history, self.checkpoint, self.keep = self.fixed, 2, 8, False

    def script(self):
        for verb in super().script() if self.fixed is None else SCRIPT:
            if self.struck is not None and len(self.deeds) > self.struck[1] + AFTERWARDS:
                return
            yield verb

    def key(self):
        return super().key() if self.fixed is None else "a"

    def open(self):
        super().open()
        connection = list(self.stores.values())[-1]._database._session.connection
        connection.set_wal_hook(self.checkpointed)

    def checkpointed(self, connection, _, pages):
        if pages >= self.checkpoint:
            with contextlib.suppress(apsw.Error):
                connection.wal_checkpoint()
        return apsw.SQLITE_OK

    @contextlib.contextmanager
    def armed(self, armed=True):
        before, self.fault.armed = self.fault.armed, armed
        try:
            yield
        finally:
            self.fault.armed = before

    def undisturbed(self):
        return self.armed(False)

    # -- what is told

    def do(self, name, call, effects, might=dict, most=None):
        begin, top = len(self.events), self.top
        try:
            with self.armed():
                value = call()
        except sqlspace.StoreError as error:
            failure = error
        except Exception as error:
            raise Violation(f"{name} leaks {error!r}") from error
        else:
            failure = None
            changes = self.changes(effects(value))
            self.tell(Deed(name, begin, len(self.events), self.now, changes))
        if self.fault.fired and self.struck is None:
            self.struck = begin, len(self.deeds)
        if failure is not None:
            self.top = top  # nobody was told of what it pushed
            self.refused += 1
            self.fail(name, begin, len(self.events), failure, might(), most)
            if name == "close":
                call()  # it is closed
            if not self.crowded:
                self.tell_failed()

    def close(self):
        super().close()
        found = [
            os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()
        ]
        self.ensure(not any(each.startswith(self.path) for each in found), f"left open: {found}")

    def fail(self, name, begin, end, failure, might, most):
        """It raised."""
        self.ensure(self.fault.fired, f"{name} raised {failure!r} for no reason")
        self.ensure(not isinstance(failure, sqlspace.BusyError), f"{name} was locked out")
        might = self.changes(might)
        deed = Deed(name, begin, end, self.now, {}, not self.crowded, True, might, most)
        self.failed.append((deed, failure))

    def tell_failed(self):
        """Hold what has raised to that."""
        failed, self.failed = self.failed, []
        undecided = []
        for deed, failure in failed:
            if isinstance(failure, sqlspace.UndecidedError):
                undecided.append(deed)
            else:
                self.tell(deed)
        if undecided:
            self.settle_undecided(undecided)
        if self.refused >= PATIENCE:
            self.fault.over = True
        if not self.stores:
            self.fault.over = True
            self.do("open", self.open, lambda _: {})
        if failed:
            self.struck = self.struck[0], len(self.deeds)

    def settle_undecided(self, deeds):
        """Their store can't be used any more; what they did is seen behind the next write."""
        poisoned = [name for name, s in self.stores.items() if s._database._poison is not None]
        self.ensure(len(poisoned) == 1, f"undecided, and {poisoned} are unusable")
        store = self.stores.pop(poisoned[0])
        with self.armed():
            for call in (
                lambda: store.push("a", b""),
                lambda: store.pullp("a"),
                lambda: store.peek("a"),
                store.stats,
                store.compact,
                store.transaction().__enter__,
            ):
                with contextlib.suppress(sqlspace.UndecidedError):
                    call()
                    raise Violation("an unusable store works")
        self.deliveries = [each for each in self.deliveries if each._store is not store]
        self.do("close", store.close, lambda _: {})
        if not self.stores:
            self.do("open", self.open, lambda _: {})  # the disk may not work yet
        self.fault.over = True
        self.push_many()  # without dedupe: it would find what was undecided
        live = self.rows()
        fits = lambda payload, fact: (  # noqa: E731
            live.get(payload) is None if fact is None else fact.fits(live.get(payload), self.now)
        )
        for deed in deeds:
            self.ensure(deed.is_whole(fits), f"{deed.name} is half done: {deed.might}, {live}")
            for payload, facts in deed.might.items():
                fitting = [fact for fact in facts if fits(payload, fact)]
                self.ensure(fitting, f"{payload[:40]!r} is none of {facts}")
                fact = likeliest(fitting, live.get(payload))
                deed.effects[payload] = (facts[0], fact)
                self.top = max(self.top, fact.seq or 0 if fact else 0)
            self.tell(deed._replace(end=len(self.events), alone=False))

    def rows(self):
        """What the file holds, by a connection of its own."""
        connection = apsw.Connection(self.path, apsw.SQLITE_OPEN_READWRITE, vfs="unix")
        try:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            return live_rows(connection)
        finally:
            connection.close()

    # -- verbs

    def crowd(self):
        begin = len(self.events)
        self.crowded = True
        try:
            with self.armed():
                super().crowd()
        finally:
            self.crowded = False
        if self.fault.fired and (self.struck is None or self.failed):
            self.struck = min(begin, *(self.struck or (begin,))), len(self.deeds)
        self.tell_failed()

    def refuse(self, member):
        self.ensure(isinstance(member.error, sqlspace.StoreError), f"leaks {member.error!r}")
        self.refused += 1
        might = {member.payload: Fact(None, member.key)}
        if member.payload is None:
            might = self.any_of(member.key)
        self.fail("crowd", member.began, member.ended, member.error, might, 1)

    def browse(self):
        key = self.key()
        store = self.store

        def call():
            store.stats(), store.keys(), store.len(key), store.peek(key), list(store.history(key))
            return [each.payload for each in store.entries(key)]

        def effects(payloads):
            sure = {p for p, f in self.live(key).items() if f.is_sure(self.now)}
            self.ensure(sure <= set(payloads), f"{sure - set(payloads)} can't be seen")
            return {}

        self.do("browse", call, effects)

    def bury(self):
        """Give something back behind its last attempt."""
        self.deliveries.clear()
        self.claim(last=True)
        self.nack()

    def reopen(self):
        """All of them are closed, and the -wal is gone."""
        while self.stores:
            self.deliveries.clear()
            self.do("close", self.stores.popitem()[1].close, lambda _: {})
        self.do("open", self.open, lambda _: {})


class Injector(Explorer):
    """Has the disk fail, and cuts the power at the points that follow.

    Args:
        sample: So many faults of each sort are drawn; None: all that there can be.
        part: Of the points that follow a fault, at so many the images are drawn, too.

    Attributes:
        faults: How many have struck.
    """

    def __init__(self, *, sample=2, part=0.1, goes_on=0.0002, **others):
        super().__init__(goes_on=goes_on, **others)
        self.sample = sample
        self.part = part
        self.faults = 0

    def explore(self, seed):
        """A seed, or the name of a script."""
        for text in list(self.texts(str(seed))):
            if not self.watch(self):
                return
            self.go_through(self.first_run(f"{seed}!{text}"))

    def texts(self, seed):
        """The faults: the first of each kind of operation, the second, up to what a run has."""
        sound = FaultyRun(seed, self.plant)
        sound()
        dice = random.Random(seed)
        for kind, error, how in FAULTS:
            numbers = range(1, sound.fault.counts[kind] + 1)
            if self.sample is not None:
                numbers = dice.sample(numbers, min(self.sample, len(numbers)))
            yield from (f"{kind}{number}-{error}-{how}" for number in numbers)

    def _modes(self, walk, number, only):
        modes = super()._modes(walk, number, only)
        drawn = random.Random(f"{walk.run.name}/{number}").random() < self.part
        return modes if only or drawn or not isinstance(walk.run, FaultyRun) else modes[:1]

    def first_run(self, name):
        return FaultyRun(name, self.plant)

    def begins(self, run):
        if not isinstance(run, FaultyRun):
            return super().begins(run)
        return run.struck[0] if run.struck else len(run.events)

    def ends(self, run):
        if not isinstance(run, FaultyRun) or run.struck is None:
            return super().ends(run)
        self.faults += 1
        last = run.deeds[: run.struck[1] + AFTERWARDS]
        return max((deed.end for deed in last), default=len(run.events))
