"""Hostile input, case by case: which case is what follows from its number alone.

A law of each case: one clear error or a right answer; never a hang, a crash of the interpreter,
somebody else's exception, a write to a file that was refused, or a silent loss. Cases run in a
process of their own, hundreds in each, and the number of a case is told before it begins: so a
crash and a hang have a name, too, and the next process goes on behind it.

    scripts/fuzz --minutes 15 --first 100000    new cases of all kinds, for so long
    scripts/fuzz files 4711                     one of them again
"""

import argparse
import faulthandler
import importlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback

__all__ = ["KINDS", "run"]

KINDS = {
    "files": "hostile_files",
    "rows": "hostile_rows",
    "arguments": "hostile_arguments",
    "commands": "hostile_commands",
}
HANG_SECONDS = 60.0  # a bound, never a measure
BATCH = 500
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run(kind, first, last, package=""):
    """Run the cases from `first` to `last` of a kind; what was found, a text each.

    Args:
        kind: One of KINDS.
        first: A number.
        last: Another.
        package: The directory of another sqlspace than this one.
    """
    found = []
    while first <= last:
        done = subprocess.run(
            [sys.executable, __file__, kind, str(first), str(last)],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, *sys.path]))},
        )
        told = done.stdout.decode(errors="backslashreplace")
        found += re.findall(r"^FOUND (.*?)^END$", told, re.DOTALL | re.MULTILINE)
        begun = re.findall(r"^case (\d+)$", told, re.MULTILINE)
        if done.returncode == 0 and begun and int(begun[-1]) == last:
            break
        errors = done.stderr.decode(errors="backslashreplace")[-6000:]
        number = int(begun[-1]) if begun else first
        found.append(
            f"scripts/fuzz {kind} {number}: the process ended with {done.returncode}\n{errors}"
        )
        if not begun:
            break
        first = number + 1
    return found


def _work(kind, first, last):
    """In the child: the cases one after the other."""
    logging.getLogger("sqlspace").addHandler(logging.NullHandler())
    logging.getLogger("sqlspace").propagate = False
    module = importlib.import_module(KINDS[kind])
    found = 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        os.chdir(directory)  # what a hostile path makes is made there
        for number in range(first, last + 1):
            os.write(1, f"case {number}\n".encode())
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            notes = []
            try:
                module.case(number, directory, notes.append)
            except BaseException:
                found += 1
                told = f"scripts/fuzz {kind} {number}\n"
                told += "".join(f"  {note}\n" for note in notes) + traceback.format_exc()
                os.write(1, f"FOUND {told}END\n".encode(errors="backslashreplace"))
            faulthandler.cancel_dump_traceback_later()
    return found


def _search(kinds, first, minutes):
    """For so long, one batch of each kind after the other."""
    ends = time.monotonic() + minutes * 60
    found, cases = 0, 0
    start = first
    while time.monotonic() < ends:
        for kind in kinds:
            for text in run(kind, start, start + BATCH - 1):
                found += 1
                print(text, flush=True)
            cases += BATCH
        start += BATCH
    print(f"{cases:,} cases, of each kind the numbers {first} to {start - 1}: {found} found")
    return found


def main():
    """The program; its exit code is 1 if something was found."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=KINDS, help="only this kind")
    parser.add_argument("case", nargs="*", type=int, help="a number, or the first and the last")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=int(time.time()) * 1000)
    told = parser.parse_args()
    if told.case:
        return _work(told.kind, told.case[0], told.case[-1]) and len(told.case) == 1
    return _search([told.kind] if told.kind else list(KINDS), told.first, told.minutes) > 0


if __name__ == "__main__":
    sys.exit(main())
