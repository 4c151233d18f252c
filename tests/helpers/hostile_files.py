"""Hostile files: bits, bytes and pages of a sound one changed, in the database and in its -wal."""

import os
import random
import struct

import apsw
from hostile import Look, base, ensure_same, lay_out, picture, use

import sqlspace

__all__ = ["case", "spoil"]

BASES = ["plain", "plain small", "killed", "killed small", "embedded small", "killed embedded",
         "first small"]  # fmt: skip
WAL_HEADER, FRAME_HEADER = 32, 24
EXTREMES = [b"\0", b"\x01", b"\x7f", b"\x80", b"\xff", b"\0\0", b"\xff\xff", b"\x7f\xff\xff\xff",
            b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x81" * 9, b"\xff" * 9]  # fmt: skip


def _flip(rng, data, size):
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        data[_somewhere(rng, data, size)] ^= 1 << rng.randrange(8)


def _set(rng, data, size):
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = _somewhere(rng, data, size)
        value = rng.choice(EXTREMES)
        data[at : at + len(value)] = value[: len(data) - at]


def _somewhere(rng, data, size):
    """Anywhere, or in the file's header, or where a page tells of itself, or of its cells."""
    page = rng.randrange(max(1, len(data) // size)) * size
    at = rng.choice(
        [
            rng.randrange(len(data)),
            rng.randrange(100),
            page + rng.randrange(12),
            page + rng.randrange(60),
            page + size - 1 - rng.randrange(80),
        ]
    )
    return min(at, len(data) - 1)


def _cut(rng, data, size):
    pages = rng.randrange(len(data) // size + 1)
    odd = rng.choice([0, 0, 1, -1, rng.randrange(size)])
    del data[max(0, pages * size + odd) :]


def _grow(rng, data, size):
    data += rng.choice([bytes, rng.randbytes])(rng.choice([1, 7, size, size * 3 + 1]))


def _move(rng, data, size):
    """A page over another."""
    one, other = (rng.randrange(len(data) // size) * size for _ in range(2))
    first, second = data[one : one + size], data[other : other + size]
    data[other : other + size] = first
    if rng.random() < 0.5:
        data[one : one + size] = second


def _fill(rng, data, size):
    """A page with nothing."""
    at = rng.randrange(len(data) // size) * size
    data[at : at + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])


WAYS = [_flip, _flip, _flip, _set, _set, _cut, _grow, _move, _fill]


def _frames(wal, size):
    """Where the frames of a -wal begin."""
    return range(WAL_HEADER, len(wal) - FRAME_HEADER - size + 1, FRAME_HEADER + size)


def _sums(data, one, two, order):
    for a, b in struct.iter_unpack(f"{order}II", data):
        one = (one + a + two) & 0xFFFFFFFF
        two = (two + b + one) & 0xFFFFFFFF
    return one, two


def _resum(wal, size):
    """Have SQLite take a -wal for sound, whatever its pages are."""
    order = ">" if wal[3] & 1 else "<"
    one, two = _sums(wal[:24], 0, 0, order)
    wal[24:32] = struct.pack(">II", one, two)
    for at in _frames(wal, size):
        wal[at + 8 : at + 16] = wal[16:24]
        one, two = _sums(wal[at : at + 8], one, two, order)
        one, two = _sums(wal[at + FRAME_HEADER : at + FRAME_HEADER + size], one, two, order)
        wal[at + 16 : at + 24] = struct.pack(">II", one, two)


def _spoil_page(rng, data, size):
    rng.choice([_flip, _set, _fill])(rng, data, size)


def spoil(rng, files, size, note):
    """One change, to a file of a store."""
    name = rng.choice(list(files))
    data = files[name]
    if len(data) < size:
        return
    if name == "-wal" and rng.random() < 0.7:  # a page of it, and the sums put right
        if not (starts := _frames(data, size)):
            return
        at = rng.choice(starts) + FRAME_HEADER
        page = data[at : at + size]
        _spoil_page(rng, page, size)
        data[at : at + size] = page
        if rng.random() < 0.1:
            data[at - FRAME_HEADER + rng.randrange(8)] ^= 1 << rng.randrange(8)
        _resum(data, size)
        note(f"a page of the -wal at {at}")
        return
    way = rng.choice(WAYS)
    way(rng, data, size)
    note(f"{way.__name__} of {name or 'the database'}")


def case(number, directory, note):
    """Spoil a file, open it, and use it."""
    rng = random.Random(f"files {number}")
    path = os.path.join(directory, "queue.db")
    kind = rng.choice(BASES)
    note(kind)
    size = 512 if "small" in kind else 4096
    files = {name: bytearray(data) for name, data in base(kind).items()}
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        spoil(rng, files, size, note)
    if rng.random() < 0.03:
        other = base(rng.choice(["killed", "killed small"]))
        files["-wal"] = bytearray(other["-wal"])
        note("the -wal of another")
    if rng.random() < 0.03:
        files["-journal"] = bytearray(rng.randbytes(rng.choice([0, 1, 28, 512, 600])))
        if rng.random() < 0.5:
            files["-journal"][:8] = bytes.fromhex("d9d505f920a163d7")
        note("a -journal")
    lay_out(files, path + "-witness")
    sound = _is_sound(path + "-witness")
    lay_out(files, path)
    waits = "-journal" in files  # SQLite may roll it back before we see what we refuse
    before = picture(path)
    try:
        store = sqlspace.open(path, embed="embedded" in kind, busy_timeout=1, sync=False,
                              history=rng.choice([0, 5, None]))  # fmt: skip
    except sqlspace.StoreError as error:
        note(ascii(error))
        assert path in str(error)
        assert waits or ensure_same(path, before) is None
        return
    look = Look(path) if sound else None
    try:
        use(store, rng, note, look)
    finally:
        if look:
            look.close()
        try:
            store.close()
        except sqlspace.StoreError as error:
            note(f"close: {error!a}")


def _is_sound(path):
    """Whether SQLite finds no damage; asked of a copy."""
    try:
        look = Look(path)
    except apsw.Error:
        return False
    try:
        look.rows()
        return look.is_sound()
    except apsw.Error:
        return False
    finally:
        look.close()
