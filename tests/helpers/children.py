"""Processes for tests: each is bounded in time, and its failure is the test's."""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

PATIENCE_SECONDS = 60.0  # a bound, never a measure: what should happen happens long before

PRELUDE = """
import os, signal, sys, threading, time
import sqlspace
from children import deaf, eventually, parked

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole, from any thread

def hear():
    line = sys.stdin.readline()
    if not line:
        os._exit(9)  # the test is over
    return line.rstrip("\\n")

argv = sys.argv[1:]
"""


def eventually(condition, what="what was expected"):
    """Wait until `condition()` is true, for a bounded time; its value."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        if time.monotonic() > ends:
            raise AssertionError(f"{what} did not happen within {PATIENCE_SECONDS:g} s")
        time.sleep(0.001)
    return value


def patient_inotify():
    """An inotify instance, as soon as there is one: other tests may use up the user's 128."""
    from sqlspace.inotify import open_inotify  # noqa: PLC0415  # not in the parent

    return eventually(open_inotify, "a free inotify instance")


def deaf(*to, again=1000.0):
    """In a child, before it opens a store: have waiters not hear what is named.

    Args:
        to: "datagrams"; "inotify", so that they look now and then without a sign; or "signs", so
            that they never look by themselves.
        again: They look again, without any reason, after so many seconds.
    """
    from sqlspace import waiting  # noqa: PLC0415  # not in the parent
    from sqlspace import watch as watching  # noqa: PLC0415

    waiting.LOOK_AGAIN_SECONDS = watching.LOOK_AGAIN_SECONDS = again
    if "datagrams" in to:
        watching._open_socket = lambda: None
    watching.open_inotify = (lambda: None) if "inotify" in to else patient_inotify
    if "signs" in to:
        watching._LOOK_FIRST_SECONDS = 1e9
        watching.Watch._arm = lambda *_: True


def parked(number):
    """Wait until so many threads of this process sleep in waits, one of them as the watcher."""
    from sqlspace import watch as watching  # noqa: PLC0415  # not in the parent

    def are_asleep():
        watch = watching._watch
        if watch is None:
            return number == 0
        with watch.lock:
            sleeping = len(watch._parked) + (watch._watcher is not None)
            return sleeping == number and (watch._watcher is not None) == (number > 0)

    eventually(are_asleep, f"{number} threads asleep")


class Child:
    """A Python process that runs a text; it tells by lines, and is told by lines."""

    def __init__(self, source, *arguments):
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        here = os.path.dirname(os.path.abspath(__file__))
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning"),
                *("-c", PRELUDE + textwrap.dedent(source), *map(str, arguments)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])},
            bufsize=1,
        )
        self.pid = self._process.pid
        self._lines = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def told(self):
        """The next line that it tells."""
        try:
            line = self._lines.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise AssertionError(f"the child is silent; {self.errors()}") from None
        assert line is not None, f"the child ended early; {self.errors()}"
        return line

    def expect(self, *lines):
        """It tells just these lines next."""
        for line in lines:
            found = self.told()
            assert found == line, f"{found!r} instead of {line!r}; {self.errors()}"

    def tell(self, line=""):
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def stop(self):
        """SIGSTOP, and back only when every thread of it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        eventually(self._stands, "the child's stop")

    def _stands(self):
        states = []
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{task}/stat", encoding="ascii") as file:
                states.append(file.read().rpartition(")")[2].split()[0])
        return set(states) <= {"T", "t"}

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """SIGKILL, and reap."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._process.wait(PATIENCE_SECONDS) == -signal.SIGKILL

    def cpu_seconds(self):
        """The processor time that it took, in user and kernel mode."""
        with open(f"/proc/{self.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def finish(self, code=0):
        """It ends by itself, with this exit code, and with nothing to complain of."""
        try:
            found = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the child does not end; {self.errors()}") from None
        assert found == code, f"exit code {found}; {self.errors()}"
        if code == 0:
            assert self._stderr() == ""

    def errors(self):
        return f"its stderr:\n{self._stderr()}"

    def _stderr(self):
        self._errors.seek(0)
        return self._errors.read()

    def end(self):
        """Leave nothing of it behind."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(PATIENCE_SECONDS)
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
