"""Hostile files, rows, arguments and command lines: one clear error or a right answer.

What a case is follows from its number; `helpers/fuzz.py` says how they run, and `scripts/fuzz` runs
new ones for as long as one wants, or one of them again.
"""

import functools
import pathlib
import shutil

import fuzz
import pytest
from proof import tried

import sqlspace
from sqlspace import schema


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "cases"), [("files", 250), ("rows", 120), ("arguments", 200), ("commands", 120)]
)
def test_hostile_input_is_refused_or_answered(kind, cases):
    """No hang, no crash, no foreign exception, no write to what was refused, no silent loss."""
    found = fuzz.run(kind, 1, cases)
    assert not found, "\n".join(found)
    tried(f"hostile {kind}", f"{cases:,} cases", seeds=f"1 to {cases}")


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("files", 4003758),  # a migration was committed before the damage was found
        ("arguments", 4003319),  # a mode of a hundred digits was shown in full
    ],
)
def test_what_a_campaign_has_found_stays_mended(kind, number):
    """Each case that was answered wrongly once, and its number."""
    assert not fuzz.run(kind, number, number)


def test_a_case_that_crashes_or_fails_is_told_by_its_number(monkeypatch):
    """The next ones are run all the same."""
    monkeypatch.setitem(fuzz.KINDS, "files", "no_such_module")
    monkeypatch.setattr(
        fuzz.subprocess,
        "run",
        functools.partial(
            _pretend, iter([(-11, "case 1\ncase 2\n"), (0, "case 3\nFOUND 3!\nEND\n")])
        ),
    )
    crashed, failed = fuzz.run("files", 1, 3)
    assert crashed.startswith("scripts/fuzz files 2: the process ended with -11")
    assert failed == "3!\n"


def _pretend(ends, *_, **__):
    code, told = next(ends)
    return fuzz.subprocess.CompletedProcess([], code, told.encode(), b"")


# What is replaced in which file, and the kind that must find it, in so many cases at most.
PLANTED = {
    "the schema isn't compared": (
        "schema.py",
        "if ours != _expected(version):",
        "if 0:",
        "rows",
        50,
    ),
    "planted triggers run": (
        "connection.py",
        "SQLITE_DBCONFIG_ENABLE_TRIGGER, 0",
        "SQLITE_DBCONFIG_ENABLE_TRIGGER, 1",
        "rows",
        300,
    ),
    "entries are pruned": ("upkeep.py", "LIMIT ?2) AND state >= 3", "LIMIT ?2)", "rows", 100),
    "a key isn't checked": (
        "arguments.py",
        "if not isinstance(key, str):",
        "if 0:",
        "arguments",
        200,
    ),
    "sqlite's errors come through": (
        "database.py",
        "raise self.mapped(error) from error",
        "raise",
        "files",
        100,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(tmp_path, name):
    """A fuzz in which these pass is broken."""
    file, old, new, kind, cases = PLANTED[name]
    source = pathlib.Path(sqlspace.__file__).parent
    for part in (source, schema._MIGRATIONS):
        shutil.copytree(part, tmp_path / part.name, ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / "sqlspace" / file
    text = planted.read_text(encoding="utf-8")
    assert old in text
    planted.write_text(text.replace(old, new), encoding="utf-8")
    assert any(fuzz.run(kind, first, first + 49, str(tmp_path)) for first in range(1, cases, 50)), (
        f"nothing was found in {cases} cases"
    )
