"""A full disk can be drained: what the reserve is for, whose it is, and what it leaves alone."""

import contextlib
import errno
import logging
import math
import os
import shutil
import stat
import subprocess
import sys
import threading
import types

import apsw
import pytest
from proof import tried

import sqlspace
from sqlspace import reserve
from sqlspace.errors import FullError

MEGABYTE = 1 << 20


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


# -- disks that are full


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request, tmp_path):
    """A file system of 48 MB, with nothing else on it."""
    place = tmp_path / "disk"
    place.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place]
    else:
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, 48 * MEGABYTE)
        # Not everybody has it on the path; without it the mount will say so.
        if make := shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            make = [make, "-q", "-m", "0", "-b", "1024", image]  # smaller than a page of the -shm
            subprocess.run(make, check=False, capture_output=True)
        mount = ["mount", "-o", "loop", image, place]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=False)


class Small(apsw.VFS):
    """A disk of so many bytes, as far as SQLite and the reserve can tell."""

    capacity = 1 << 62

    def __init__(self, path):
        super().__init__("small", "unix")
        self.files = [path, path + "-wal", path + "-reserve"]

    def used(self):
        return sum(os.stat(name).st_size for name in self.files if os.path.exists(name))

    def xOpen(self, name, flags):
        return SmallFile(self, name, flags)

    def allocate(self, descriptor, end):
        if self.used() + end - os.fstat(descriptor).st_size > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(descriptor, 0, end)


class SmallFile(apsw.VFSFile):
    def __init__(self, disk, name, flags):
        super().__init__("unix", name, flags)
        self.disk = disk

    def xWrite(self, data, offset):
        more = offset + len(data) - self.xFileSize()
        if more > 0 and self.disk.used() + more > self.disk.capacity:
            raise apsw.FullError("a full disk")
        return super().xWrite(data, offset)


@pytest.fixture
def small(path, monkeypatch):
    """The same without any privilege: what grows is counted."""
    disk = Small(path)
    monkeypatch.setattr(reserve, "_allocate", disk.allocate)
    try:
        yield disk
    finally:
        disk.capacity = 1 << 62
        disk.unregister()


@contextlib.contextmanager
def open_small(path, sync=True):
    """A store on such a disk; with no checkpoint of SQLite's own, whose errors apsw would tell."""
    with sqlspace.open(path, sync=sync, vfs="small") as store:
        store._database._session.connection.pragma("wal_autocheckpoint", 0)
        yield store


def checkpoint(path):
    """As SQLite does it by itself now and then, whether there is room or not."""
    with contextlib.closing(apsw.Connection(path, vfs="small")) as other:
        with contextlib.suppress(apsw.FullError):
            other.wal_checkpoint()
        other.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)


def a_second_later(store):
    """The next verb looks again at all that is looked at once a second."""
    session = store._database._session
    session.identity.look_at = session.reserve._look_at = 0.0


def size(path):
    return os.stat(path + "-reserve").st_size


def growth(path):
    """What the file must still grow by."""
    with contextlib.closing(apsw.Connection(path)) as other:
        pages = other.pragma("page_count") * other.pragma("page_size")
    return pages - os.stat(path).st_size


def fill(store, payload, threads=1, every=None):
    """Push until the disk is full; what was acknowledged, by seq."""
    pushed = {}

    def push():
        refused = 0
        while refused < 3:
            try:
                data = payload(len(pushed))
                pushed[store.push("k", data)] = data
                if every and len(pushed) % every == 0:
                    checkpoint(store.path)
            except FullError:
                refused += 1

    workers = [threading.Thread(target=push) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [pushed[seq] for seq in sorted(pushed)]


def take(store, limit):
    """Pull, or claim and ack, so many entries."""
    taken = []
    while len(taken) < limit:
        if len(taken) % 2:
            payload = store.pullp("k")
        elif (delivery := store.claimp("k")) is None:
            payload = None
        else:
            delivery.ack()
            payload = delivery.payload
        if payload is None:
            break
        taken.append(payload)
    return taken


def check_restored(store):
    """What must hold once the store is drained: it is small, and goes on as before."""
    store.compact()
    assert store.stats().wal_bytes == 0
    assert store.push("k", b"again")
    assert size(store.path) >= reserve._STEP_BYTES
    assert store.pull("k", 0) == b"again"


DRAIN = """
import sys, sqlspace
with sqlspace.open(sys.argv[1]) as store:
    while (delivery := store.claimp("k")) is not None:
        delivery.ack()
        print(delivery.payload[:16].hex())
        if (payload := store.pullp("k")) is None:
            break
        print(payload[:16].hex())
"""


def entry(length):
    return lambda _: os.urandom(length)


def entry_with_one_large(number):
    return os.urandom(8_000_000 if number == 20 else 20_000)


@pytest.fixture(scope="module")
def drained():
    """How many entries of each disk; all are one line of the table."""
    counts = []
    yield counts
    if counts:
        tried(f"{len(counts)} full disks, drained", f"{sum(counts):,} entries")


@pytest.mark.parametrize(
    ("sync", "threads", "payload", "reopens"),
    [
        (True, 1, entry(50_000), False),
        ("group", 8, entry(20_000), True),
        (True, 1, entry_with_one_large, True),
        ("group", 1, entry_with_one_large, False),
    ],
    ids=["one", "eight", "large, reopened", "large"],
)
def test_a_disk_that_pushes_have_filled_can_be_drained(
    disk, drained, sync, threads, payload, reopens
):
    """By who has it open, and by a process that opens it then; all of it once, and in order."""
    path = str(disk / "queue.db")
    store = sqlspace.open(path, sync=sync)
    pushed = fill(store, payload, threads)
    assert len(pushed) > 20
    assert any(len(each) > MEGABYTE for each in pushed) == (payload is entry_with_one_large)
    if reopens:
        store.close()
    with open(disk / "other", "wb", buffering=0) as other, contextlib.suppress(OSError):
        while other.write(bytes(512)):
            pass
    if reopens:
        store = sqlspace.open(path, sync=sync)
    taken = take(store, len(pushed) // 2)
    assert taken == pushed[: len(taken)]
    done = subprocess.run(
        [sys.executable, "-c", DRAIN, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [each[:16].hex() for each in pushed[len(taken) :]]
    check_restored(store)
    store.close()
    drained.append(len(pushed))


@pytest.mark.parametrize("megabytes", [2, 6, 14])
@pytest.mark.parametrize("every", [None, 100])
@pytest.mark.parametrize(("threads", "sync"), [(1, True), (8, "group")])
def test_a_small_disk_can_be_drained_too(small, path, drained, threads, every, megabytes, sync):
    """Whether the -wal was ever checkpointed or not."""
    small.capacity = megabytes * MEGABYTE
    with open_small(path, sync) as store:
        pushed = fill(store, entry(5_000), threads, every)
        assert len(pushed) > 20
        small.capacity = small.used()
        assert take(store, len(pushed) // 2) == pushed[: len(pushed) // 2]
        with open_small(path, sync) as other:
            assert take(other, len(pushed)) == pushed[len(pushed) // 2 :]
        check_restored(store)
    drained.append(len(pushed))


def test_without_the_reserve_it_can_not(small, path, monkeypatch):
    """The tests above would see it."""
    monkeypatch.setattr(reserve, "_cut", lambda *_: None)
    small.capacity = 6 * MEGABYTE
    with open_small(path) as store:
        pushed = fill(store, entry(5_000))
        small.capacity = small.used()
        with pytest.raises(FullError):
            take(store, len(pushed))
        small.capacity = 1 << 62


def test_no_push_gets_the_room_that_is_kept_for_takers(small, path):
    """The reserve covers the -wal, and stays as large as it is."""
    small.capacity = 6 * MEGABYTE
    with open_small(path) as store:
        pushed = fill(store, entry(5_000))
        kept = size(path)
        assert kept > os.stat(path + "-wal").st_size
        for refused in (
            lambda: store.push("k", bytes(50_000)),
            lambda: store.push("k", bytes(50_000), dedupe="d"),
            lambda: store.push_many("k", [bytes(50_000)]),
            lambda: store.put("k", bytes(50_000)),
        ):
            with pytest.raises(FullError):
                refused()
            assert size(path) == kept
        assert [each.payload for each in store.entries("k")] == pushed
        small.capacity = 1 << 62


def test_a_push_after_it_was_given_back_makes_it_again_or_is_refused(small, path):
    """Else pushes would take the room for which it was given back."""
    small.capacity = 6 * MEGABYTE
    with open_small(path) as store:
        fill(store, entry(5_000))
        session = store._database._session
        with contextlib.closing(apsw.Connection(path, vfs="small")) as reader:
            reader.execute("BEGIN; SELECT * FROM sqlspace_keys").fetchone()
            session.reserve.give_back(session.connection)
            assert size(path) == reserve._CONTENT_BYTES
            small.capacity = small.used()  # another application has taken it
            with pytest.raises(FullError):  # nor can the -wal be cut to make room
                store.push("k", b"x")
            reader.execute("COMMIT")
        small.capacity = 1 << 62
        store.push("k", b"x")
        assert size(path) > os.stat(path + "-wal").st_size


def test_a_take_after_it_was_given_back_makes_it_again_too(path, monkeypatch):
    """At once: else another application would have a second to take the room."""
    monkeypatch.setattr(reserve, "_LOOK_AGAIN_SECONDS", 1e9)
    with sqlspace.open(path) as store:
        store.push("k", b"x")
        session = store._database._session
        session.reserve.give_back(session.connection)
        assert size(path) == reserve._CONTENT_BYTES
        assert store.pull("k", 0) == b"x"
        assert size(path) >= reserve._STEP_BYTES


def test_it_covers_what_several_push_in_turns(path, monkeypatch):
    """None of them counts for itself what it may push until it looks again."""
    monkeypatch.setattr(reserve, "_LOOK_AGAIN_SECONDS", 1e9)
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(sqlspace.open(path, sync=False)) for _ in range(5)]
        sessions = [store._database._session for store in stores]
        for session in sessions:
            session.connection.pragma("wal_autocheckpoint", 0)
        for number in range(200):
            stores[number % 5].push("k", bytes(20_000))
            wal = os.stat(path + "-wal").st_size
            assert size(path) >= sessions[0].reserve._needed(wal, wal), number


@pytest.mark.parametrize("together", [False, True])
def test_a_push_does_not_get_what_the_commit_before_the_first_write_was_given(
    small, path, together
):
    """That may use the reserve, and the push behind it may not."""
    small.capacity = 6 * MEGABYTE
    with open_small(path) as store:
        pushed = fill(store, entry(5_000))
        small.capacity = 1 << 62
    with open_small(path) as store:
        small.capacity = small.used()
        with pytest.raises(FullError), contextlib.ExitStack() as stack:
            verbs = stack.enter_context(store.transaction()) if together else store
            verbs.push("k", b"x")
        assert take(store, len(pushed)) == pushed
        small.capacity = 1 << 62


def test_a_push_that_the_reserve_can_not_be_made_to_cover_changes_nothing(small, path):
    """It is refused before its commit."""
    with open_small(path) as store:
        store.push("k", b"x")
        kept = size(path)
        small.capacity = small.used() + 3 * MEGABYTE  # for the push, and not for the reserve
        with pytest.raises(FullError):
            store.push("k", bytes(2 * MEGABYTE))
        with pytest.raises(FullError), store.transaction() as together:
            together.push("k", b"y")
            together.push("k", bytes(2 * MEGABYTE))
        assert size(path) == kept
        assert [each.payload for each in store.entries("k")] == [b"x"]
        small.capacity = small.used() + 7 * MEGABYTE
        store.push("k", bytes(2 * MEGABYTE))
        assert size(path) > 4 * MEGABYTE
        small.capacity = 1 << 62


def test_where_the_wal_can_not_take_a_large_push_the_reserve_does_not_grow_for_it(
    path, monkeypatch
):
    """Else one that was refused would have used up the room of all others."""
    with sqlspace.open(path) as store:
        store.push("k", b"x")
        kept = size(path)
        with monkeypatch.context() as patch:
            patch.setattr(reserve.Reserve, "_is_room", lambda *_: False)
            with pytest.raises(FullError):
                store.push("k", bytes(8 * MEGABYTE))
        assert size(path) == kept
        store.push("k", bytes(8 * MEGABYTE))
        assert size(path) > 16 * MEGABYTE


def test_a_transaction_that_only_takes_makes_room_for_the_next(small, path):
    """A caller's block can't be run again, but the caller can."""
    small.capacity = 6 * MEGABYTE
    with open_small(path) as store:
        pushed = fill(store, entry(5_000))
        small.capacity = small.used()
        fill(store, entry(1))  # there was some room left in the -wal
        session = store._database._session
        session.reserve.due, session.identity.look_at = False, math.inf  # no time goes by
        kept = size(path)
        with pytest.raises(FullError), store.transaction() as together:
            together.push("k", b"x")
            together.pull_many("k", 100)
        assert size(path) == kept
        with pytest.raises(FullError), store.transaction() as together:
            assert together.pull_many("k", 100) == pushed[:100]
        with store.transaction() as together:
            assert together.pull_many("k", 100) == pushed[:100]
        assert store.pull("k", 0) == pushed[100]


# -- whose file it is


def test_it_is_made_at_the_first_write_like_the_database_and_cut_at_the_end(path):
    """A store that only looks makes none; one that is closed keeps little."""
    with sqlspace.open(path, mode=0o640) as store:
        assert store.peek("k") is None
        assert not os.path.exists(path + "-reserve")
        store._database._session.connection.pragma("wal_autocheckpoint", 0)
        store.push_many("k", [bytes(1000)] * 8_000)
        assert size(path) >= growth(path) > 4 * MEGABYTE
        assert stat.S_IMODE(os.stat(path + "-reserve").st_mode) == 0o640
        with sqlspace.open(path) as other:
            other.push("k", b"x")
        assert size(path) >= growth(path)
    assert 0 < size(path) <= MEGABYTE


def test_who_uses_a_store_alone_keeps_no_descriptor_of_it_open(tmp_path):
    """A thousand stores in one process would need a thousand more."""
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(sqlspace.open(tmp_path / f"{n}.db")) for n in range(20)]
        for store in stores:
            store.push("k", bytes(100_000))
            store.pull("k", 0)
            store.push("k", b"x")
            assert size(store.path) > 0
        assert not [name for name in files_open() if name.endswith("-reserve")]


def files_open():
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            yield os.readlink(f"/proc/self/fd/{number}")


@pytest.mark.parametrize(("block", "opens"), [(1024, False), (4096, True)])
def test_where_the_shm_has_no_room_an_open_is_refused(path, monkeypatch, block, opens):
    """Blocks smaller than its pages are missing only when they are touched: by SIGBUS."""
    found = types.SimpleNamespace(f_frsize=block, f_bavail=40_000 // block)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    with contextlib.nullcontext() if opens else pytest.raises(sqlspace.FullError, match="-shm"):
        sqlspace.open(path).close()
    assert os.path.exists(path) == opens


def test_an_open_where_the_shm_has_no_room_gives_the_reserve_back(path, monkeypatch):
    """Then it has."""
    with sqlspace.open(path) as store:
        store.push("k", b"x")
    sound = os.statvfs

    def tight(place):
        disk = sound(place)
        blocks = 0 if size(path) > 1000 else disk.f_bavail
        return types.SimpleNamespace(f_frsize=1024, f_bavail=blocks)

    monkeypatch.setattr(os, "statvfs", tight)
    with sqlspace.open(path) as store:
        assert store.pullp("k") == b"x"


def test_one_that_was_deleted_is_made_again(path):
    """Within a second, by whoever writes."""
    with sqlspace.open(path) as store:
        store.push("k", b"x")
        os.unlink(path + "-reserve")
        a_second_later(store)
        store.pull("k", 0)
        assert size(path) >= reserve._STEP_BYTES


def test_a_copy_of_it_that_has_holes_or_only_zeros_is_filled(path):
    """As `cp` makes it, and as a power cut may leave it."""
    with open(path + "-reserve", "wb") as file:
        file.truncate(MEGABYTE)
    with sqlspace.open(path) as store:
        store.push("k", b"x")
        found = os.stat(path + "-reserve")
        assert found.st_blocks * 512 >= found.st_size >= reserve._STEP_BYTES
    with open(path + "-reserve", "rb") as file:
        assert file.read(8) == b"sqlspace"


def test_one_that_is_deleted_while_it_is_opened_is_no_strangers(path):
    """It has no name any more, which is not one too many."""
    with open(path, "wb+", buffering=0) as file:
        file.write(reserve._TITLE)
        os.unlink(path)
        assert reserve._is_ours(file.fileno())


@pytest.mark.parametrize("length", [0, 1, 100, len(reserve._TITLE)])
def test_what_a_power_cut_left_of_its_first_lines_is_still_ours(path, length):
    """Else it would be taken for somebody's own file, and its room never be given back."""
    with open(path + "-reserve", "wb") as file:
        file.write(reserve._TITLE[:length] + bytes(MEGABYTE))
    with sqlspace.open(path) as store:
        store.push("k", b"x")
        store.compact()
        with open(path + "-reserve", "rb") as file:
            assert file.read(len(reserve._TITLE)) == reserve._TITLE


def test_two_that_make_it_at_the_same_moment_both_have_it(path, monkeypatch, caplog):
    """Who has just been alone doesn't know of the other yet."""
    with sqlspace.open(path) as store:
        sound = os.open

        def behind_another(place, flags, *arguments):
            if flags & os.O_EXCL:
                with open(place, "xb"):
                    pass
            return sound(place, flags, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", behind_another)
            store.push("k", b"x")
        assert size(path) >= reserve._STEP_BYTES
    assert not caplog.records


def test_a_cut_by_another_in_the_middle_of_growing_leaves_no_hole(path, monkeypatch):
    """Else it would look large, and hold no room."""
    with sqlspace.open(path) as store:
        store.push("k", b"x")
        allocate = reserve._allocate

        def after_a_release(descriptor, end):
            assert reserve.release(path)
            allocate(descriptor, end)

        monkeypatch.setattr(reserve, "_allocate", after_a_release)
        store.push("k", bytes(MEGABYTE))
        found = os.stat(path + "-reserve")
        assert found.st_blocks * 512 >= found.st_size > MEGABYTE


def test_however_often_somebody_comes_it_is_looked_after_once_a_second(path, monkeypatch):
    """Each ring of another process, and each look with another verb, would open it anew."""
    looks = []
    tend = reserve.Reserve.tend
    monkeypatch.setattr(
        reserve.Reserve, "tend", lambda *arguments: looks.append(None) or tend(*arguments)
    )
    with sqlspace.open(path) as store:
        monkeypatch.setattr(reserve, "_LOOK_AGAIN_SECONDS", 1e9)
        for number in range(20):
            store._database._session.identity.alarmed = True
            store.push("k", b"x")
            with store.transaction() as together:
                together.push("k", b"y")
            assert len(looks) == 1, number
        monkeypatch.undo()


def test_what_kept_it_away_may_end(path, monkeypatch, caplog):
    """The process may open no more files, or the file was another's: it is tried again."""
    monkeypatch.setattr(os, "open", refuse_the_reserve(os.open))
    with sqlspace.open(path) as store:
        for _ in range(2):
            store.push("k", b"x")
            a_second_later(store)
        assert not os.path.exists(path + "-reserve")
        monkeypatch.undo()
        a_second_later(store)
        store.push("k", b"x")
        assert size(path) >= reserve._STEP_BYTES
    assert len(caplog.records) == 1


def refuse_the_reserve(sound):
    def refusing(place, *arguments, **options):
        if str(place).endswith("-reserve"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return sound(place, *arguments, **options)

    return refusing


def make_file(place, _):
    place.write_bytes(b"my own")


def make_link(place, other):
    place.symlink_to(other)


def make_hard_link(place, other):
    place.hardlink_to(other)


def make_pipe(place, _):
    os.mkfifo(place)


def make_directory(place, _):
    place.mkdir()


@pytest.mark.parametrize("make", [make_file, make_link, make_hard_link, make_pipe, make_directory])
def test_what_is_not_ours_is_left_alone(tmp_path, path, make, caplog):
    """Then there is no reserve, which is told once; not even one of another store, by a link."""
    other = tmp_path / "other"
    other.write_bytes(reserve._TITLE + bytes(MEGABYTE))
    place = tmp_path / "queue.db-reserve"
    make(place, other)
    before = place.lstat(), other.read_bytes()
    with caplog.at_level(logging.WARNING), sqlspace.open(path) as store:
        for payload in (b"x", bytes(MEGABYTE), b"y"):
            store.push("k", payload)
            assert store.pull("k", 0) == payload
        store.compact()
    after = place.lstat(), other.read_bytes()
    assert (after[0].st_mode, after[0].st_size, after[0].st_mtime_ns, after[1]) == (
        (before[0].st_mode, before[0].st_size, before[0].st_mtime_ns, before[1])
    )
    assert sum("queue.db-reserve: " in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_no_room_can_be_allocated_it_is_written(path, monkeypatch, number):
    """Some file systems know no fallocate."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with sqlspace.open(path) as store:
        store.push("k", bytes(MEGABYTE))
        found = os.stat(path + "-reserve")
        assert found.st_blocks * 512 >= found.st_size > 2 * MEGABYTE


def test_a_restored_database_takes_over_the_reserve_that_it_finds(tmp_path, path):
    """It may be another's, of another size: it holds nothing but room."""
    with sqlspace.open(path) as store:
        store.push("k", bytes(MEGABYTE))
        store.backup(tmp_path / "copy.db")
        assert not os.path.exists(tmp_path / "copy.db-reserve")
        shutil.copy(path + "-reserve", tmp_path / "copy.db-reserve")
    with sqlspace.open(tmp_path / "copy.db") as copy:
        assert copy.pull("k", 0) == bytes(MEGABYTE)
        copy.push("k", b"x")


def test_in_another_applications_database_it_covers_what_that_writes_too(path):
    """The -wal holds both."""
    with contextlib.closing(apsw.Connection(path)) as theirs:
        theirs.pragma("journal_mode", "wal")
        theirs.execute("CREATE TABLE t (a)")
        with sqlspace.open(path, embed=True) as store:
            store.push("k", b"x")
            theirs.execute("INSERT INTO t VALUES (zeroblob(3000000))")
            a_second_later(store)
            store.push("k", b"y")
            assert size(path) >= growth(path) > 3_000_000
