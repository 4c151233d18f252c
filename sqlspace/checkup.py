"""What `sqlspace check` looks at: a database's place, its permissions, and what it holds.

To look changes nothing: not one byte of the file, and no file beside it. A file whose place is
wrong isn't even opened. Each finding names its subject and, unless all is well, says what to do.
Nothing here knows of a command line.
"""

import functools
import os
import pwd
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import apsw

from . import clock, connection, schema
from .arguments import nameable
from .errors import StoreError
from .mounts import network_file_system
from .rules import DEAD, DIED_FIRST, LAST_LEASE, LIVE, OVER
from .store import Store, open_existing

__all__ = ["Finding", "look"]

SELECT_KEYS = """
SELECT DISTINCT CAST(key AS BLOB) FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE state < 3
"""
# No AND in place of the CASE: json_type fails on what is no JSON.
COUNT_BAD_HEADERS = """
SELECT count(*) FROM sqlspace_entries
 WHERE CASE WHEN json_valid(headers)
            THEN json_type(headers) <> 'object'
                 OR EXISTS (SELECT 1 FROM json_each(headers) WHERE type <> 'text')
            ELSE headers IS NOT NULL END
"""
# And those that are dead, but not moved yet; ?1 is now.
COUNT_DEAD = f"""
SELECT CAST(key AS BLOB), count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE state < 3 AND substr(CAST(key AS BLOB), -5) = CAST('{DEAD}' AS BLOB) AND {LIVE} GROUP BY key
UNION ALL
SELECT CAST(key || '{DEAD}' AS BLOB), count(*)
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last
 WHERE {LAST_LEASE} AND {OVER} AND {DIED_FIRST} GROUP BY key
"""
# More than 10 say no more than 10.
CHECK_INTEGRITY = "PRAGMA integrity_check(10)"

_FIXED = (3, 51, 3)  # the first SQLite without the WAL-reset bug
_Complaint = tuple[Literal["warning", "problem"], str]

_MUCH_FREE_BYTES = 1 << 20
_SHELL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    text: str


_ok = functools.partial(Finding, "ok")
_warning = functools.partial(Finding, "warning")
_problem = functools.partial(Finding, "problem")


def look(path: str, *, allow_network: bool, busy_timeout: float) -> Iterator[Finding]:
    """Look for what is wrong with the database at `path`, as far as that goes.

    Args:
        path: Of the file; it need not be there, nor a store.
        allow_network: As in `sqlspace.open`.
        busy_timeout: As in `sqlspace.open`.

    Returns:
        The findings, the quick ones first; the last ones have read the whole file.
    """
    path = os.path.realpath(path)
    yield from _versions()
    try:
        found = os.stat(path)
    except OSError as error:
        yield _problem("file", f"{path}: {error.strerror}")
        return
    outside = [*_place(path, found, allow_network), *_permissions(path, found), _wal(path)]
    yield from outside
    if any(finding.level == "problem" for finding in outside):
        yield _warning("store", "not opened; solve the problems above, and check again")
        return
    try:
        with open_existing(
            path, history=None, busy_timeout=busy_timeout, allow_network=allow_network
        ) as store:
            yield from _content(store)
    except StoreError as error:
        yield _problem("store", str(error))


def _versions() -> Iterator[Finding]:
    yield _ok(
        "SQLite",
        f"{apsw.sqlite_lib_version()} inside apsw; other programs that write with one before "
        "3.51.3 must say PRAGMA wal_autocheckpoint=0 first",
    )
    program = shutil.which("sqlite3")
    if program is None:
        return
    try:
        command = [program, "--version"]
        told = subprocess.run(  # noqa: S603  # what the user's own shell would run
            command, capture_output=True, check=True, timeout=_SHELL_SECONDS, text=True
        ).stdout
        version = told.split()[0]
        fixed = tuple(map(int, version.split("."))) >= _FIXED
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        yield _warning("sqlite3", f"{program} doesn't tell its version")
        return
    if fixed:
        yield _ok("sqlite3", f"{program} is {version}")
    else:
        yield _warning(
            "sqlite3",
            f"{program} is {version}, with the WAL-reset bug, which can lose commits: "
            "say PRAGMA wal_autocheckpoint=0 in it before it writes",
        )


def _place(path: str, found: os.stat_result, allow_network: bool) -> Iterator[Finding]:
    if not stat.S_ISREG(found.st_mode):
        yield _problem("file", f"{path} is not a regular file")
        return
    yield _ok("file", f"{path}, {_kib(found.st_size)}")
    kind = network_file_system(path)
    if kind is None:
        yield _ok("file system", "a local one, as far as the system tells")
    else:
        yield Finding(
            "warning" if allow_network else "problem",
            "file system",
            f"a network one ({kind}), where the -wal's shared memory doesn't work: move the file "
            "to a local disk; --allow-network opens it if only this machine uses it",
        )
    if found.st_nlink == 1:
        yield _ok("hard links", "none")
    else:
        yield _problem(
            "hard links",
            f"the file has {found.st_nlink} names; under each, SQLite keeps a -wal of its own, and "
            f"entries get lost: remove all but one (find -inum {found.st_ino} shows them)",
        )


def _permissions(path: str, found: os.stat_result) -> Iterator[Finding]:
    complaints = [*_access(path, found), *_directory(os.path.dirname(path))]
    for beside in (path + "-wal", path + "-shm"):
        if os.path.exists(beside):
            complaints += _beside(beside, os.stat(beside), found)
    if not complaints:
        yield _ok("permissions", f"{stat.filemode(found.st_mode)} {_user(found.st_uid)}")
    for level, text in complaints:
        yield Finding(level, "permissions", text)


def _access(path: str, found: os.stat_result) -> Iterator[_Complaint]:
    if not os.access(path, os.R_OK | os.W_OK):
        text = f"{path} can't be read and written by {_user(os.geteuid())}: it is "
        text += f"{stat.filemode(found.st_mode)} and belongs to {_user(found.st_uid)}"
        yield "problem", text
    if found.st_mode & stat.S_IWOTH:
        yield "problem", f"everybody may write to {path}: chmod o-rw it"
    elif found.st_mode & stat.S_IROTH:
        yield "warning", f"everybody may read {path}: chmod o-r it"


def _directory(path: str) -> Iterator[_Complaint]:
    mode = os.stat(path).st_mode
    if not os.access(path, os.W_OK | os.X_OK):
        user = _user(os.geteuid())
        yield "problem", f"{path}/ can't be written to by {user}; the -wal belongs there"
    if mode & stat.S_IWOTH and mode & stat.S_ISVTX:
        yield "warning", f"everybody may make files in {path}/: keep the database elsewhere"
    elif mode & stat.S_IWOTH:
        yield "problem", f"everybody may make files in {path}/, and replace yours"


def _beside(path: str, its: os.stat_result, found: os.stat_result) -> Iterator[_Complaint]:
    """Of the -wal or -shm; whoever may use the database must get on with them."""
    yield from _access(path, its)
    if its.st_uid != found.st_uid:
        shared = its.st_gid == found.st_gid and its.st_mode & 0o060 == 0o060
        text = f"{path} belongs to {_user(its.st_uid)}, the database to {_user(found.st_uid)}, "
        text += "who may be locked out: chown it"
        yield "warning" if shared else "problem", text
    if stat.S_IMODE(its.st_mode) != stat.S_IMODE(found.st_mode):
        modes = stat.filemode(its.st_mode), stat.filemode(found.st_mode)
        yield "warning", f"{path} is {modes[0]}, the database {modes[1]}: chmod it alike"


def _wal(path: str) -> Finding:
    beside = path + "-wal"
    held = os.stat(beside).st_size if os.path.exists(beside) else 0
    bound = connection._WAL_BYTES  # noqa: SLF001  # to which a checkpoint cuts it
    if held <= bound:
        return _ok("-wal", f"{_kib(held)}, at most {_kib(bound)} is usual")
    return _warning(
        "-wal",
        f"{_kib(held)}, more than the usual {_kib(bound)}: a reader that never ends keeps it "
        "from being used again, or one transaction was large; sqlspace compact cuts it",
    )


def _content(store: Store) -> Iterator[Finding]:
    read = store._database.read  # noqa: SLF001  # whose connection for browsing can't write
    version = read(schema.SELECT_VERSION)[0][0]
    yield _ok("schema", f"version {version}, as sqlspace made it")
    told = [str(line) for (line,) in read(CHECK_INTEGRITY)]
    if told != ["ok"]:
        yield _problem(
            "integrity",
            "SQLite finds damage: stop all who use the file, keep it and its -wal, and restore a "
            "backup or try .recover of the sqlite3 shell: " + "; ".join(told),
        )
        return
    yield _ok("integrity", "SQLite finds no damage")
    nameless = [key for (key,) in read(SELECT_KEYS) if nameable(key) is None]
    if nameless:
        spelled = f"CAST(x'{nameless[0].hex()}' AS TEXT)"
        yield _problem(
            "keys",
            f"{len(nameless):,} that no verb can name, made by other programs, the first "
            f"{spelled}: give its entries another in the sqlite3 shell (table sqlspace_entries)",
        )
    else:
        yield _ok("keys", "all are valid")
    if broken := read(COUNT_BAD_HEADERS)[0][0]:
        yield _problem("headers", f"those of {broken:,} entries are no JSON object of strings")
    yield _dead_letters(read(COUNT_DEAD, (clock.now(),)))
    # Not by Store.stats(), which has the dead moved first.
    free_pages = read("PRAGMA freelist_count")[0][0]
    free = free_pages * read("PRAGMA page_size")[0][0]
    text = f"{free_pages:,} ({_kib(free)})"
    if free > max(_MUCH_FREE_BYTES, store._database.sizes()[0] // 2):  # noqa: SLF001  # stats counts all
        text += ", more than half of the file: sqlspace compact gives them back"
        yield _warning("free pages", text)
    else:
        yield _ok("free pages", text)


def _dead_letters(found: list[tuple[bytes, int]]) -> Finding:
    if not found:
        return _ok("dead letters", "none")
    counts: Counter[bytes] = Counter()
    for key, number in found:
        counts[key] += number
    most = max(counts, key=lambda key: counts[key]).decode(errors="backslashreplace")
    return _warning(
        "dead letters",
        f"{counts.total():,}, most of them of {most.removesuffix(DEAD)!a}: sqlspace dead DATABASE "
        "KEY shows them, its --requeue moves them back",
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _kib(number: int) -> str:
    """As `ls -k` counts: up to the next whole one."""
    return f"{-(-number // 1024):,} KiB"
