"""Opens of a store, each killed at another moment: before every change that SQLite makes to a file.

Each is a fork of a process that has nothing open, so a death costs a millisecond.
"""

import subprocess
import sys

__all__ = ["opens_killed"]

SOURCE = """
import os, signal, sys
import apsw
import sqlspace

class Left:
    events = 0

def happened():
    Left.events -= 1
    if Left.events < 0:
        os.kill(os.getpid(), signal.SIGKILL)

class File(apsw.VFSFile):
    def xWrite(self, data, offset):
        happened()
        if Left.events == 0 and half:
            super().xWrite(data[: len(data) // 2], offset)
            happened()
        return super().xWrite(data, offset)

    def xTruncate(self, size):
        happened()
        return super().xTruncate(size)

    def xSync(self, flags):
        happened()
        return super().xSync(flags)

class Vfs(apsw.VFS):
    def __init__(self):
        super().__init__("killing", "unix", makedefault=True)

    def xOpen(self, name, flags):
        happened()
        return File("unix", name, flags)

    def xDelete(self, name, sync):
        happened()
        return super().xDelete(name, sync)

vfs = Vfs()
folder, half, prepared = sys.argv[1], sys.argv[2] == "half", sys.argv[3]
for events in range(1000):
    path = f"{folder}/{events:03}.db"
    for end in ("", "-wal"):
        if prepared and os.path.exists(prepared + end):
            with open(prepared + end, "rb") as source, open(path + end, "wb") as copy:
                copy.write(source.read())
    child = os.fork()
    if not child:
        Left.events = events
        sqlspace.open(path, embed=bool(prepared))
        os._exit(0)  # with nothing closed
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(events)
"""


def opens_killed(folder, half, prepared=""):
    """Open `folder/000.db` and so on, each killed one step later, until one comes through.

    Args:
        folder: Where they are made.
        half: "half": killed in the middle of a write; "whole": before it.
        prepared: Each is a copy of this file, and of its -wal.

    Returns:
        How many were killed; the file of the next has the number.
    """
    done = subprocess.run(
        [sys.executable, "-c", SOURCE, str(folder), half, str(prepared)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)
