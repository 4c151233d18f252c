"""README says what is so: its Python runs, its sessions print what they show.

A section (what stands under one heading) is a program: one process runs its Python, and between
that its shell sessions run, all sections in one directory, from the top of the page to its end. So
what a section has made, a later one may use.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from pages import Page, blocks
from shells import PROGRAMS, SECONDS, install

import sqlspace
from sqlspace import cli

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(README)

NATS_URL = "nats://127.0.0.1:4222"
PROGRAM = """
import pages
pages.run(hear, tell)
os._exit(0)  # stores that are open stay as they are
"""
# What is another on every day: any time stands for any time, any fraction for any fraction.
VARYING = {
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}": "TIME",
    r"\b\d+\.\d+\b": "FRACTION",
}


def settled(text):
    """A session's output without what varies; a newline more or less at its end makes none."""
    for pattern, word in VARYING.items():
        text = re.sub(pattern, word, text)
    return text.rstrip("\n")


def commands(block):
    """Each command of a session with its output, and with the lines that it reads behind a >."""
    assert block.text.startswith("$ "), block
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = next((n for n, line in enumerate(lines) if n and line[:2] not in ("> ", ">")), None)
        command = [lines[0], *(line[2:] for line in lines[1:end])]
        yield "\n".join(command), "\n".join([] if end is None else lines[end:])


@pytest.fixture(params=PROGRAMS)
def programs(request, tmp_path_factory):
    """A directory with what sessions call: the sqlite3 program, or its stand-in, and sqlspace."""
    folder = tmp_path_factory.mktemp("programs")
    install(request.param, folder)
    ours = folder / "sqlspace"
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sqlspace "$@"\n', encoding="utf-8")
    ours.chmod(0o755)
    return folder


def session(block, folder, programs):
    """Run it in a shell, command by command."""
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),  # without anybody's ~/.sqliterc
    }
    for command, shown in commands(block):
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
        assert settled(done.stdout) == settled(shown), command


def test_all_code_of_the_page_runs_and_says_what_it_says(
    child, tmp_path, monkeypatch, programs, nats_server
):
    """Every block as it stands, in the page's order; each comment that can be compared is.

    But for the port of a nats-server: there may be another one at its usual place.
    """
    monkeypatch.chdir(tmp_path)
    heading, process, compared, sessions = None, None, 0, 0

    def finish():
        if process is not None:
            process.tell("end")
            process.finish()

    for block in BLOCKS:
        if block.heading != heading:
            finish()
            heading, process, before = block.heading, None, 0
        if block.kind == "python":
            process = process or child(PROGRAM)
            text = block.text.replace(NATS_URL, nats_server.url)
            process.tell(json.dumps([text, block.line]))
            word, number = process.told().split()
            assert word == "ran"
            compared += int(number) - before
            before = int(number)
        elif block.kind == "console":
            session(block, tmp_path, programs)
            sessions += 1
    finish()
    assert compared >= 20
    assert sessions >= 3


def test_there_is_no_code_on_the_page_that_is_not_checked():
    """Each fence is of a kind that a test here knows; and code stands in fences."""
    assert {block.kind for block in BLOCKS} == {"python", "console", "sh"}
    outside = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^(?: {4}|\t)", outside, flags=re.MULTILINE)


def test_what_is_to_be_typed_is_there():
    """Commands that no test can run: they name scripts of ours, and extras of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for block in BLOCKS if block.kind == "sh" for line in block.text.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        words = line.partition("#")[0].split()
        if words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK)
        elif words[0] == "sqlspace":
            command = cli.commands.commands[words[1]]
            known = {option for each in command.params for option in each.opts}
            ours = words[: words.index("--")] if "--" in words else words
            assert {word for word in ours if word.startswith("--")} <= known
        else:
            assert words[:2] == ["pip", "install"]
            match = re.fullmatch(r"'?sqlspace(?:\[(\w+)\])?'?", words[2])
            assert match
            assert match[1] is None or match[1] in project["optional-dependencies"]


def test_every_verb_is_named_and_every_name_is_a_verb():
    """What a Store and a Delivery can do stands on the page, and nothing that they can't."""
    pieces = re.findall(r"`[^`\n]+`|^```.*?^```$", README, flags=re.MULTILINE | re.DOTALL)
    code = set(re.findall(r"\w+", " ".join(pieces)))
    for kind in (sqlspace.Store, sqlspace.Delivery, sqlspace.Space):
        verbs = {name for name in vars(kind) if not name.startswith("_")}
        assert verbs <= code, kind
    table = README.partition("## The verbs of a Store")[2].partition("##")[0]
    for cell in re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)", cell):
            assert hasattr(sqlspace.Store, name) or hasattr(sqlspace, name), name


def test_every_error_is_named():
    """Whoever handles them finds them on the page."""
    errors = {
        name
        for name, found in vars(sqlspace).items()
        if isinstance(found, type) and issubclass(found, sqlspace.SpaceError)
    }
    assert {name for name in errors if f"`{name}`" not in README} == set()


def test_the_rooms_that_the_page_shows_are_there():
    """The last section is the map of the house."""
    inside = README.partition("## Inside")[2]
    rooms = re.findall(r"`([a-z_]+)`", inside)
    assert len(rooms) > 10
    for room in rooms:
        assert importlib.util.find_spec(f"sqlspace.{room}"), room


# -- what the page says without code

ALCHEMIST = """
import logging, sqlalchemy
logging.getLogger("sqlspace").addHandler(logging.NullHandler())
engine = sqlalchemy.create_engine(f"sqlite:///{argv[0]}")
connection = engine.connect()
if argv[1] == "a statement before":
    connection.execute(sqlalchemy.text("SELECT 1"))
sqlspace.push_on(connection.connection.driver_connection, "mail", b"x")
connection.commit()
tell("committed")
hear()
connection.close()
engine.dispose()
tell("closed")
"""


@pytest.mark.parametrize("what", ["a statement before", "nothing before"])
def test_what_only_the_driver_began_sqlalchemy_does_not_commit(child, tmp_path, what):
    """The write lock stays held, and in the end all is rolled back; a statement before cures it."""
    path = str(tmp_path / "shop.db")
    sqlspace.open(path).close()
    alchemist = child(ALCHEMIST, path, what)
    alchemist.expect("committed")
    with sqlspace.open(path, busy_timeout=0.01 if what.startswith("nothing") else 30) as store:
        if what.startswith("nothing"):
            with pytest.raises(sqlspace.BusyError):
                store.push("mail", b"y")
        else:
            assert store.pull("mail", 0) == b"x"
        alchemist.tell()
        alchemist.expect("closed")
        alchemist.finish()
        assert store.len("mail") == 0


# -- the tests above see what is wrong

WRONG = {
    "a value": "1 + 1  # 3",
    "a type": "1 + 1  # 2.0",
    "a value inside": "if True:\n    len('a')  # 2; not so",
    "an error that isn't raised": "len('a')  # TypeError",
    "another error": "len(1)  # ValueError: no",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_comment_that_says_what_is_not_so_is_seen(text):
    """Or the page would be compared with nothing."""
    with pytest.raises(AssertionError, match="line 7"):
        Page().run(text, 7 - text.count("\n"))


def test_a_comment_that_says_what_is_so_is_counted():
    """And one that is for people is none."""
    page = Page()
    page.run("1 + 1  # 2; two\nlen(1)  # TypeError\nb'a'  # b'a'\n1  # one, and more\nx = 1  # 2\n")
    assert page.compared == 3


@pytest.mark.parametrize("shown", ["1|b", "1|a\n2|a", "", "1.5|a", "2020-01-01 00:00:00.000"])
def test_a_session_that_shows_what_is_not_printed_is_seen(tmp_path, programs, shown):
    """The same for the shell."""
    (block,) = blocks(f"# x\n\n```console\n$ sqlite3 x.db \"SELECT 1, 'a'\"\n{shown}\n```\n")
    with pytest.raises(AssertionError):
        session(block, tmp_path, programs)
