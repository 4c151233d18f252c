"""A disk that can lose its power: what SQLite wrote is recorded, and played back as far as wanted.

`Recorder` is a VFS over SQLite's own: it notes every write, truncation, sync, creation and
deletion of a store's files, and passes them on. `Disk` takes these notes one after the other, and
makes the images that a power cut at that point could leave.

What is durable is what was synced. Of all that was not, a disk may have kept anything:

    none     nothing of it
    all      all of it
    torn     what came first, and of the last write a part
    sectors  any sectors of 512 bytes, also in the middle of a page
    junk     the same, and what a file has grown by without being written holds rubbish

A name is durable once its directory was synced: SQLite does that with the first sync of a journal
or a -wal that it has made, and with a deletion that asks for it.

It can fail, too: `Recorder.before` raises, and what it refuses isn't done. But of a write for which
there is no room the first half is, and what a sync that fails has written nobody knows.
"""

import collections
import contextlib
import errno
import itertools
import os
from dataclasses import dataclass, field
from typing import NamedTuple

import apsw

from sqlspace import clock, commits, connection

__all__ = ["DRAWN", "Disk", "Event", "OwnSyncs", "Recorder"]

SECTOR = 512
DRAWN = ("torn", "sectors", "junk")  # by dice
JOURNALS = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL


class Event(NamedTuple):
    """What was done to a file.

    Attributes:
        kind: "write", "truncate", "sync", "create" or "delete"; "failed" is a sync that raised.
        end: The end of the file's name: "" is the database's, "-wal" …
        offset: Of a write; of a truncation the new size.
        data: Of a write.
        directory: Of a sync and a deletion, whether the directory was synced as well.
        lost: Of a write: a sync has failed since, and no later one will write it.
    """

    kind: str
    end: str
    offset: int = 0
    data: bytes = b""
    directory: bool = False
    lost: bool = False


# -- recording


class Recorder(apsw.VFS):
    """Notes what is done to the files of one store.

    Args:
        path: Of the database; other files are passed on and not noted.
        name: Under which SQLite knows this VFS.

    Attributes:
        events: All of them, in their order.
        before: Called with each event before it is carried out; what it raises is SQLite's error.
        failures: For the end of each name, how many syncs have failed.
        now: The time that SQLite is told, in Unix microseconds.
    """

    def __init__(self, path, name):
        super().__init__(name, "unix")
        self.path = path
        self.name = name
        self.events = []
        self.before = lambda event: None
        self.failures = collections.Counter()
        self.now = clock.now

    def xCurrentTimeInt64(self):
        return self.now() // 1000 + 210_866_760_000_000  # milliseconds of the Julian day

    def end_of(self, filename):
        """The end of a name, None if it isn't one of the store's."""
        if isinstance(filename, apsw.URIFilename):
            filename = filename.filename()
        if filename is None or not filename.startswith(self.path):
            return None
        return filename[len(self.path) :]

    def note(self, event, deed=lambda event: None):
        """Carry it out, or as much of it as a failing disk does."""
        try:
            self.before(event)
        except apsw.FullError:
            half = event._replace(data=event.data[: len(event.data) // 2])
            deed(half)
            self.events.append(half)
            raise
        except apsw.IOError:
            if event.kind == "sync":
                self.failures[event.end] += 1
                self.events.append(event._replace(kind="failed", directory=False))
            raise
        done = deed(event)
        self.events.append(event)
        return done

    def xOpen(self, name, flags):
        end = self.end_of(name)
        if end is None:
            return apsw.VFSFile("unix", name, flags)
        self.before(Event("open", end))
        if not os.path.exists(self.path + end):
            self.events.append(Event("create", end))
        return _File(self, end, name, flags)

    def xDelete(self, name, directory):
        end = self.end_of(name)
        if end is None or not os.path.exists(self.path + end):
            return super().xDelete(name, directory)
        event = Event("delete", end, directory=bool(directory))
        return self.note(event, lambda _: super(Recorder, self).xDelete(name, directory))


class _File(apsw.VFSFile):
    def __init__(self, recorder, end, name, flags):
        # SQLite syncs the directory with the first sync of a journal that it may have made.
        made = bool(flags[0] & JOURNALS and flags[0] & apsw.SQLITE_OPEN_CREATE)
        super().__init__("unix", name, flags)
        self._recorder = recorder
        self._end = end
        self._made = made
        self._told = recorder.failures[
            end
        ]  # of so many failures; Linux tells each open file of each

    def xRead(self, amount, offset):
        self._recorder.before(Event("read", self._end, offset))
        return super().xRead(amount, offset)

    def xWrite(self, data, offset):
        event = Event("write", self._end, offset, bytes(data))
        self._recorder.note(event, lambda event: super(_File, self).xWrite(event.data, offset))

    def xTruncate(self, size):
        event = Event("truncate", self._end, size)
        self._recorder.note(event, lambda _: super(_File, self).xTruncate(size))

    def xSync(self, flags):
        event = Event("sync", self._end, directory=self._made)
        told, self._told = self._told, self._recorder.failures[self._end]
        try:
            self._recorder.note(event, lambda _: super(_File, self).xSync(flags))
        except apsw.IOError:
            self._told += 1
            raise
        self._made = False
        if told < self._told:
            raise apsw.IOError("an earlier sync has failed")


class OwnSyncs:
    """In place of what sqlspace syncs and writes itself: noted like SQLite's.

    Args:
        recorder: Of the files.
    """

    def __init__(self, recorder):
        self._recorder = recorder
        self._told = {}  # descriptor to a number of failures

    def patch(self, patch):
        """Take their place."""
        patch.setattr(commits, "sync", self.sync)
        for module in (commits, connection):
            patch.setattr(module, "sync_anew", self.sync_anew)

    def opened(self, descriptor):
        """It knows of no failures yet."""
        self._told[descriptor] = self._recorder.failures["-wal"]

    def sync(self, descriptor):
        told = self._told[descriptor]
        with self._as_the_system():
            try:
                self._recorder.note(Event("sync", "-wal"))
            finally:
                self.opened(descriptor)
            if told < self._told[descriptor]:
                raise apsw.IOError("an earlier sync has failed")

    def sync_anew(self, descriptor):
        data = os.pread(descriptor, 1 << 30, 0)
        with self._as_the_system():
            self._recorder.note(Event("write", "-wal", 0, data))
            self._recorder.note(Event("sync", "-wal"))

    @contextlib.contextmanager
    def _as_the_system(self):
        try:
            yield
        except apsw.IOError as error:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        except apsw.FullError as error:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


# -- playing back


@dataclass
class _Contents:
    """Of one file: what is durable, and what isn't yet."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list = field(default_factory=list)

    def image(self, mode, random):
        """What may be left of it."""
        left = bytearray(self.durable)
        if mode == "all":
            kept = self.pending
        elif mode == "none":
            kept = []
        elif mode == "torn":
            kept = self.pending[: random.randint(0, len(self.pending))]
            if kept and kept[-1].kind == "write":
                data = kept[-1].data[: random.randint(0, len(kept[-1].data))]
                kept = [*kept[:-1], kept[-1]._replace(data=data)]
        else:
            chance = random.choice((0.1, 0.5, 0.9))
            kept = [
                piece
                for event in self.pending
                for piece in _sectors(event)
                if random.random() < chance
            ]
        if mode == "junk":
            size = max((each.offset + len(each.data) for each in self.pending), default=0)
            left += random.randbytes(max(0, size - len(left)))
        for event in kept:
            _apply(left, event)
        return bytes(left)


class Disk:
    """What is on a disk.

    Args:
        files: The end of each file's name, with its contents; all durable.
        deaf: Whether it says that it has synced, and has not.
    """

    def __init__(self, files, *, deaf=False):
        self._deaf = deaf
        self._durable = {end: _Contents(bytearray(data)) for end, data in files.items()}
        self._names = dict(self._durable)  # as they are seen now
        self._pending = []  # changes of names: (end, contents or None)

    def apply(self, event):
        """Take one more note."""
        if event.kind == "create":
            self._name(event.end, _Contents())
        elif event.kind == "delete":
            self._name(event.end, None)
        contents = self._names.get(event.end)
        if event.kind in ("write", "truncate"):
            contents.pending.append(event)
        elif event.kind == "failed":
            # The system takes the pages for clean: no later sync writes them.
            contents.pending = [each._replace(lost=True) for each in contents.pending]
        elif event.kind == "sync" and not self._deaf:
            self._sync(contents)
        if event.directory and not self._deaf:
            for end, found in self._pending:
                self._durable[end] = found
            self._pending.clear()

    def _name(self, end, contents):
        self._names[end] = contents
        self._pending.append((end, contents))

    @staticmethod
    def _sync(contents):
        undecided = []  # by an earlier sync that failed
        for event in contents.pending:
            if event.lost:
                undecided.append(event)
                continue
            _apply(contents.durable, event)
            # What is durable now is not overwritten by what was written before it.
            undecided = [left for each in undecided for left in _outside(each, event)]
        contents.pending = undecided

    def is_certain(self):
        """Whether a power cut can leave but one image."""
        return not self._pending and not any(
            each is not None and each.pending for each in self._names.values()
        )

    def image(self, mode, random):
        """The files that a power cut leaves: the end of each name, and its contents."""
        names = dict(self._durable)
        number = {"none": 0, "all": len(self._pending)}.get(mode)
        if number is None:
            number = random.randint(0, len(self._pending))
        names.update(self._pending[:number])
        return {
            end: contents.image(mode, random)
            for end, contents in sorted(names.items())
            if contents is not None
        }


def _apply(contents, event):
    if event.kind == "truncate":
        del contents[event.offset :]
        contents.extend(bytes(event.offset - len(contents)))
        return
    if len(contents) < event.offset:
        contents.extend(bytes(event.offset - len(contents)))
    contents[event.offset : event.offset + len(event.data)] = event.data


def _sectors(event):
    """The pieces of a write that a disk writes whole."""
    if event.kind == "truncate":
        return [event]
    begin, end = event.offset, event.offset + len(event.data)
    cuts = [begin, *range(begin - begin % SECTOR + SECTOR, end, SECTOR), end]
    return [
        event._replace(offset=cut, data=event.data[cut - begin : after - begin])
        for cut, after in itertools.pairwise(cuts)
    ]


def _outside(event, later):
    """What is left of an event where a later one hasn't decided."""
    if event.kind == "truncate":
        decided = later.kind == "truncate" or later.offset + len(later.data) > event.offset
        return [] if decided else [event]
    before = event._replace(data=event.data[: max(0, later.offset - event.offset)])
    if later.kind == "truncate":
        return [before] if before.data else []
    start = max(event.offset, later.offset + len(later.data))
    behind = event._replace(offset=start, data=event.data[start - event.offset :])
    return [each for each in (before, behind) if each.data]
