"""Hostile command lines, and files that are hostile to them."""

import os
import random
import re

import hostile_files
import hostile_rows
from click.testing import CliRunner
from hostile import CALM, base, ensure_same, lay_out, picture

import sqlspace.cli

__all__ = ["case"]

# "FILE", "KEY", "COPY" and "NUMBER" are filled in.
COMMANDS = [
    ["push", "FILE", "KEY", "text"],
    ["push", "FILE", "KEY", "text", "--header", "TEXT", "--dedupe", "TEXT", "--seq"],
    ["push", "FILE", "KEY", "text", "--ttl", "NUMBER", "--delay", "0.5", "--no-sync"],
    ["push", "FILE", "KEY", "text", "--max-len", "NUMBER", "--timeout", "0"],
    ["push", "FILE", "KEY", "--lines", "--ttl", "NUMBER"],
    ["pull", "FILE", "KEY"],
    ["pull", "FILE", "KEY", "--all", "--json"],
    ["pull", "FILE", "KEY", "--limit", "NUMBER", "--history", "NUMBER"],
    ["pull", "FILE", "KEY", "--lease", "NUMBER", "--max-attempts", "NUMBER", "--", "true"],
    ["pull", "FILE", "KEY", "--lease", "30", "--retry-delay", "NUMBER", "--ordered", "--", "false"],
    ["forward", "FILE", "KEY", "KEY", "--timeout=0.02", "--lease", "NUMBER", "--", "true"],
    ["forward", "FILE", "KEY", "--max-attempts", "NUMBER", "--timeout=0.02", "--", "false"],
    ["pull", "FILE", "KEY", "--timeout=0.02"],
    ["peek", "FILE", "KEY"],
    ["peek", "FILE", "KEY", "--all", "--json"],
    ["peek", "FILE", "KEY", "--limit", "NUMBER"],
    ["len", "FILE", "KEY"],
    ["keys", "FILE"],
    ["keys", "FILE", "--json"],
    ["stats", "FILE"],
    ["stats", "FILE", "--json"],
    ["history", "FILE", "KEY"],
    ["history", "FILE", "KEY", "--json"],
    ["dead", "FILE", "KEY"],
    ["dead", "FILE", "KEY", "--json"],
    ["dead", "FILE", "KEY", "--requeue"],
    ["dead", "FILE", "KEY", "--drop", "--seq", "NUMBER"],
    ["compact", "FILE", "--json"],
    ["compact", "FILE", "--busy-timeout", "NUMBER"],
    ["backup", "FILE", "COPY"],
    ["check", "FILE"],
    ["check", "FILE", "--json"],
    ["top", "FILE", "--once", "--interval", "0.1"],
]
LOOKING = ("peek", "len", "keys", "stats", "history", "check", "top")
NUMBERS = ["0", "1", "-1", "nan", "inf", "-inf", "1e308", "1e999", "5e-324", "9" * 400, "9" * 5000,
           "0x10", "1_000", "", " 1", "½", "٣", "--", "1.5", "9223372036854775808"]  # fmt: skip
TEXTS = ["", "=", "a=b", "=b", "a=", "a=\n", "\udcff=\udcff", "x" * 1025, "\udced\udca0\udc80", "-",
         "--all", "é" * 513, "\x1b[2J", "a\nb", "%s", "[red]", "k" * 1024, "odd", "plain", "late",
         "odd/dead", "/dead"]  # fmt: skip
CODES = {0, 1, 2, 3, 123}


def _words(rng, path, strange):
    template = rng.choice(COMMANDS)
    keys = ["odd", "plain", "late", "json", "none", CALM]
    words = []
    for word in template:
        if word == "KEY":
            words.append(rng.choice(TEXTS if strange and rng.random() < 0.5 else keys))
        elif word == "NUMBER":
            words.append(rng.choice(NUMBERS if strange else ["1", "5"]))
        elif word == "TEXT":
            words.append(rng.choice(TEXTS if strange else ["a=b"]))
        else:
            words.append({"FILE": path, "COPY": path + ".copy"}.get(word, word))
    if strange and rng.random() < 0.2:
        words.insert(rng.randrange(len(words) + 1), rng.choice([*TEXTS, *NUMBERS]))
    return words


def case(number, directory, note):
    """Run a command or two."""
    rng = random.Random(f"commands {number}")
    path = os.path.join(directory, "queue.db")
    kind = rng.choice(["plain", "plain small", "killed"])
    files = {name: bytearray(data) for name, data in base(kind).items()}
    how = rng.choice(["sound", "spoilt", "rows", "types", "tampered"])
    note(f"{kind}, {how}")
    if how == "spoilt":
        hostile_files.spoil(rng, files, 512 if "small" in kind else 4096, note)
    lay_out(files, path)
    if how in ("rows", "types", "tampered"):
        hostile_rows.plant(rng, path, how, note)
    for _ in range(2):
        before = picture(path)
        strange = rng.random() < 0.6
        words = _words(rng, path, strange)
        note(f"{words!a:.300}")
        stdin = rng.choice([b"", b"a\nb\n", b"\n", b"\0\xff", b"x" * 70_000])
        result = CliRunner().invoke(sqlspace.cli.commands, words, stdin)
        note(f"{result.exit_code} {result.stderr!a:.300}")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in CODES
        assert strange or result.exit_code != 2, "no misuse"
        assert "Traceback" not in result.stderr
        if result.exit_code in (2, 3):
            lines = [line for line in result.stderr.splitlines() if "ResourceWarning" not in line]
            assert lines or "check" in words, "it failed, and said nothing"
            assert all(re.match("sqlspace: .", line) for line in lines), "more than it should say"
        assert how != "tampered" or result.exit_code in (2, 3)
        if result.exit_code == 2 or how == "tampered":
            ensure_same(path, before)
