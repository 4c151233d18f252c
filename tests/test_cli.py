"""The command line: streams, exit codes, and files that it must not touch.

What a shell sees is asked of a real process; the rest runs inside this one, through click.
"""

import base64
import contextlib
import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading

import apsw
import pytest
from click.testing import CliRunner

import sqlspace
import sqlspace.checkup
import sqlspace.cli
import sqlspace.cli.options
import sqlspace.cli.terminal
from sqlspace.doorbell import room_token
from sqlspace.waiting import Waiter

SECONDS = 60  # until a test gives up
EVERY_BYTE = bytes(range(256))

# Of each command, what makes it look at a key that may not be there.
READING = {
    "pull": ["pull", "FILE", "mail"],
    "pull that waits": ["pull", "FILE", "mail", "--timeout", "0.01"],
    "pull of all": ["pull", "FILE", "mail", "--all"],
    "peek": ["peek", "FILE", "mail"],
    "peek of all": ["peek", "FILE", "mail", "--all", "--json"],
    "len": ["len", "FILE", "mail"],
    "keys": ["keys", "FILE"],
    "stats": ["stats", "FILE"],
    "history": ["history", "FILE", "mail"],
    "dead": ["dead", "FILE", "mail"],
    "requeue": ["dead", "FILE", "mail", "--requeue"],
    "top": ["top", "FILE", "--once", "--interval", "0.1"],
    "pull for a command": ["pull", "FILE", "mail", "--lease", "60", "--", "cat"],
    "compact": ["compact", "FILE"],
    "backup": ["backup", "FILE", "TARGET"],
}
NAMES = [
    *("backup", "check", "compact", "dead", "forward", "history", "keys", "len", "peek", "pull"),
    "push",
    *("stats", "top"),
]


@pytest.fixture
def path(tmp_path):
    # Not pytest's own directory: `check` looks at who may write there.
    directory = tmp_path / "private"
    directory.mkdir(mode=0o700)
    return str(directory / "queue.db")


@pytest.fixture
def spread(path):
    """A command of `READING`, for `path`."""
    return lambda words: [
        {"FILE": path, "TARGET": path + "-copy"}.get(word, word) for word in words
    ]


@pytest.fixture
def cli():
    """Run a command in this process: exit code, stdout as bytes, stderr."""

    def run(*words, stdin=b""):
        result = CliRunner().invoke(sqlspace.cli.commands, [str(word) for word in words], stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.stdout_bytes, result.stderr

    return run


def command(*words):
    return [sys.executable, "-m", "sqlspace", *map(str, words)]


def process(*words, stdin=b"", **options):
    """Run a command in a process of its own: exit code, stdout, stderr."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": SECONDS, **options}
    done = subprocess.run(command(*words), input=stdin, check=False, **options)
    return done.returncode, done.stdout, done.stderr.decode()


def is_one_line(complaint):
    return re.fullmatch(r"sqlspace: [^\n]+\n", complaint) is not None


def content(directory):
    """Every file of a directory, byte for byte, and its permissions."""
    found = {}
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), "rb") as file:
            found[name] = file.read(), os.stat(file.fileno()).st_mode
    return found


def until(condition):
    pause = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to that")


SQL = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA wal_autocheckpoint=0")
connection.executescript(sys.argv[2])
connection.close()
"""


def sql(path, script):
    """What another program does to a file, in a process of its own."""
    argv = [sys.executable, "-c", SQL, path, script]
    subprocess.run(argv, check=True, timeout=SECONDS)


# -- push and pull


def test_what_is_pushed_is_pulled_byte_for_byte(path):
    """Payloads are raw bytes, from stdin to stdout, in order."""
    assert process("push", path, "mail", stdin=EVERY_BYTE) == (0, b"", "")
    assert process("push", path, "mail", "two") == (0, b"", "")
    assert process("pull", path, "mail") == (0, EVERY_BYTE, "")
    assert process("pull", path, "mail") == (0, b"two", "")
    assert process("pull", path, "mail") == (1, b"", "")


def test_an_argument_is_a_payload_byte_for_byte(path):
    """What the shell hands over need not be UTF-8."""
    every = bytes(range(1, 256))
    assert process("push", path, "mail", "--", os.fsdecode(every)) == (0, b"", "")
    assert process("pull", path, "mail") == (0, every, "")


@pytest.mark.parametrize("words", [[""], []], ids=["argument", "stdin"])
def test_an_empty_payload_is_an_entry(cli, path, words):
    """It is there, and pulled with exit 0; nothing there is exit 1."""
    assert cli("push", path, "mail", *words) == (0, b"", "")
    assert cli("len", path, "mail") == (0, b"1\n", "")
    assert cli("pull", path, "mail") == (0, b"", "")
    assert cli("pull", path, "mail") == (1, b"", "")


def test_an_empty_argument_does_not_read_stdin(cli, path):
    """`push FILE KEY "$nothing"` pushes nothing, and never hangs."""
    cli("push", path, "mail", "", stdin=b"stdin")
    assert cli("pull", path, "mail") == (0, b"", "")


def test_a_newline_at_the_end_of_stdin_belongs_to_the_payload(cli, path):
    """Nothing is stripped, nothing is added."""
    cli("push", path, "mail", stdin=b"hello\n")
    assert cli("pull", path, "mail") == (0, b"hello\n", "")


def test_a_payload_after_two_dashes_may_begin_with_a_dash(cli, path):
    """As everywhere in a shell; and a lone dash is a payload."""
    assert cli("push", path, "mail", "--", "--lines") == (0, b"", "")
    assert cli("push", path, "mail", "-") == (0, b"", "")
    assert cli("pull", path, "mail", "--all") == (0, b"--lines\n-\n", "")


def test_push_makes_the_file_for_its_owner_alone(cli, path):
    """Messages are private unless their owner says otherwise."""
    cli("push", path, "mail", "hello")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_push_tells_the_seq_only_if_asked(cli, path):
    """Quiet in a pipeline; --seq is the number that the entry has."""
    assert cli("push", path, "mail", "one") == (0, b"", "")
    assert cli("push", path, "mail", "two", "--seq") == (0, b"2\n", "")
    with sqlspace.open(path) as store:
        assert store.get("mail", 2).payload == b"two"


def test_headers_are_pushed_with_the_entry(cli, path):
    """NAME=VALUE, any number of them; the value may hold more equals signs, or nothing."""
    options = ("--header", "from=me", "--header", "math=a=b", "--header", "empty=")
    assert cli("push", path, "mail", "x", *options) == (0, b"", "")
    with sqlspace.open(path) as store:
        (entry,) = store.entries("mail")
    assert entry.headers == {"from": "me", "math": "a=b", "empty": ""}


def test_without_sync_a_push_arrives_too(cli, path):
    """--no-sync changes what a power cut may take, and nothing else."""
    assert cli("push", path, "mail", "x", "--no-sync") == (0, b"", "")
    assert cli("pull", path, "mail") == (0, b"x", "")


def test_a_push_with_a_delay_is_ready_later(cli, path):
    """Until then it is there, and not to be taken."""
    assert cli("push", path, "mail", "later", "--delay", 1000) == (0, b"", "")
    assert cli("push", path, "mail", "soon", "--delay", 0.001) == (0, b"", "")
    assert cli("pull", path, "mail", "--timeout", SECONDS) == (0, b"soon", "")
    assert cli("pull", path, "mail") == (1, b"", "")
    assert cli("len", path, "mail") == (0, b"1\n", "")


def test_a_push_with_a_time_to_live_is_gone_afterwards(cli, path):
    """If nobody has taken it by then."""
    assert cli("push", path, "mail", "short", "--ttl", 0.001) == (0, b"", "")
    assert cli("push", path, "mail", "long", "--ttl", 1000) == (0, b"", "")
    until(lambda: cli("len", path, "mail")[1] == b"1\n")
    assert cli("pull", path, "mail") == (0, b"long", "")


def test_lines_have_the_times_that_are_told(cli, path):
    """Each of them."""
    options = ("--delay", 1000, "--ttl", 2000)
    assert cli("push", path, "mail", "--lines", *options, stdin=b"1\n2\n") == (0, b"", "")
    with sqlspace.open(path) as store:
        entries = list(store.entries("mail"))
    assert [entry.state for entry in entries] == ["delayed"] * 2
    assert [round(entry.expires_at - entry.due_at) for entry in entries] == [1000] * 2


def test_a_push_that_was_made_already_adds_nothing(cli, path):
    """--dedupe is the library's: the seq is that of the first, taken or not."""
    for _ in range(2):
        assert cli("push", path, "mail", "x", "--dedupe", "Ü1", "--seq") == (0, b"1\n", "")
    assert cli("pull", path, "mail", "--all") == (0, b"x\n", "")
    assert cli("push", path, "mail", "x", "--dedupe", "Ü1", "--seq") == (0, b"1\n", "")
    assert cli("len", path, "mail") == (0, b"0\n", "")


def test_a_push_waits_for_room(path, cli):
    """With --max-len, for ever or as long as told; time over is exit 1, and nothing is pushed."""
    cli("push", path, "mail", "one")
    words = ("push", path, "mail", "two", "--max-len", 1)
    assert cli(*words, "--timeout", 0.01) == (1, b"", "")
    assert cli(*words, "--timeout", 0) == (1, b"", "")
    with interruptible(*words) as pusher, sqlspace.open(path) as store:
        until(lambda: store._database.bell.awaited(room_token("mail"), Waiter()))
        assert store.pull("mail") == b"one"
        assert pusher.communicate(timeout=SECONDS) == (b"", b"")
        assert pusher.returncode == 0
        assert store.pull("mail") == b"two"


def test_names_and_headers_are_utf_8_whatever_the_locale(path):
    """A script that runs from cron means the same keys."""
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ("grüße", "x", "--header", "från=mé", "--dedupe", "ü")
    assert process("push", path, *words, env=locale) == (0, b"", "")
    with sqlspace.open(path) as store:
        (entry,) = store.entries("grüße")
        assert entry.headers == {"från": "mé"}
        assert store.push("grüße", b"y", dedupe="ü") == entry.seq


@pytest.mark.parametrize(
    ("stdin", "payloads"),
    [
        (b"", []),
        (b"\n", [b""]),
        (b"one", [b"one"]),
        (b"one\n\ntwo\r\n", [b"one", b"", b"two\r"]),
        (b"\xff\x00\nlast", [b"\xff\x00", b"last"]),
        (b"x" * 3_000_000 + b"\n" + b"y" * 10, [b"x" * 3_000_000, b"y" * 10]),
        (b"line\n" * 300_000, [b"line"] * 300_000),
    ],
    ids=["nothing", "empty line", "no newline", "CR", "bytes", "longer than a read", "many"],
)
def test_each_line_of_stdin_is_an_entry(cli, path, stdin, payloads):
    """All but the newline, in order; the last line needs none."""
    code, out, complaint = cli("push", path, "log", "--lines", "--seq", "--no-sync", stdin=stdin)
    assert (code, complaint) == (0, "")
    assert out.split() == [b"%d" % seq for seq in range(1, len(payloads) + 1)]
    if payloads:
        with sqlspace.open(path) as store:
            assert store.pull_many("log", len(payloads) + 1) == payloads


def test_lines_are_pushed_as_they_come(path):
    """`tail -f | push --lines` holds nothing back, and Ctrl-C leaves what was pushed."""
    with interruptible("push", path, "log", "--lines", "--seq", stdin=subprocess.PIPE) as pusher:
        pusher.stdin.write(b"one\ntwo\nhal")
        pusher.stdin.flush()
        assert [pusher.stdout.readline(), pusher.stdout.readline()] == [b"1\n", b"2\n"]
        pusher.stdin.write(b"f\n")
        pusher.stdin.flush()
        assert pusher.stdout.readline() == b"3\n"
        pusher.send_signal(signal.SIGINT)
        out, complaint = pusher.communicate(timeout=SECONDS)
    assert (pusher.returncode, out, complaint) == (130, b"", b"")
    with sqlspace.open(path) as store:
        assert store.pull_many("log", 10) == [b"one", b"two", b"half"]


def test_lines_that_come_at_once_are_one_transaction(cli, path, monkeypatch):
    """A batch for each read, and not a commit for each line."""
    batches = []
    push_many = sqlspace.Store.push_many

    def counted(store, key, payloads, **options):
        batches.append(len(payloads))
        return push_many(store, key, payloads, **options)

    monkeypatch.setattr(sqlspace.Store, "push_many", counted)
    cli("push", path, "log", "--lines", stdin=b"line\n" * 1000)
    assert batches == [1000]


def test_a_failure_among_lines_says_how_many_are_in(cli, path, monkeypatch):
    """Whoever repairs it knows where to go on."""

    def fail(store, key, payloads, **options):
        monkeypatch.setattr(sqlspace.Store, "push_many", full)
        return push_many(store, key, payloads, **options)

    def full(store, key, payloads, **options):
        raise sqlspace.FullError("no room left")

    push_many = sqlspace.Store.push_many
    monkeypatch.setattr(sqlspace.Store, "push_many", fail)
    monkeypatch.setattr(sqlspace.cli.terminal, "_READ_BYTES", 10)
    code, _, complaint = cli("push", path, "log", "--lines", stdin=b"line\n" * 20)
    assert code == 3
    assert complaint == "sqlspace: no room left; the first 2 lines were pushed\n"


def test_pull_waits_only_if_told(cli, path):
    """At once: 1; with --timeout, after that long: 1; what comes in the meantime is taken."""
    cli("push", path, "other", "x")
    assert cli("pull", path, "mail") == (1, b"", "")
    assert cli("pull", path, "mail", "--timeout", "0") == (1, b"", "")
    assert cli("pull", path, "mail", "--timeout", "0.01") == (1, b"", "")
    assert cli("pull", path, "mail", "--wait", "--timeout", "0.01", "--all") == (1, b"", "")


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (["--wait"], b"hello"),
        (["--timeout", SECONDS], b"hello"),
        (["--timeout", "inf"], b"hello"),
        (["--wait", "--all"], b"hello\n"),
    ],
)
def test_a_pull_that_waits_gets_what_is_pushed(path, options, output):
    """From another process, at the moment it is pushed."""
    with sqlspace.open(path) as store, interruptible("pull", path, "mail", *options) as puller:
        until(lambda: somebody_waits(store))
        store.push("mail", b"hello")
        assert puller.communicate(timeout=SECONDS) == (output, b"")
    assert puller.returncode == 0


def test_many_are_pulled_with_a_newline_after_each(cli, path):
    """--limit takes so many at most, --all what is there; exit 1 only if that is nothing."""
    cli("push", path, "mail", "--lines", stdin=b"1\n2\n3\n4\n5\n")
    assert cli("pull", path, "mail", "--limit", 1) == (0, b"1\n", "")
    assert cli("pull", path, "mail", "-n", 2) == (0, b"2\n3\n", "")
    assert cli("pull", path, "mail", "--all") == (0, b"4\n5\n", "")
    assert cli("pull", path, "mail", "--all") == (1, b"", "")
    assert cli("pull", path, "mail", "--limit", 5) == (1, b"", "")


def test_lines_go_in_and_come_out_the_same(cli, path):
    """What push --lines and pull --all do is each other's inverse, over many batches."""
    lines = b"".join(b"%d\n" % number for number in range(3000)) + b"x" * 3_000_000 + b"\nend\n"
    cli("push", path, "log", "--lines", stdin=lines)
    assert cli("pull", path, "log", "--all") == (0, lines, "")


def test_pull_in_json_tells_text_from_bytes(cli, path):
    """Text if it is UTF-8, else base64, and which of the two; a line for each."""
    payloads = ["grüße\n".encode(), EVERY_BYTE, b""]
    with sqlspace.open(path) as store:
        store.push_many("mail", [*payloads, *payloads])
    read = []
    for options in (["--json"], ["--json", "--limit", 2], ["--json", "--all"]):
        code, out, _ = cli("pull", path, "mail", *options)
        assert code == 0
        read += [json.loads(line) for line in out.splitlines()]
    assert [entry["encoding"] for entry in read] == ["utf-8", "base64", "utf-8"] * 2
    assert [spelled(entry) for entry in read] == payloads * 2
    assert {entry["key"] for entry in read} == {"mail"}


def spelled(entry):
    if entry["encoding"] == "utf-8":
        return entry["payload"].encode()
    assert entry["encoding"] == "base64"
    return base64.b64decode(entry["payload"], validate=True)


def test_pull_keeps_as_much_history_as_told(cli, path):
    """Without a word 10,000; a shell must be able to say what its application says."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [b"x"] * 4)
    cli("pull", path, "mail", "--history", "all")
    cli("pull", path, "mail", "--limit", 2, "--history", 1)
    assert cli("history", path, "mail")[1].count(b"\n") <= 2
    cli("pull", path, "mail", "--history", "0")
    with sqlspace.open(path, history=0) as store:
        assert list(store.history("mail")) == []


@pytest.mark.parametrize("name", ["peek", "len", "keys", "stats", "history", "dead", "top", "push"])
def test_only_pull_sets_a_history(cli, path, spread, name, monkeypatch):
    """The smallest history of the open stores counts: to look must not cut an application's."""
    opened = []

    def noting(opener):
        def opening(path, **options):
            opened.append(options["history"])
            return opener(path, **options)

        return opening

    cli("push", path, "mail", "x")
    for module in (sqlspace.cli.changing, sqlspace.cli.options):
        for name_of_opener in {"open", "open_existing"} & set(vars(module)):
            opener = getattr(module, name_of_opener)
            monkeypatch.setattr(module, name_of_opener, noting(opener))
    words = ["push", path, "mail", "x"] if name == "push" else spread(READING[name])
    assert cli(*words)[0] == (1 if name == "dead" else 0)
    assert opened == [None]


# -- an output that fails


@contextlib.contextmanager
def interruptible(*words, **options):
    """A command that Ctrl-C reaches, even if this process runs in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = subprocess.Popen(
            command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with started:
        try:
            yield started
        finally:
            started.kill()


def somebody_waits(store):
    return store._database.bell.awaited("mail", Waiter())


@pytest.mark.parametrize("options", [[], ["--all"], ["--json"]])
def test_nothing_is_pulled_into_a_pipe_that_nobody_reads(path, options):
    """The look at stdout comes before the taking: quiet, exit 141, the entry stays."""
    with sqlspace.open(path) as store:
        store.push("mail", b"hello")
        reader, writer = os.pipe()
        os.close(reader)
        code, _, complaint = process("pull", path, "mail", *options, stdout=writer)
        os.close(writer)
        assert (code, complaint) == (141, "")
        assert store.pull_many("mail", 9) == [b"hello"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pull_that_nobody_reads_to_the_end_is_put_back(path, unbuffered):
    """After `pull | head -c 1` the entry is in its place again, headers and all."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with sqlspace.open(path) as store:
        seq = store.push("mail", EVERY_BYTE * 40_000, headers={"from": "me"})
        store.push("mail", b"second")
        with interruptible("pull", path, "mail", env=environment) as puller:
            assert puller.stdout.read(1) == b"\x00"
            puller.stdout.close()
            assert puller.stderr.read() == b""
            assert puller.wait(SECONDS) == 141
        first, second = store.entries("mail")
        assert (first.seq, first.payload) == (seq, EVERY_BYTE * 40_000)
        assert first.headers == {"from": "me"}
        assert second.payload == b"second"


def test_a_pull_whose_output_fails_is_put_back(path):
    """A full disk behind `pull > file` costs no entry; exit 3, and one line says why."""
    with sqlspace.open(path) as store, open(os.devnull, "rb") as unwritable:
        seq = store.push("mail", b"hello")
        store.push("mail", b"second")
        code, _, complaint = process("pull", path, "mail", stdout=unwritable)
        assert (code, is_one_line(complaint)) == (3, True)
        assert os.strerror(errno.EBADF) in complaint
        assert [entry.seq for entry in store.entries("mail")] == [seq, seq + 1]


def test_a_pull_of_all_stops_when_nobody_reads(path):
    """`pull --all | head` is quiet, and takes hardly more than what fits into the pipe."""
    with sqlspace.open(path, sync=False) as store:
        store.push_many("mail", [b"x" * 1000] * 5000)
        with interruptible("pull", path, "mail", "--all") as puller:
            assert puller.stdout.readline() == b"x" * 1000 + b"\n"
            puller.stdout.close()
            assert puller.stderr.read() == b""
            assert puller.wait(SECONDS) == 141
        assert store.len("mail") > 4000


@pytest.mark.parametrize("name", ["peek of all", "keys", "stats", "history"])
def test_a_reading_command_is_quiet_when_nobody_reads(path, spread, name):
    """`… | head` is how a shell looks at the beginning of something."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [b"x", b"y"])
        store.pull("mail")
    reader, writer = os.pipe()
    os.close(reader)
    code, _, complaint = process(*spread(READING[name]), stdout=writer)
    os.close(writer)
    assert (code, complaint) == (141, "")


def test_closed_streams_harm_nothing(path):
    """No file of the store gets the number of a closed stdout, and the output with it."""
    line = 'exec "$0" -m sqlspace "$@" <&- >&- 2>&-'
    for words, code in (
        (["push", path, "mail", "hello"], 0),
        (["push", path, "mail"], 2),  # from which stdin?
        (["pull", path, "mail"], 3),  # and to which stdout?
        (["stats", path], 3),
        (["check", path], 3),
    ):
        shell = ["sh", "-c", line, sys.executable, *words]
        assert subprocess.run(shell, check=False, timeout=SECONDS).returncode == code, words
    assert process("check", path)[0] == 0
    assert process("pull", path, "mail") == (0, b"hello", "")


@pytest.mark.parametrize("words", [["--help"], ["pull", "--help"]])
def test_help_is_quiet_when_nobody_reads(words):
    """Nothing is complained of, neither by us nor by Python's last flush."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    code, _, complaint = process(*words, stdout=writer, env=environment)
    os.close(writer)
    assert (code in (1, 141), complaint) == (True, "")


@pytest.mark.parametrize("words", [["--help"], ["pull", "--help"]])
def test_help_that_cannot_be_written_is_one_line(words):
    """A full disk behind it is no reason for a traceback."""
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open(os.devnull, "rb") as unwritable:
        code, _, complaint = process(*words, stdout=unwritable, env=environment)
    assert (code, is_one_line(complaint)) == (3, True)


def test_the_standard_descriptors_are_taken_if_they_are_free():
    """So that no file of the store, nor a socket of the doorbell, becomes stdout."""
    program = (
        "import os, sqlspace.cli\n"
        "out = os.dup(1)\n"
        "os.closerange(0, 3)\n"
        "sqlspace.cli.commands.main = lambda **_: None\n"
        "sqlspace.cli.run()\n"
        "os.write(out, b'%d' % os.open(os.devnull, os.O_RDONLY))\n"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=False, timeout=SECONDS)
    assert int(done.stdout) > 2


def test_a_pull_of_all_takes_batches_that_it_can_afford_to_lose(cli, path, monkeypatch):
    """They grow to 256 small entries, and fall back to one where payloads are large."""
    batches = []
    pull_many = sqlspace.Store.pull_many

    def counted(store, key, limit):
        payloads = pull_many(store, key, limit)
        batches.append((limit, sum(map(len, payloads))))
        return payloads

    with sqlspace.open(path) as store:
        store.push_many("mail", [b"x"] * 2000)
        store.push_many("mail", [bytes(600_000)] * 5)
    monkeypatch.setattr(sqlspace.Store, "pull_many", counted)
    assert cli("pull", path, "mail", "--all")[0] == 0
    assert [limit for limit, _ in batches[:9]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert max(limit for limit, _ in batches) == 256
    assert batches[-1] == (1, 0)


# -- Ctrl-C


def test_ctrl_c_ends_a_waiting_pull_quietly_and_takes_nothing(path):
    """Exit 130, no traceback, and what is pushed afterwards is for others."""
    with sqlspace.open(path) as store:
        with interruptible("pull", path, "mail", "--wait") as puller:
            until(lambda: somebody_waits(store))
            puller.send_signal(signal.SIGINT)
            assert puller.communicate(timeout=SECONDS) == (b"", b"")
        assert puller.returncode == 130
        store.push("mail", b"hello")
        assert store.pull_many("mail", 9) == [b"hello"]


def test_ctrl_c_in_the_middle_of_a_pull_loses_nothing(path):
    """The signal and the entry at once: it was written, or it is in the file."""
    with sqlspace.open(path) as store:
        for number in range(6):
            payload = b"%d" % number
            with interruptible("pull", path, "mail", "--wait") as puller:
                until(lambda: somebody_waits(store))
                store.push("mail", payload)
                puller.send_signal(signal.SIGINT)
                out, complaint = puller.communicate(timeout=SECONDS)
            assert puller.returncode in (0, 130)
            assert complaint == b""
            assert out == payload or store.pullp("mail") == payload
            store.clear("mail")


# -- looking


def test_peek_takes_nothing(cli, path):
    """The same payload again and again, and exit 1 if there is none."""
    cli("push", path, "mail", stdin=EVERY_BYTE)
    assert cli("peek", path, "mail") == (0, EVERY_BYTE, "")
    assert cli("peek", path, "mail") == (0, EVERY_BYTE, "")
    assert cli("peek", path, "other") == (1, b"", "")
    assert cli("peek", path, "other", "--json") == (1, b"", "")
    assert cli("peek", path, "other", "--all") == (1, b"", "")


def test_peek_shows_what_stands_behind_the_head(cli, path):
    """In order, a newline after each, up to the limit."""
    cli("push", path, "mail", "--lines", stdin=b"1\n2\n3\n")
    assert cli("peek", path, "mail", "-n", 2) == (0, b"1\n2\n", "")
    assert cli("peek", path, "mail", "--all") == (0, b"1\n2\n3\n", "")


def test_peek_in_json_has_all_of_the_entry(cli, path):
    """Every field of `Entry`, and the payload's encoding."""
    with sqlspace.open(path) as store:
        store.push("mail", b"\xff", headers={"from": "me"})
        store.push("mail", b"two")
        entries = list(store.entries("mail"))
    code, out, _ = cli("peek", path, "mail", "--json")
    first = json.loads(out)
    assert (code, spelled(first)) == (0, b"\xff")
    assert first["headers"] == {"from": "me"}
    assert (first["seq"], first["pushed_at"]) == (1, entries[0].pushed_at)
    assert set(first) == {*sqlspace.Entry.__dataclass_fields__, "encoding"}
    _, out, _ = cli("peek", path, "mail", "--json", "--all")
    assert [json.loads(line)["seq"] for line in out.splitlines()] == [1, 2]


def test_len_answers_zero_too(cli, path):
    """A count is an answer, so its exit code is 0."""
    cli("push", path, "mail", "--lines", stdin=b"1\n2\n")
    assert cli("len", path, "mail") == (0, b"2\n", "")
    assert cli("len", path, "other") == (0, b"0\n", "")


def test_keys_are_sorted_lines_or_one_list(cli, path):
    """UTF-8, whatever the locale; a key with a newline is whole in JSON."""
    for key in ("b", "grüße 🗝", "a\nb"):
        cli("push", path, key, "x")
    assert cli("keys", path) == (0, "a\nb\nb\ngrüße 🗝\n".encode(), "")
    assert json.loads(cli("keys", path, "--json")[1]) == ["a\nb", "b", "grüße 🗝"]
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert process("keys", path, env=locale) == (0, "a\nb\nb\ngrüße 🗝\n".encode(), "")
    assert process("stats", path, env=locale)[0] == 0


def test_stats_are_a_table_for_a_person(cli, path):
    """Per key its counts, age and bytes; then the file's."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [bytes(1500), b""])
        store.push("mail/dead", b"x")
        store.push("[red]mark\x1b[2J", b"x")
        store.push("k" * 300, b"x")
    code, out, complaint = cli("stats", path)
    lines = out.decode().splitlines()
    assert (code, complaint) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["key"] == ["ready", "leased", "delayed", "dead", "oldest", "bytes"]
    assert rows["mail"][:4] == ["2", "0", "0", "1"]
    assert re.fullmatch(r"[\d.]+ (s|min \d+ s) 1\.5 KiB", " ".join(rows["mail"][4:]))
    assert r"[red]mark\x1b[2J" in rows  # neither rich nor the terminal obeys a key
    assert "k" * 300 in rows  # and none is cut, where there is no terminal
    tail = [line.split()[0] for line in lines if line][-4:]
    assert tail == ["file", "-wal", "free", "tombstones"]


def test_stats_in_json_are_the_librarys(cli, path):
    """Every field of `Stats`, in its own unit."""
    with sqlspace.open(path) as store:
        store.push("mail", b"hello")
        store.push("mail", b"gone")
        store.pull("mail")
    code, out, _ = cli("stats", path, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["keys"]["mail"]["ready"] == 1
    assert found["keys"]["mail"]["bytes"] == 4
    assert found["tombstones"] == 1
    assert set(found) == set(sqlspace.Stats.__dataclass_fields__)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (-1, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3_599, "59 min 59 s"),
        (3_600, "1 h 0 min"),
        (86_399, "23 h 59 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_an_age_is_told_in_two_units(seconds, text):
    """So much as a person wants to know."""
    assert sqlspace.cli.terminal.age(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_a_size_is_told_in_binary_units(size, text):
    """As the file system counts."""
    assert sqlspace.cli.terminal.size(size) == text


def test_history_tells_what_was_taken(cli, path):
    """Oldest taking first: number, outcome and times; nothing is an answer too."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [b"1", b"2", b"3"])
        store.pull_many("mail", 2)
        stones = list(store.history("mail"))
    code, out, _ = cli("history", path, "mail")
    rows = [line.split("\t") for line in out.decode().splitlines()]
    assert code == 0
    assert [row[:2] for row in rows] == [["1", "taken"], ["2", "taken"]]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", t) for row in rows for t in row[2:])
    _, out, _ = cli("history", path, "mail", "--json")
    read = [json.loads(line) for line in out.splitlines()]
    assert [sqlspace.Tombstone(**row) for row in read] == stones
    assert cli("history", path, "other") == (0, b"", "")


# -- dead letters


@pytest.fixture
def buried(path):
    """Three dead letters of `mail`, the last of them pushed there by hand."""
    with sqlspace.open(path) as store:
        store.push("mail", b"one\x1b[2J\n" + b"x" * 100, headers={"from": "me"})
        store.push("mail", b"\xff")
        for attempts in (2, 1):
            for _ in range(attempts):
                store.claim("mail", max_attempts=attempts).nack()
        store.push("mail/dead", b"by hand")
        return [entry.seq for entry in store.entries("mail/dead")]


def test_dead_letters_are_listed(cli, path, buried):
    """Number, origin, attempts, when, why and how it begins; nothing that a terminal obeys."""
    code, out, complaint = cli("dead", path, "mail")
    assert (code, complaint) == (0, "")
    rows = [line.split("\t") for line in out.decode().splitlines()]
    assert [int(row[0]) for row in rows] == buried
    assert [row[1] for row in rows] == ["mail 1", "mail 2", "- -"]
    assert [row[2] for row in rows] == ["2", "1", "-"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", row[3]) for row in rows)
    assert [row[4] for row in rows] == ["attempts", "attempts", "-"]
    assert [row[5] for row in rows] == [r"one\x1b[2J\n" + "x" * 52 + "…", r"\xff", "by hand"]
    assert cli("dead", path, "mail", "--seq", buried[1])[1] == out.splitlines(keepends=True)[1]


def test_dead_letters_in_json_are_whole(cli, path, buried):
    """Every field of `Entry`, headers and payload."""
    code, out, _ = cli("dead", path, "mail", "--json")
    letters = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [letter["seq"] for letter in letters] == buried
    assert spelled(letters[0]) == b"one\x1b[2J\n" + b"x" * 100
    assert letters[0]["headers"]["from"] == "me"
    assert letters[0]["headers"]["sqlspace-key"] == "mail"
    assert set(letters[0]) == {*sqlspace.Entry.__dataclass_fields__, "encoding"}


def test_what_is_dead_and_not_moved_yet_is_a_dead_letter(path):
    """The lease of its last attempt ran out, and nobody came by."""
    with sqlspace.open(path) as store:
        store.push("mail", b"x")
        store.claim("mail", lease=0.001, max_attempts=1)
        until(lambda: not store.len("mail"))
    code, out, complaint = process("dead", path, "mail")
    assert (code, out.count(b"\n")) == (0, 1)
    assert is_one_line(complaint)  # the library tells of it


def test_no_dead_letters_are_exit_1(cli, path):
    """As with what a key holds; how many were moved or deleted is an answer, 0 too."""
    cli("push", path, "mail", "x")
    assert cli("dead", path, "mail") == (1, b"", "")
    assert cli("dead", path, "mail", "--json") == (1, b"", "")
    assert cli("dead", path, "mail", "--seq", 1) == (1, b"", "")
    assert cli("dead", path, "mail", "--requeue") == (0, b"0\n", "")
    assert cli("dead", path, "mail", "--drop") == (0, b"0\n", "")
    assert cli("dead", path, "mail", "--drop", "--seq", 1) == (1, b"0\n", "")
    assert cli("len", path, "mail") == (0, b"1\n", "")


def test_dead_letters_are_requeued(cli, path, buried):
    """All of them, with the headers that they had."""
    assert cli("dead", path, "mail", "--requeue") == (0, b"3\n", "")
    assert cli("dead", path, "mail")[0] == 1
    with sqlspace.open(path) as store:
        entries = list(store.entries("mail"))
    assert [entry.headers for entry in entries] == [{"from": "me"}, {}, {}]


def test_dead_letters_are_dropped(cli, path, buried):
    """One by its number, or all that are left."""
    assert cli("dead", path, "mail", "--drop", "--seq", buried[1]) == (0, b"1\n", "")
    assert cli("dead", path, "mail", "--drop", "--seq", buried[1]) == (1, b"0\n", "")
    assert cli("dead", path, "mail", "--drop") == (0, b"2\n", "")
    assert cli("dead", path, "mail") == (1, b"", "")


# -- upkeep


def test_compact_makes_the_file_smaller_and_says_so(cli, path):
    """The history goes, the entries stay."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [bytes(5000)] * 200)
        store.push("mail", b"stays")
        store.pull_many("mail", 200)
    code, out, _ = cli("compact", path, "--json")
    done = json.loads(out)
    assert code == 0
    assert done["bytes_after"] == os.stat(path).st_size < 100_000 < done["bytes_before"]
    assert re.fullmatch(rb"[\d.]+ KiB before, [\d.]+ KiB after\n", cli("compact", path)[1])
    assert cli("history", path, "mail") == (0, b"", "")
    assert cli("pull", path, "mail") == (0, b"stays", "")


def test_a_backup_is_a_store_of_its_own(cli, path):
    """Taken while the file is in use; what happens later is not in it."""
    with sqlspace.open(path) as store:
        store.push("mail", b"hello")
        assert cli("backup", path, path + "-copy") == (0, b"", "")
        store.pull("mail")
    assert cli("pull", path + "-copy", "mail") == (0, b"hello", "")


def test_a_backup_overwrites_nothing(cli, path):
    """A file that is there stays as it is: exit 3."""
    cli("push", path, "mail", "hello")
    with open(path + "-copy", "xb") as file:
        file.write(b"precious")
    code, _, complaint = cli("backup", path, path + "-copy")
    assert (code, is_one_line(complaint)) == (3, True)
    with open(path + "-copy", "rb") as file:
        assert file.read() == b"precious"


def test_what_the_library_logs_is_a_line_on_stderr(path):
    """A warning doesn't look like a crash, and doesn't get into the output."""
    program = (
        "import logging, sys, sqlspace.cli as cli\n"
        "@cli.commands.command()\n"
        "def warn():\n"
        "    try: 1 / 0\n"
        "    except ZeroDivisionError:\n"
        "        logging.getLogger('sqlspace').warning('%s: odd', 'x.db', exc_info=True)\n"
        "sys.argv = ['sqlspace', 'warn']\n"
        "cli.run()\n"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"sqlspace: x.db: odd\n")


# -- misuse


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["--frobnicate"],
        ["push"],
        ["push", "FILE"],
        ["push", "FILE", "", "x"],
        ["push", "FILE", "k" * 1025, "x"],
        ["push", "FILE", "mail", "x", "y"],
        ["push", "FILE", "mail", "x", "--header", "novalue"],
        ["push", "FILE", "mail", "x", "--header", "=value"],
        ["push", "FILE", "mail", "x", "--header", "a=1", "--header", "a=2"],
        ["push", "FILE", "mail", "x", "--header", "a=\udcff"],
        ["push", "FILE", "mail", "x", "--lines"],
        ["push", "FILE", "mail", "--lines", "--header", "a=1"],
        ["push", "FILE", "mail\udcff", "x"],
        ["push", "FILE", "mail", "x", "--busy-timeout", "-1"],
        ["push", ":memory:", "mail", "x"],
        ["push", "", "mail", "x"],
        ["push", "FILE", "mail", "x", "--ttl", "0"],
        ["push", "FILE", "mail", "x", "--ttl", "nan"],
        ["push", "FILE", "mail", "x", "--delay", "inf"],
        ["push", "FILE", "mail", "x", "--delay", "-1"],
        ["push", "FILE", "mail", "x", "--delay", "2", "--ttl", "1"],
        ["push", "FILE", "mail", "--lines", "--delay", "2", "--ttl", "1"],
        ["push", "FILE", "mail", "x", "--dedupe", ""],
        ["push", "FILE", "mail", "x", "--dedupe", "d" * 1025],
        ["push", "FILE", "mail", "x", "--max-len", "0"],
        ["push", "FILE", "mail", "x", "--timeout", "1"],
        ["push", "FILE", "mail", "x", "--max-len", "1", "--timeout", "-1"],
        ["push", "FILE", "mail", "--lines", "--dedupe", "x"],
        ["push", "FILE", "mail", "--lines", "--max-len", "1"],
        ["pull", "FILE"],
        ["dead", "FILE"],
        ["dead", "FILE", "mail", "--requeue", "--drop"],
        ["dead", "FILE", "mail", "--requeue", "--seq", "1"],
        ["dead", "FILE", "mail", "--drop", "--json"],
        ["dead", "FILE", "mail", "--requeue", "--json"],
        ["dead", "FILE", "mail", "--seq", "0"],
        ["dead", "FILE", "k" * 1020],
        ["pull", "FILE", "mail", "--timeout", "-1"],
        ["pull", "FILE", "mail", "--timeout", "nan"],
        ["pull", "FILE", "mail", "--timeout", "soon"],
        ["pull", "FILE", "mail", "--limit", "0"],
        ["pull", "FILE", "mail", "--limit", "1", "--all"],
        ["pull", "FILE", "mail", "--history", "-1"],
        ["pull", "FILE", "mail", "--history", "much"],
        ["peek", "FILE", "mail", "--limit", "1", "--all"],
        ["len", "FILE", ""],
        ["keys", "FILE", "mail"],
        ["backup", "FILE"],
    ],
    ids=" ".join,
)
def test_misuse_is_one_line_and_exit_2_and_makes_no_file(cli, path, spread, words):
    """What is on the command line is checked before anything is touched."""
    code, out, complaint = cli(*spread(words))
    assert (code, out, is_one_line(complaint)) == (2, b"", True), complaint
    assert os.listdir(os.path.dirname(path)) == []


def test_a_process_says_misuse_too(path):
    """Exit code and stderr, as a shell sees them."""
    code, out, complaint = process("pull", path, "mail", "--timeout", "-1")
    assert (code, out, is_one_line(complaint)) == (2, b"", True)
    code, out, complaint = process()
    assert (code, out) == (2, b"")
    assert complaint.startswith("Usage: sqlspace ")


def test_a_message_holds_nothing_that_a_terminal_obeys(cli, path):
    """Names come from others; a line of ours stays one line."""
    name = os.path.join(os.path.dirname(path), "a\x1b[2Jb\nc.db")
    code, _, complaint = cli("len", name, "mail")
    assert (code, is_one_line(complaint)) == (3, True)
    assert "\x1b" not in complaint


# -- files that aren't there, or aren't stores


@pytest.mark.parametrize("name", READING)
def test_a_command_that_reads_makes_no_file(cli, path, spread, name):
    """A mistyped path is exit 3 and a line that names it."""
    code, out, complaint = cli(*spread(READING[name]))
    assert (code, out, is_one_line(complaint)) == (3, b"", True)
    assert path in complaint
    assert os.strerror(errno.ENOENT) in complaint
    assert os.listdir(os.path.dirname(path)) == []


@pytest.mark.parametrize("name", READING)
def test_a_command_that_reads_makes_no_store_of_an_empty_file(cli, path, spread, name):
    """Only push does."""
    open(path, "xb").close()
    code, out, complaint = cli(*spread(READING[name]))
    assert (code, out, is_one_line(complaint)) == (3, b"", True)
    assert content(os.path.dirname(path))["queue.db"][0] == b""


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_command_that_reads_makes_no_store_of_a_database_without_tables(cli, path, spread, mode):
    """Another application may be about to fill it; not one byte changes, nor is a file left."""
    sql(path, f"PRAGMA journal_mode={mode}; CREATE TABLE notes (text); DROP TABLE notes;")
    before = content(os.path.dirname(path))
    for words in map(spread, READING.values()):
        code, out, complaint = cli(*words)
        assert (code, out, is_one_line(complaint)) == (3, b"", True), words
        assert f"{path}: there is no store in it" in complaint
        assert content(os.path.dirname(path)) == before, words
    code, out, _ = cli("check", path, "--json")
    assert (code, "store" in problems(out)) == (3, True)
    assert content(os.path.dirname(path)) == before


def test_a_reading_process_says_that_nothing_is_there(path):
    """Exit code and stderr, as a shell sees them."""
    code, out, complaint = process("pull", path, "mail")
    assert (code, out, is_one_line(complaint)) == (3, b"", True)
    assert os.listdir(os.path.dirname(path)) == []


STRANGERS = {
    "another application's": "CREATE TABLE notes (text); INSERT INTO notes VALUES ('mine');",
    "another application's, in WAL": "PRAGMA journal_mode=WAL; CREATE TABLE notes (text);",
    "one with a name of ours": "CREATE TABLE sqlspace_entries (text);",
    "one in UTF-16": "PRAGMA encoding='UTF-16'; CREATE TABLE notes (text);",
}


@pytest.fixture(params=[*STRANGERS, "a text", "noise"])
def stranger(request, path):
    """A file that is no store."""
    if request.param in STRANGERS:
        sql(path, STRANGERS[request.param])
    else:
        with open(path, "xb") as file:
            file.write(b"Dear diary,\n" * 100 if request.param == "a text" else b"\xa5" * 9000)
    return path


def test_a_strangers_file_is_refused_and_not_touched(cli, stranger, spread):
    """Every command: exit 3, one line, and not one byte changed, nor a file left beside it."""
    directory = os.path.dirname(stranger)
    before = content(directory)
    for words in [*map(spread, READING.values()), ["push", stranger, "mail", "x"]]:
        code, out, complaint = cli(*words)
        assert (code, out, is_one_line(complaint)) == (3, b"", True), (words, complaint)
        assert stranger in complaint
        assert content(directory) == before, words


def test_a_strangers_file_is_a_finding(cli, stranger):
    """`check` says what the others say, on stdout, and touches as little."""
    before = content(os.path.dirname(stranger))
    code, out, complaint = cli("check", stranger, "--json")
    assert (code, complaint) == (3, "")
    assert problems(out) == ["store"]
    assert content(os.path.dirname(stranger)) == before


@pytest.fixture(params=["cut off", "overwritten", "overwritten in the middle"])
def damaged(request, path):
    """A store after an accident."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [b"%d" % number * 300 for number in range(300)])
    size = os.stat(path).st_size
    with open(path, "r+b") as file:
        if request.param == "cut off":
            file.truncate(size // 2)
        else:
            file.seek(4096 if request.param == "overwritten" else size // 2)
            file.write(b"\xa5" * (size // 4))
    return path


def test_a_damaged_file_is_exit_3_and_never_a_traceback(cli, damaged, spread):
    """What can still be read may be read; whatever can't is one line."""
    codes = set()
    for words in map(spread, READING.values()):
        code, _, complaint = cli(*words)
        assert code in (0, 3) or (words[0], code) == ("dead", 1), words  # nothing there
        assert is_one_line(complaint) == (code == 3), (words, complaint)
        codes.add(code)
    assert 3 in codes


def test_a_damaged_file_is_a_finding(cli, damaged):
    """By the look at the schema, or by SQLite's own check."""
    code, out, complaint = cli("check", damaged, "--json")
    assert (code, complaint) == (3, "")
    assert problems(out) in (["store"], ["integrity"])


def test_a_directory_is_no_database(cli, path):
    """Nor is what lies in one that isn't there."""
    for words in (["push", os.path.dirname(path), "mail", "x"], ["keys", os.path.dirname(path)]):
        code, _, complaint = cli(*words)
        assert (code, is_one_line(complaint)) == (3, True)
    code, _, complaint = cli("push", path + "/none/queue.db", "mail", "x")
    assert (code, is_one_line(complaint)) == (3, True)


# -- check


def findings(out):
    return {finding["subject"]: finding for finding in json.loads(out)["findings"]}


def problems(out):
    found = json.loads(out)
    subjects = [f["subject"] for f in found["findings"] if f["level"] == "problem"]
    assert len(subjects) == found["problems"]
    return subjects


def warnings(out):
    subjects = [f["subject"] for f in json.loads(out)["findings"] if f["level"] == "warning"]
    assert len(subjects) == json.loads(out)["warnings"]
    return [subject for subject in subjects if subject != "sqlite3"]  # the system's, not ours


@pytest.fixture
def sound(path):
    with sqlspace.open(path) as store:
        store.push("mail", b"hello", headers={"from": "me"})
    return path


@pytest.fixture(autouse=True)
def _local_disk(monkeypatch):
    monkeypatch.setattr("sqlspace.checkup.network_file_system", lambda path: None)


def test_a_sound_store_has_no_findings(sound):
    """Exit 0; each thing that was looked at is a line that begins with ok."""
    code, out, complaint = process("check", sound)
    assert (code, complaint) == (0, "")
    lines = [line for line in out.decode().splitlines() if " sqlite3: " not in line]
    assert all(line.startswith("ok ") for line in lines), lines
    code, out, _ = process("check", sound, "--json")
    assert (code, problems(out), warnings(out)) == (0, [], [])
    assert {"SQLite", "file", "file system", "hard links", "permissions", "-wal", "schema"} | {
        "integrity",
        "keys",
        "free pages",
    } <= set(findings(out))


def test_check_changes_nothing(cli, sound):
    """Not a byte, not a file."""
    before = content(os.path.dirname(sound))
    assert cli("check", sound)[0] == 0
    assert content(os.path.dirname(sound)) == before


def test_check_works_beside_those_who_use_the_file(cli, sound):
    """And disturbs nobody."""
    with sqlspace.open(sound) as store:
        store.push("mail", b"two")
        code, out, _ = cli("check", sound, "--json")
        assert (code, problems(out), warnings(out)) == (0, [], [])
        assert store.pull_many("mail", 9) == [b"hello", b"two"]


def test_check_says_that_the_file_is_missing_or_empty(cli, path):
    """And doesn't make it."""
    code, out, _ = cli("check", path, "--json")
    assert (code, problems(out)) == (3, ["file"])
    assert os.listdir(os.path.dirname(path)) == []
    open(path, "xb").close()
    code, out, _ = cli("check", path, "--json")
    assert (code, "store" in problems(out)) == (3, True)
    assert os.stat(path).st_size == 0


def test_check_finds_hard_links_and_does_not_open(cli, sound):
    """Under each name SQLite would keep a -wal of its own."""
    os.link(sound, sound + "-link")
    before = content(os.path.dirname(sound))
    code, out, _ = cli("check", sound, "--json")
    assert (code, problems(out), warnings(out)) == (3, ["hard links"], ["store"])
    assert content(os.path.dirname(sound)) == before


def test_check_finds_a_network_file_system(cli, sound, monkeypatch):
    """A problem; a warning for whoever overrides it."""
    monkeypatch.setattr("sqlspace.checkup.network_file_system", lambda path: "nfs4")
    code, out, _ = cli("check", sound, "--json")
    assert (code, problems(out)) == (3, ["file system"])
    assert "nfs4" in findings(out)["file system"]["text"]
    code, out, _ = cli("check", sound, "--json", "--allow-network")
    assert (code, problems(out), warnings(out)) == (0, [], ["file system"])
    assert "integrity" in findings(out)


@pytest.mark.parametrize(
    ("mode", "level"), [(0o644, "warning"), (0o646, "problem"), (0o640, None), (0o660, None)]
)
def test_check_finds_a_file_that_everybody_may_use(cli, sound, mode, level):
    """To read is a warning, to write a problem; a group is its owner's business."""
    os.chmod(sound, mode)
    code, out, _ = cli("check", sound, "--json")
    assert code == (3 if level == "problem" else 0)
    assert findings(out)["permissions"]["level"] == (level or "ok")


@pytest.mark.parametrize(
    ("mode", "level"), [(0o777, "problem"), (0o1777, "warning"), (0o755, "ok")]
)
def test_check_finds_a_directory_that_everybody_may_write_to(cli, sound, mode, level):
    """Others could replace the file; the sticky bit of /tmp only leaves them to plant one."""
    os.chmod(os.path.dirname(sound), mode)
    code, out, _ = cli("check", sound, "--json")
    assert code == (3 if level == "problem" else 0)
    assert findings(out)["permissions"]["level"] == level


def test_check_finds_a_wal_with_other_permissions(cli, sound):
    """Who may use the database and not its -wal is locked out."""
    with sqlspace.open(sound) as store:
        store.push("mail", b"two")
        os.chmod(sound + "-wal", 0o640)
        code, out, _ = cli("check", sound, "--json")
    assert (code, warnings(out)) == (0, ["permissions"])
    assert "queue.db-wal" in findings(out)["permissions"]["text"]


def test_check_finds_another_owner_of_the_wal(path, monkeypatch):
    """A user who only looked may have left a -wal that the owner can't write."""
    for name in ("", "-wal"):
        open(path + name, "xb").close()
        os.chmod(path + name, 0o600)
    found, others = os.stat(path), os.stat(path + "-wal")
    alien = os.stat_result((*others[:4], 65_432, *others[5:]))
    real = os.stat
    monkeypatch.setattr(
        "sqlspace.checkup.os.stat", lambda p: alien if p == path + "-wal" else real(p)
    )
    (finding,) = sqlspace.checkup._permissions(path, found)
    assert (finding.level, finding.subject) == ("problem", "permissions")
    assert "user 65432" in finding.text


def test_check_finds_a_wal_that_has_grown(cli, sound, monkeypatch):
    """A reader that never ends keeps it from being used again."""
    monkeypatch.setattr("sqlspace.connection._WAL_BYTES", 4000)
    with sqlspace.open(sound) as store:
        store.push("mail", b"two")
        code, out, _ = cli("check", sound, "--json")
    assert (code, warnings(out)) == (0, ["-wal"])


def test_check_finds_keys_that_no_verb_can_name(cli, sound):
    """Entries under them are lost to everybody who doesn't read the table."""
    sql(
        sound,
        "INSERT INTO sqlspace_entries (key, payload, pushed_at) "
        "VALUES (CAST(x'ff' AS TEXT), x'', 1), (CAST(zeroblob(3) AS TEXT), x'', 1)",
    )
    code, out, _ = cli("check", sound, "--json")
    assert (code, problems(out)) == (3, ["keys"])
    assert findings(out)["keys"]["text"].startswith("2 ")
    for name in ("keys", "stats"):
        assert cli(name, sound)[0] == 0
        assert cli(name, sound, "--json")[0] == 0


@pytest.mark.parametrize("headers", ["{from", "", "[]", "5", '{"from": 5}'])
def test_check_finds_headers_that_are_no_json_object_of_strings(cli, sound, headers):
    """And whoever meets them gets exit 3: it is the file that is wrong, not the command."""
    sql(sound, f"UPDATE sqlspace_entries SET headers = '{headers}'")
    code, out, _ = cli("check", sound, "--json")
    assert (code, problems(out)) == (3, ["headers"])
    code, out, complaint = cli("peek", sound, "mail", "--json")
    assert (code, out, is_one_line(complaint)) == (3, b"", True)


def test_check_tells_of_dead_letters(cli, path, buried):
    """A warning that says how to look; exit 0."""
    code, out, _ = cli("check", path, "--json")
    assert (code, warnings(out)) == (0, ["dead letters"])
    text = findings(out)["dead letters"]["text"]
    assert text.startswith("3, most of them of 'mail': sqlspace dead ")
    cli("dead", path, "mail", "--drop")
    assert warnings(cli("check", path, "--json")[1]) == []


def test_check_does_not_move_the_dead(cli, path):
    """What died and isn't moved yet is counted, and not a byte changes."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [b"x", b"y"])
        store.claim_many("mail", 2, lease=0.001, max_attempts=1)
        until(lambda: not store.len("mail"))
    before = content(os.path.dirname(path))
    code, out, _ = cli("check", path, "--json")
    assert (code, warnings(out)) == (0, ["dead letters"])
    assert findings(out)["dead letters"]["text"].startswith("2, ")
    assert content(os.path.dirname(path)) == before


def test_check_finds_what_was_planted(cli, sound):
    """A trigger on our tables could eat entries."""
    sql(
        sound,
        "CREATE TRIGGER thief AFTER INSERT ON sqlspace_entries BEGIN "
        "DELETE FROM sqlspace_entries; END",
    )
    code, out, _ = cli("check", sound, "--json")
    assert (code, problems(out)) == (3, ["store"])
    assert "thief" in findings(out)["store"]["text"]


def test_check_finds_much_free_room(cli, sound):
    """More than half of a large file: compact gives it back."""
    with sqlspace.open(sound) as store:
        store.push_many("big", [bytes(100_000)] * 30)
        store.pull_many("big", 30)
    code, out, _ = cli("check", sound, "--json")
    assert (code, warnings(out)) == (0, ["free pages"])
    assert cli("compact", sound)[0] == 0
    assert warnings(cli("check", sound, "--json")[1]) == []


@pytest.mark.parametrize(
    ("script", "level"),
    [
        ("echo 3.40.1 2022-12-28", "warning"),
        ("echo 3.51.2 2026-01-01", "warning"),
        ("echo 3.51.3 2026-03-01", "ok"),
        ("echo 4.0 2030-01-01", "ok"),
        ("echo what", "warning"),
        ("exit 1", "warning"),
        (None, None),
    ],
)
def test_check_tells_of_the_sqlite3_program(cli, sound, tmp_path, monkeypatch, script, level):
    """One before 3.51.3 has the WAL-reset bug, and its user must know what to say."""
    programs = tmp_path / "bin"
    programs.mkdir()
    if script is not None:
        (programs / "sqlite3").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "sqlite3").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    code, out, _ = cli("check", sound, "--json")
    assert code == 0
    assert findings(out).get("sqlite3", {}).get("level") == level
    assert "wal_autocheckpoint=0" in findings(out)["SQLite"]["text"]


# -- the program itself


def test_each_command_has_an_example(cli):
    """--help says what it does, and shows it."""
    code, out, _ = cli("--help")
    assert code == 0
    assert sorted(sqlspace.cli.commands.commands) == NAMES
    for name in NAMES:
        assert f"  {name} " in out.decode()
        code, text, _ = cli(name, "--help")
        assert code == 0
        assert f"sqlspace {name} " in text.decode().partition("Examples:")[2]


def test_the_version_is_told(cli):
    """Whoever reports a bug can say which."""
    code, out, _ = cli("--version")
    assert code == 0
    assert re.fullmatch(rb"sqlspace, version \d+\.\d+\S*\n", out)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    """Exit 2, and no traceback."""
    program = (
        f"import sys; sys.modules['{missing}'] = None\nfrom sqlspace.__main__ import main\nmain()"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (2, b"")
    assert is_one_line(done.stderr.decode())
    assert b"pip install 'sqlspace[cli]'" in done.stderr


def test_the_core_imports_neither_click_nor_rich():
    """They are an extra; what `check` finds can be had without it."""
    program = (
        "import sys, sqlspace.checkup; print([m for m in ('click', 'rich') if m in sys.modules])"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=SECONDS)
    assert done.stdout == b"[]\n"


def test_peek_takes_a_limit_of_any_size(cli, path):
    """As pull does."""
    with sqlspace.open(path) as store:
        store.push_many("mail", [b"1", b"2"])
    assert cli("peek", path, "mail", "--limit", 1 << 64) == (0, b"1\n2\n", "")


@pytest.mark.parametrize("micros", [(1 << 62) - 1, -(1 << 62)])
def test_a_time_that_no_calendar_has_is_told_in_seconds(cli, path, micros):
    """Somebody's SQL may have written it; it was taken for misuse."""
    with sqlspace.open(path) as store:
        store.push("mail", b"x")
        store.pull("mail")
        database = apsw.Connection(path)
        database.execute("UPDATE sqlspace_entries SET pushed_at = ?", (micros,))
        database.close()
    code, told, _ = cli("history", path, "mail")
    assert code == 0
    assert told.split(b"\t")[2] == f"{micros / 1e6:.6f}".encode()
