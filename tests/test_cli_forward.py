"""`sqlspace forward`: to a command and to a server, the way back, its end, and its screen."""

import fcntl
import itertools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from children import PATIENCE_SECONDS, eventually
from click.testing import CliRunner
from nats_servers import NatsServer
from streams import Stream

import sqlspace
import sqlspace.cli

# nats-py leaves those of connections that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")

names = (f"command{number}" for number in itertools.count())


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


@pytest.fixture
def name():
    return next(names)


@pytest.fixture
def stream(nats_server, name):
    stream = Stream(nats_server.url, name, max_msgs=-1)
    yield stream
    stream.close()


@pytest.fixture
def started(path):
    """Start a forwarder in a process of its own."""
    processes = []

    def start(*words, **options):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "sqlspace", "forward", path, *map(str, words)],
                **{
                    "stdin": subprocess.DEVNULL,
                    "stdout": subprocess.PIPE,
                    "stderr": subprocess.PIPE,
                    "process_group": 0,
                    **options,
                },
            )
        finally:
            signal.signal(signal.SIGINT, before)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process):
    out, complaint = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, complaint.decode()


def numbers(*span):
    return [b"%d" % number for number in range(*span)]


def states(store, key="mail"):
    return [(entry.state, entry.attempts) for entry in store.entries(key)]


# -- what goes out


def test_each_entry_is_given_to_the_command_in_order(store, started):
    """Of several keys, with all that it is to know; what it writes isn't touched."""
    for key in ("a", "b"):
        store.push_many(key, [b"1\n", b"2\n", b"3\n"])
    script = 'read -r line; echo "$SQLSPACE_KEY $line $SQLSPACE_ATTEMPTS"'
    code, out, complaint = ended(started("a", "b", "--drain", "--", "sh", "-c", script))
    assert (code, complaint) == (0, "")
    lines = out.decode().splitlines()
    for key in ("a", "b"):
        assert [line for line in lines if line[0] == key] == [f"{key} {n} 1" for n in (1, 2, 3)]


def test_a_command_that_fails_is_told_and_tried_again(store, started, tmp_path):
    """A line for each failure, and one when it goes on."""
    down = tmp_path / "down"
    down.touch()
    store.push_many("mail", [b"1\n", b"2\n"])
    process = started("mail", "--drain", "--", "sh", "-c", f"test -e {down} && exit 7; cat")
    first = process.stderr.readline().decode()
    assert re.fullmatch(
        r"sqlspace: 'mail': entry 1 could not be sent, attempt 1: sh ended with 7; "
        r"the next is in \d\.\d s\n",
        first,
    )
    down.unlink()
    code, out, complaint = ended(process)
    assert (code, out) == (0, b"1\n2\n")
    assert complaint.endswith("sqlspace: 'mail': entries are sent again, from 1 on\n")


def test_quiet_tells_of_failures_only(store, started, tmp_path):
    """Not that it goes on."""
    down = tmp_path / "down"
    down.touch()
    store.push("mail", b"x")
    script = f"test -e {down} && rm {down} && exit 7; true"
    code, _, complaint = ended(started("mail", "--quiet", "--drain", "--", "sh", "-c", script))
    assert (code, len(complaint.splitlines())) == (0, 1)


def test_after_max_attempts_an_entry_is_a_dead_letter(store, started):
    """And the next goes out."""
    store.push_many("mail", [b"bad", b"good"])
    words = ("--max-attempts", 1, "--drain", "--", "grep", "good")
    code, out, complaint = ended(started("mail", *words))
    assert (code, out) == (0, b"good\n")
    assert "is dead after 1 attempts" in complaint
    assert store.len("mail/dead") == 1


def test_to_a_server_all_goes_once_and_how_many_is_written(store, started, nats_server, stream):
    """In order, by --drain."""
    store.push_many("mail", numbers(1500))
    words = ("--to", nats_server.url, "--stream", stream.subjects.entries)
    assert ended(started("mail", *words, "--drain")) == (0, b"1500\n", "")
    assert stream.payloads("mail") == numbers(1500)


def test_the_way_back_puts_them_into_the_store(store, started, nats_server, stream):
    """Once, and they have left the stream."""
    for payload in numbers(300):
        stream.publish("mail", payload)
    words = ("--from", nats_server.url, "--stream", stream.subjects.entries)
    assert ended(started("mail", *words, "--drain")) == (0, b"300\n", "")
    assert store.pull_many("mail", 1000) == numbers(300)
    assert stream.count() == 0


def test_a_forwarder_survives_its_server(store, started, name):
    """Started before it, and after it was killed; nothing is lost and nothing is doubled."""
    with NatsServer() as server:
        stream = Stream(server.url, name, max_msgs=-1)
        server.kill()
        store.push_many("mail", numbers(500))
        process = started("mail", "--to", server.url, "--stream", name)
        server.start()
        eventually(lambda: store.len("mail") == 0)
        server.kill()
        store.push_many("mail", numbers(500, 1000))
        server.start()
        eventually(lambda: store.len("mail") == 0)
        process.terminate()
        code, _, _ = ended(process)
        assert code == 143
        assert stream.payloads("mail") == numbers(1000)
        stream.close()


# -- the end of it


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_command_and_gives_its_entry_back(store, started, number, code):
    """As if it had never been tried."""
    store.push("mail", b"x")
    process = started("mail", "--", "sh", "-c", "echo ready; while :; do sleep 0.01; done")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert ended(process) == (code, b"", "")
    assert states(store) == [("ready", 0)]


def test_a_signal_while_it_waits_is_a_quiet_end(store, started, nats_server, name, stream):
    """With a server, the way back, and with a command."""
    to = ("--to", nats_server.url, "--stream", name)
    for rest in (to, ("--", "true")):
        process = started("mail", *rest)
        store.push("mail", b"x")
        eventually(lambda: store.len("mail") == 0)
        process.terminate()
        assert ended(process) == (143, b"", "")
    process = started("mail", "--from", nats_server.url, "--stream", name)
    eventually(lambda: stream.count() == 1)  # the position
    stream.publish("mail", b"y")
    eventually(lambda: stream.count() == 1)
    process.terminate()
    assert ended(process) == (143, b"", "")
    assert store.pull_many("mail", 10) == [b"x", b"y"]


def test_a_second_ctrl_c_kills_a_command_that_will_not_end(store, started):
    """At once."""
    store.push("mail", b"x")
    script = "trap '' INT; trap 'echo told' TERM; echo ready; while :; do sleep 0.01; done"
    process = started("mail", "--", "sh", "-c", script)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"told\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, b"", "")
    assert states(store) == [("ready", 0)]


def test_a_timeout_is_exit_1(store, started, nats_server, name):
    """Though nothing failed; with --drain too, if something is left."""
    assert ended(started("mail", "--timeout", 0.05, "--", "true")) == (1, b"", "")
    held = store.push("mail", b"x", delay=1000)
    words = ("--to", nats_server.url, "--stream", name, "--drain", "--timeout", 0.05)
    assert ended(started("mail", *words)) == (1, b"0\n", "")
    assert store.remove("mail", held)


def test_a_failure_of_the_store_is_one_line_and_exit_3(store, started, path):
    """As with all commands."""
    process = started("mail", "--", "true")
    store.push("mail", b"x")
    eventually(lambda: store.len("mail") == 0)
    os.rename(path, path + "-moved")
    code, _, complaint = ended(process)
    assert code == 3
    assert re.fullmatch(r"sqlspace: [^\n]+\n", complaint)


# -- misuse


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "Missing argument 'KEY..."),
        (["--", "true"], "there must be a KEY, and COMMAND stands after --"),
        (["a"], "there must be one of --to, --from, and a COMMAND after --"),
        (["a", "--to", "nats://x", "--", "true"], "there must be one of"),
        (["a", "--to", "nats://x", "--from", "nats://x"], "there must be one of"),
        (["", "--", "true"], "it must not be the empty str"),
        (["a", "--stream", "x", "--", "true"], "--stream, --creds and --tls-… are for a server"),
        (["a", "--from", "nats://x", "--workers", "2"], "are for what is sent"),
        (["a" * 1024, "--max-attempts", "2", "--", "true"], "--max-attempts needs a shorter KEY"),
        (["a", "--", "no-such-program"], "there is no program 'no-such-program'"),
        (["a", "--lease", "0", "--", "true"], "it must be more than 0 seconds"),
        (["a", "--to", "nats://x", "--stream", "a.b"], "stream must be 1 to 128 letters"),
        (["a", "--to", "nats://x", "--tls-key", __file__], "--tls-key is that of --tls-cert"),
        (["a", "--to", "nats://x", "--tls-cert", __file__], "--tls-…: "),
    ],
)
def test_misuse_is_exit_2_and_one_line(store, words, told):
    """Before the file is touched."""
    result = CliRunner().invoke(sqlspace.cli.commands, ["forward", store.path, *words])
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_dashes_before_the_file_are_misuse(store):
    """They would make keys of the command's words."""
    words = ["forward", "--", store.path, "a", "--", "true"]
    result = CliRunner().invoke(sqlspace.cli.commands, words)
    assert result.exit_code == 2
    assert "COMMAND stands after --" in result.stderr


def test_what_is_no_store_is_exit_3(tmp_path):
    """None is made."""
    path = str(tmp_path / "none.db")
    result = CliRunner().invoke(sqlspace.cli.commands, ["forward", path, "a", "--", "true"])
    assert result.exit_code == 3
    assert not os.path.exists(path)


def test_without_nats_a_server_needs_it(store):
    """It says what to install; a command doesn't need it."""
    code = (
        "import sys; sys.modules['nats'] = None\n"
        "import sqlspace.cli\n"
        "sys.argv[1:] = ['forward', *sys.argv[1:]]\n"
        "sqlspace.cli.run()\n"
    )
    for words, exit_code in ((["--to", "nats://x"], 2), (["--drain", "--", "true"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, store.path, "mail", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == exit_code
        assert ("pip install 'sqlspace[nats]'" in done.stderr) == (exit_code == 2)


# -- the screen


class Screen:
    """A forwarder on a terminal of its own."""

    def __init__(self, start, *words):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process = start(
            *words, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}
        )
        self.slave = slave
        self.text = ""

    def shows(self, expected):
        """Read until it is drawn."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while expected not in self.text:
            assert time.monotonic() < ends, self.text
            self.read()

    def read(self):
        if select.select([self.master], [], [], 0.05)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")

    def type(self, keys):
        os.write(self.master, keys)

    def ended(self):
        while self.process.poll() is None:
            self.read()
        while select.select([self.master], [], [], 0)[0]:
            self.read()
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode

    def close(self):
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def screen(started):
    screens = []

    def start(*words):
        screens.append(Screen(started, *words))
        return screens[-1]

    yield start
    for one in screens:
        one.close()


def test_the_screen_shows_what_is_sent_and_held_and_what_is_down(store, screen, tmp_path):
    """And q ends it, with 0, and leaves the terminal as it was."""
    down = tmp_path / "down"
    down.touch()
    store.push_many("mail", numbers(7))
    one = screen("mail", "--", "sh", "-c", f"test -e {down} && exit 7; true")
    one.shows("7 held")
    one.shows("sh ended with 7")
    assert re.search(r"down, next try in \d+ s: sh ended with 7", one.text)
    down.unlink()
    one.shows("7 in all; 0 held")
    one.shows("idle")
    one.type(b"q")
    assert one.ended() == 0


def test_sigterm_and_a_drained_store_leave_the_terminal_as_it_was(store, screen):
    """With their own codes."""
    one = screen("mail", "--", "true")
    one.shows("q ends")
    one.process.terminate()
    assert one.ended() == 143
    store.push("mail", b"x")
    assert screen("mail", "--drain", "--", "true").ended() == 0
