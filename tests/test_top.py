"""`sqlspace top`: what it counts, what it draws, and the terminal as it leaves it."""

import fcntl
import io
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections import Counter

import pytest
from children import PATIENCE_SECONDS, eventually
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console

import sqlspace
import sqlspace.cli
from sqlspace.cli import terminal, top


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


def drawn(look, width, height):
    """The lines of a screen."""
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(top._screen("/where/queue.db", look, "", (width, height)))
    return console.file.getvalue().splitlines()


def keys_of(lines):
    """Those of a screen or a table, in their order."""
    head = next(at for at, line in enumerate(lines) if line.startswith("key "))
    rows = [line for line in lines[head + 1 :] if not line.startswith(("…", "q ends"))]
    return [re.split(r"  +", line)[0] for line in rows]


# -- rates


def test_what_came_and_went_is_counted_key_by_key(store):
    """Between two looks; also what came and went in between, and is not there any more."""
    store.push_many("before", [b"x"] * 5)
    first = top._flows(store, None)
    assert first.pushed.rate() == first.taken.rate("before") == "-"
    store.push_many("mail", [b"x"] * 7)
    store.pull_many("mail", 7)
    store.pull("before")
    second = top._flows(store, first)
    assert (second.pushed.total, second.pushed.by_key) == (7, {"mail": 7})
    assert (second.taken.total, second.taken.by_key) == (8, {"mail": 7, "before": 1})
    third = top._flows(store, second)
    assert (third.pushed.total, third.taken.total) == (0, 0)
    assert not third.pushed.by_key


def test_rates_are_per_second():
    """Of as many seconds as there were."""
    flow = top._Flow(30, Counter(mail=10, jobs=20), 2.5)
    assert (flow.rate(), flow.rate("mail"), flow.rate("other")) == ("12.0", "4.0", "0")
    assert top._Flow(250_000, Counter(mail=250_000), 1.0).rate("mail") == "250,000"
    assert top._Flow(1, Counter(mail=1), 100.0).rate("mail") == "0.0"


def test_a_rate_that_cannot_be_known_says_so(path):
    """What left no trace is in the whole, which is exact; that of a key is only the least."""
    with sqlspace.open(path, history=0) as store:
        first = top._flows(store, None)
        store.push_many("mail", [b"x"] * 300)
        store.pull_many("mail", 300)
        store.push("cleared", b"x")
        store.clear("cleared")
        store.push("last", b"x")
        flows = top._flows(store, first)
    assert (flows.pushed.total, flows.taken.total) == (302, 300)
    assert flows.pushed.rate("mail").endswith("+")
    assert flows.taken.rate("mail").endswith("+")
    assert not flows.pushed.rate().endswith("+")


def test_takings_count_anew_after_compact(store):
    """Their numbers begin again, and no rate is negative."""
    store.push_many("mail", [b"x"] * 10)
    store.pull_many("mail", 5)
    first = top._flows(store, None)
    store.compact()
    store.pull_many("mail", 3)
    flows = top._flows(store, first)
    assert (flows.taken.total, flows.taken.by_key) == (3, {"mail": 3})


def test_a_dear_look_is_followed_by_a_long_rest(store, monkeypatch):
    """Ten times as long; the rates, which are cheap, are looked at all the same."""
    now = 1000.0
    looks = []
    stats = sqlspace.Store.stats

    def slow(store):
        nonlocal now
        now += 2.0
        looks.append(now)
        return stats(store)

    monkeypatch.setattr(top.time, "monotonic", lambda: now)
    monkeypatch.setattr(sqlspace.Store, "stats", slow)
    look = top._look(store, 1.0, None)
    assert (look.flows_rest, look.stats_rest) == (1.0, 20.0)
    store.push("mail", b"x")
    for _ in range(19):
        now += 1.0
        look = top._look(store, 1.0, look)
        assert len(looks) == 1
    assert look.flows.at == now
    now += 1.0
    look = top._look(store, 1.0, look)
    assert len(looks) == 2
    assert look.stats.keys["mail"].ready == 1


def test_a_look_blocks_no_writer(store, path, monkeypatch):
    """While one is under way others push, without waiting for it."""
    browse = type(store._database).browse
    pushed = []

    def browsing(database, step):
        with sqlspace.open(path, busy_timeout=0) as other:
            pushed.append(other.push("mail", b"x"))

        def both(connection):
            found = step(connection)
            with sqlspace.open(path, busy_timeout=0) as other:
                pushed.append(other.push("mail", b"x"))
            return found

        return browse(database, both)

    monkeypatch.setattr(type(store._database), "browse", browsing)
    top._flows(store, top._flows(store, None))
    assert len(pushed) == 4


# -- the screen


@pytest.fixture
def many(store):
    """A look at more keys than fit anywhere."""
    for number in range(100):
        store.push_many(f"key{number:02}", [b"x"] * (number + 1))
    for key in (
        "k" * 300,
        "日本語のキー🗝" * 10,
        "[red]mark\x1b[2J\n",
        "a\u0301" * 90,
        "\u202etenalp",
    ):
        store.push_many(key, [b"x"] * 500)
    store.claim("key50")
    store.push("key51", b"x", delay=1000)
    return top._look(store, 1.0, top._look(store, 1.0, None))


@pytest.mark.parametrize("size", [(80, 24), (50, 12), (20, 5), (300, 200), (1, 1), (33, 10)])
def test_a_screen_fits_any_terminal(many, size):
    """No line is too long, and the last line is there unless there is no room for it."""
    width, height = size
    lines = drawn(many, *size)
    assert all(cell_len(line) <= width for line in lines)
    if height >= 5:
        assert len(lines) <= height
        assert lines[-1].startswith("q ends")
        assert lines[0].startswith("/where/queue.db"[: width - 1])
    if width >= 20 and height >= 10:
        assert keys_of(lines)


def test_a_wide_screen_has_all_columns_and_a_narrow_one_the_first(many):
    """Whole ones: none is cut."""
    titles = ["key", "ready", "leased", "delayed", "dead", "in/s", "out/s", "oldest", "bytes"]
    wide, narrow = drawn(many, 100, 24), drawn(many, 40, 24)
    assert next(line for line in wide if line.startswith("key ")).split() == titles
    assert next(line for line in narrow if line.startswith("key ")).split() == [
        *("key", "ready", "in/s", "out/s")
    ]
    assert all(line.rstrip()[-1] == "B" for line in wide if line.startswith("key9"))


def test_what_is_hidden_is_told(many):
    """How many keys there is no room for, and what they hold."""
    lines = drawn(many, 80, 24)
    shown = len(keys_of(lines))
    held = sum(top._held(entries) for _, entries in many.rows()[shown:])
    assert lines[-2] == f"… and {105 - shown} keys more, with {held:,} entries"
    assert "keys more" not in " ".join(drawn(many, 80, 200))


def test_nothing_in_a_key_is_obeyed(many):
    """Neither by rich nor by the terminal."""
    text = "\n".join(drawn(many, 100, 200))
    assert r"[red]mark\x1b[2J\n" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_fullest_and_the_busiest_come_first(store):
    """By turns: a key through which all runs holds nothing, and one that is stuck doesn't move."""
    for number in range(30):
        store.push_many(f"full{number:02}", [b"x"] * (100 - number))
    first = top._look(store, 1.0, None)
    store.push_many("busy", [b"x"] * 50)
    store.pull_many("busy", 50)
    store.push("slow", b"x")
    store.pull("slow")
    lines = drawn(top._look(store, 1.0, first), 80, 24)
    assert keys_of(lines)[:5] == ["full00", "busy", "full01", "slow", "full02"]


def test_dead_letters_and_leases_are_counted(store):
    """In the columns, and in the sums above."""
    store.push_many("mail", [b"x"] * 3)
    store.claim("mail", max_attempts=1).nack()
    store.claim("mail")
    lines = drawn(top._look(store, 1.0, None), 100, 24)
    assert "2 ready, 1 leased, 0 delayed; 1 of them dead letters" in lines[1]
    row = next(line for line in lines if line.startswith("mail "))
    assert row.split()[1:7] == ["1", "1", "0", "1", "-", "-"]


def test_once_writes_a_screen_where_there_is_no_terminal(path, store):
    """All keys, none of them cut, with the rates of one interval."""
    store.push("mail", b"x")
    store.push("k" * 300, b"x")
    for once in (["--once"], []):
        words = ["top", path, *once, "--interval", "0.1"]
        result = CliRunner().invoke(sqlspace.cli.commands, words)
        assert (result.exit_code, result.stderr) == (0, "")
        lines = result.stdout.splitlines()
        assert lines[0].startswith(path)
        assert keys_of(lines) == ["k" * 300, "mail"]
        assert "\x1b" not in result.stdout


def test_once_in_utf_8_whatever_the_locale(path, store):
    """As all that is written."""
    store.push("grüße 🗝", b"x")
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "sqlspace", "top", path, "--once", "--interval", "0.1"]
    done = subprocess.run(words, env=locale, capture_output=True, check=True)
    assert "grüße 🗝".encode() in done.stdout


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "soon"])
def test_an_interval_that_is_none_is_misuse(path, interval):
    """Checked before the file is touched."""
    result = CliRunner().invoke(sqlspace.cli.commands, ["top", path, "--interval", interval])
    assert result.exit_code == 2
    assert not os.path.exists(path)


def test_what_the_library_logs_does_not_get_into_the_screen():
    """It is the screen's last line; afterwards lines go to stderr again."""
    told = []
    record = logging.makeLogRecord({"msg": "odd"})
    with terminal.log_kept(told):
        terminal._log.emit(record)
    assert told == ["odd"]
    assert terminal._log.kept is None


# -- the terminal


class Terminal:
    """A terminal with a program in it; what it has written so far."""

    def __init__(self, words, columns=80, lines=24, **environment):
        self.master, self.slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.slave)
        self.text = ""
        environment = {**os.environ, "TERM": "xterm-256color", **environment}
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sqlspace", *words],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment,
            preexec_fn=self.control,  # noqa: PLW1509  # it is short
        )

    def control(self):
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def resize(self, columns, lines):
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)

    def read(self):
        while select.select([self.master], [], [], 0)[0]:
            self.text += os.read(self.master, 65536).decode()
        return self.text

    def shows(self, text):
        eventually(lambda: text in self.read(), repr(text))

    def type(self, keys):
        os.write(self.master, keys)

    def ended(self):
        eventually(lambda: (self.read(), self.process.poll() is not None)[1], "its end")
        self.read()
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def start(path, store):
    """`top` in a terminal."""
    store.push("mail", b"x")
    started = []

    def start(*words, **options):
        started.append(Terminal(["top", path, *words], **options))
        return started[-1]

    yield start
    for terminal_ in started:
        terminal_.close()


def assert_left_as_it_was(screen):
    """Its modes, the cursor, and what was on it before."""
    assert termios.tcgetattr(screen.slave) == screen.before
    assert screen.text.rindex("\x1b[?1049l") > screen.text.rindex("\x1b[?1049h")
    assert screen.text.rindex("\x1b[?25h") > screen.text.rindex("\x1b[?25l")


@pytest.mark.parametrize("keys", [b"q", b"Q", b"xyq", b"\x03"], ids=["q", "Q", "others", "Ctrl-C"])
def test_q_and_ctrl_c_end_it_and_leave_the_terminal_as_it_was(start, keys):
    """At once, though the next look is long in coming; exit 0, and no key is shown."""
    screen = start("--interval", "1000")
    screen.shows("q ends")
    assert not termios.tcgetattr(screen.slave)[3] & (termios.ECHO | termios.ICANON)
    screen.type(keys)
    assert screen.ended() == 0
    assert_left_as_it_was(screen)
    assert "xy" not in screen.text
    assert "^C" not in screen.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_the_terminal_as_it_was_too(start, number, code):
    """As a shell tells of it."""
    screen = start("--interval", "1000")
    screen.shows("q ends")
    screen.process.send_signal(number)
    assert screen.ended() == code
    assert_left_as_it_was(screen)


def test_a_failure_leaves_the_terminal_as_it_was_and_is_one_line(start, path):
    """Behind the screen, where it can be read; exit 3."""
    screen = start("--interval", "0.1")
    screen.shows("q ends")
    os.rename(path, path + "-moved")
    assert screen.ended() == 3
    assert_left_as_it_was(screen)
    rest = screen.text[screen.text.rindex("\x1b[?1049l") :]
    assert re.search(r"sqlspace: [^\n]+\r\n\Z", rest), rest


def test_ctrl_z_does_not_leave_the_shell_with_our_screen(start):
    """It is a key like others, that does nothing."""
    screen = start("--interval", "1000")
    screen.shows("q ends")
    assert termios.tcgetattr(screen.slave)[6][termios.VSUSP] == b"\x00"
    screen.type(b"\x1aq")
    assert screen.ended() == 0
    assert_left_as_it_was(screen)


def test_a_resized_terminal_is_drawn_anew_at_once(start):
    """Not at the next look only; and as wide as it is now."""
    screen = start("--interval", "1000")
    screen.shows("q ends; rates each 1000.0 s, depths each 1000.0 s")
    screen.text = ""
    screen.resize(30, 12)
    screen.shows("q ends; rates each 1000.0 s, …")


def test_the_screen_follows_the_store(start, store):
    """Look after look."""
    screen = start("--interval", "0.1")
    screen.shows(": 1 ready")
    store.push_many("mail", [b"x"] * 41)
    screen.shows(": 42 ready")
    screen.type(b"q")
    assert screen.ended() == 0


def test_a_terminal_that_cannot_draw_gets_the_screen_once(start):
    """Without a single escape."""
    screen = start("--interval", "0.1", TERM="dumb")
    assert screen.ended() == 0
    assert "mail" in screen.text
    assert "\x1b" not in screen.text
