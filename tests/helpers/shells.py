"""The file as SQL, in processes of their own: the `sqlite3` program, and a stand-in for it.

The stand-in is the sqlite3 module of Python's own library, so that these tests run also where the
program is not installed. Never in the tests' own process: a second SQLite library that closes the
file would drop the POSIX locks of the first.
"""

import os
import pathlib
import shutil
import subprocess
import sys

__all__ = ["GREETING", "PROGRAMS", "SECONDS", "Shell", "install"]

# Statements from the arguments or from stdin, rows to stdout, as the program does in list mode with
# -bail.
STAND_IN = r"""
import sqlite3, sys

headed = sys.argv[1] == "-header"
path, *arguments = sys.argv[1 + headed :]
connection = sqlite3.connect(path, isolation_level=None)
connection.text_factory = bytes

def run(statement):
    try:
        cursor = connection.execute(statement)
        rows = cursor.fetchall()
    except sqlite3.Error as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    if headed and rows:
        rows.insert(0, [column[0].encode() for column in cursor.description])
    for row in rows:
        texts = (b"" if v is None else v if type(v) is bytes else b"%a" % v for v in row)
        sys.stdout.buffer.write(b"|".join(texts) + b"\n")
    sys.stdout.flush()

def pieces():
    for text in arguments:
        # Up to each semicolon, for what there is of a statement is not complete before one.
        yield from text.strip().rstrip(";").replace(";", ";\0").split("\0")
        yield ";"
    if not arguments:
        yield from sys.stdin

script = ""
for piece in pieces():
    script += piece
    if sqlite3.complete_statement(script):
        run(script)
        script = ""
connection.close()
"""
PROGRAMS = ["sqlite3 module"] + (["sqlite3"] if shutil.which("sqlite3") else [])
# As README has it: wait for others, and leave checkpoints to a library that is fixed.
GREETING = "PRAGMA busy_timeout=60000;\nPRAGMA wal_autocheckpoint=0;\n"
SECONDS = 60  # until a test gives up


class Shell:
    """One kind of SQLite program, on one file."""

    def __init__(self, program, path):
        self.command = (
            [shutil.which("sqlite3"), "-batch", "-bail", "-init", "/dev/null", path]
            if program == "sqlite3"
            else [sys.executable, "-c", STAND_IN, path]
        )

    def start(self):
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def attempt(self, sql):
        """Its output's lines, and its complaint."""
        with self.start() as process:
            out, complaint = process.communicate(GREETING + sql + "\n", timeout=SECONDS)
        assert (process.returncode != 0) == bool(complaint), (process.returncode, complaint)
        greeted, lines = out.splitlines()[:2], out.splitlines()[2:]
        assert greeted == ["60000", "0"]
        return lines, complaint

    def __call__(self, sql):
        lines, complaint = self.attempt(sql)
        assert not complaint
        return lines


def install(program, folder):
    """Put it into a folder under the name of the program; for a PATH that begins with it."""
    place = pathlib.Path(folder, "sqlite3")
    if program == "sqlite3":
        place.symlink_to(shutil.which("sqlite3"))
        return
    source = place.with_name("stand_in.py")
    source.write_text(STAND_IN, encoding="utf-8")
    place.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{source}" "$@"\n', encoding="utf-8")
    os.chmod(place, 0o755)
