"""`sqlspace pull --lease SECONDS -- COMMAND`: what a command settles, and what ends it.

Our side runs in a process of its own wherever signals and streams are asked for.
"""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile

import pytest
from children import PATIENCE_SECONDS, eventually
from click.testing import CliRunner

import sqlspace
import sqlspace.cli
import sqlspace.cli.running
import sqlspace.programs

EVERY_BYTE = bytes(range(256))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


@pytest.fixture
def cli():
    """Run a command in this process: exit code, and stderr."""

    def run(*words):
        result = CliRunner().invoke(sqlspace.cli.commands, [str(word) for word in words])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.stderr

    return run


def command(path, *words, lease=60):
    first = (sys.executable, "-m", "sqlspace", "pull", path, "mail", "--lease", lease)
    return [str(word) for word in (*first, *words)]


@pytest.fixture
def process(path):
    """Run a pull in a process of its own: exit code, stdout, stderr."""

    def run(*words, **options):
        options = {"stdin": subprocess.DEVNULL, "timeout": PATIENCE_SECONDS, **options}
        done = subprocess.run(command(path, *words), capture_output=True, check=False, **options)
        return done.returncode, done.stdout, done.stderr.decode()

    return run


@pytest.fixture
def started(path):
    """Start a pull whose signals are those of a shell's foreground."""
    processes = []

    def start(*words, lease=60, **options):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                command(path, *words, lease=lease),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,
                **options,
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


def lines(complaint):
    found = complaint.splitlines()
    assert all(line.startswith("sqlspace: ") for line in found), found
    return [line.removeprefix("sqlspace: ") for line in found]


def seen(store):
    return [(entry.payload, entry.state, entry.attempts) for entry in store.entries("mail")]


def outcomes(store):
    return [stone.outcome for stone in store.history("mail")]


# -- what a command gets, and what becomes of the entry


def test_a_command_that_succeeds_acks_and_its_output_is_ours(store, process):
    """The payload is its stdin, byte for byte; what it writes isn't touched."""
    store.push("mail", EVERY_BYTE * 5000)
    assert process("--", "cat") == (0, EVERY_BYTE * 5000, "")
    assert seen(store) == []
    assert outcomes(store) == ["acked"]


def test_a_command_knows_its_entry(store, process):
    """Key, number, attempts and headers, in UTF-8 whatever the locale."""
    key = "grüße 🗝"
    headers = {"from": "mé", "line": "a\nb\x00"}
    seq = store.push("mail", b"", headers=headers)
    store.claim("mail").nack()
    program = (
        "import os, json; e = os.environb; print(json.dumps([e[b'SQLSPACE_' + n].decode() "
        "for n in (b'KEY', b'SEQ', b'ATTEMPTS', b'HEADERS')]))"
    )
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, _ = process("--", sys.executable, "-c", program, env=locale)
    assert code == 0
    name, number, attempts, told = json.loads(out)
    assert (name, number, attempts, json.loads(told)) == ("mail", str(seq), "2", headers)
    store.push(key, b"")
    words = [sys.executable, "-m", "sqlspace", "pull", store.path, key, "--lease", "9", "--"]
    shell = ["sh", "-c", 'printf %s "$SQLSPACE_KEY$SQLSPACE_HEADERS"']
    done = subprocess.run([*words, *shell], capture_output=True, check=True, env=locale)
    assert done.stdout == (key + "{}").encode()


def test_a_command_that_fails_nacks_and_says_why(store, process):
    """Its own code is a line on stderr, ours is 123; the entry comes back after a second."""
    seq = store.push("mail", b"x")
    code, out, complaint = process("--", "sh", "-c", "echo half; exit 5")
    assert (code, out) == (123, b"half\n")
    assert lines(complaint) == [f"entry {seq} of 'mail', attempt 1: sh ended with 5"]
    (entry,) = store.entries("mail")
    assert (entry.state, entry.attempts) == ("delayed", 1)
    assert process("--", "true") == (1, b"", "")
    assert process("--timeout", "60", "--", "true") == (0, b"", "")


def test_a_command_that_dies_nacks(store, process):
    """The signal has a name."""
    store.push("mail", b"x")
    code, _, complaint = process("--retry-delay", "0", "--", "sh", "-c", "kill -KILL $$")
    assert code == 123
    assert lines(complaint)[0].endswith(": sh was ended by SIGKILL")
    assert seen(store) == [(b"x", "ready", 1)]


def test_a_failed_entry_waits_out_the_retry_delay(store, process):
    """As long as told."""
    store.push("mail", b"x")
    process("--retry-delay", "1000", "--", "false")
    (entry,) = store.entries("mail")
    assert entry.state == "delayed"
    assert entry.due_at > sqlspace.clock.now() / 1e6 + 900


def test_after_the_last_attempt_the_entry_is_a_dead_letter(store, process):
    """--max-attempts as the library has it, and a line that tells of it."""
    store.push("mail", b"x")
    options = ("--retry-delay", "0", "--max-attempts", "2", "--", "false")
    assert process(*options)[0] == 123
    code, _, complaint = process(*options)
    assert code == 123
    assert "dead after 2 attempts" in lines(complaint)[1]
    assert process(*options) == (1, b"", "")
    (letter,) = store.entries("mail/dead")
    assert letter.payload == b"x"


def test_a_command_that_does_not_read_is_no_failure(store, process):
    """Not even of a payload that is larger than a pipe."""
    store.push("mail", bytes(3_000_000))
    assert process("--", "true") == (0, b"", "")
    store.push("mail", bytes(3_000_000))
    assert process("--", "sh", "-c", "exec <&-") == (0, b"", "")
    assert outcomes(store) == ["acked", "acked"]


def test_a_background_child_of_a_command_keeps_nobody_waiting(store, process, tmp_path):
    """What has inherited its stdin and reads it never is not waited for."""
    store.push("mail", bytes(3_000_000))
    script = f"sleep 1000 >&- 2>&- & echo $! > {shlex.quote(str(tmp_path / 'pid'))}"
    try:
        assert process("--", "sh", "-c", script) == (0, b"", "")
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_command_fails_even_if_its_parent_ignores_the_end_of_children(store, process):
    """Where SIGCHLD is ignored the kernel forgets the exit code, and Python takes that for 0."""
    store.push("mail", b"x")
    code, _, _ = process(
        "--", "sh", "-c", "exit 5", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    )
    assert code == 123
    assert outcomes(store) == []


def test_a_command_has_the_signals_of_a_shell(store, process):
    """A command whose output nobody reads is ended by SIGPIPE, as everywhere."""
    store.push("mail", b"x")
    _, out, _ = process(
        "--", sys.executable, "-c", "import signal; print(open('/proc/self/status').read())"
    )
    ignored = int(re.search(rb"SigIgn:\s*(\w+)", out)[1], 16)
    # Python itself ignores SIGPIPE and SIGXFSZ when it starts; that it could be seen is the point.
    assert not ignored & (1 << (signal.SIGTERM - 1) | 1 << (signal.SIGCHLD - 1))


# -- how many


def test_all_is_each_entry_once_and_goes_on_after_a_failure(store, process):
    """One that fails and comes back at once is no endless loop."""
    store.push_many("mail", [b"1", b"bad", b"3"])
    script = 'read -r line; echo "$line"; test "$line" != bad'
    code, out, complaint = process("--all", "--", "sh", "-c", script)
    assert (code, out) == (123, b"1\nbad\n3\n")
    assert len(lines(complaint)) == 1
    assert seen(store) == [(b"bad", "delayed", 1)]


def test_all_ends_though_what_fails_is_ready_at_once(store, process):
    """So often as there were entries, and no oftener."""
    store.push_many("mail", [b"1", b"2", b"3"])
    code, _, complaint = process("--all", "--retry-delay", "0", "--", "false")
    assert (code, len(lines(complaint))) == (123, 3)
    assert seen(store)[0] == (b"1", "ready", 3)


def test_a_limit_counts_commands(store, process):
    """And exit 0 says that all of them succeeded."""
    store.push_many("mail", [b"1\n", b"2\n", b"3\n"])
    assert process("--limit", "2", "--", "cat") == (0, b"1\n2\n", "")
    assert process("-n", "2", "--", "cat") == (0, b"3\n", "")
    assert process("-n", "2", "--", "cat") == (1, b"", "")


def test_ordered_stops_at_what_failed(store, process):
    """No entry runs before an earlier one is done."""
    store.push_many("mail", [b"1", b"2"])
    code, _, complaint = process("--all", "--ordered", "--", "false")
    assert (code, len(lines(complaint))) == (123, 1)
    assert [attempts for _, _, attempts in seen(store)] == [1, 0]


def test_a_worker_goes_on_until_it_is_told_to_end(store, started):
    """--all --wait, over entries that come later; SIGTERM while it waits is a quiet exit 143."""
    store.push("mail", b"1\n")
    worker = started("--all", "--wait", "--", "cat")
    assert worker.stdout.readline() == b"1\n"
    store.push_many("mail", [b"2\n", b"3\n"])
    assert [worker.stdout.readline(), worker.stdout.readline()] == [b"2\n", b"3\n"]
    eventually(lambda: outcomes(store) == ["acked"] * 3)
    worker.terminate()
    assert ended(worker) == (143, b"", "")


def test_a_timeout_is_that_of_each_wait(store, process):
    """It ends when nothing has come for so long; 0 if something was done, 1 if not."""
    store.push_many("mail", [b"1\n", b"2\n"])
    assert process("--all", "--timeout", "0.01", "--", "cat") == (0, b"1\n2\n", "")
    assert process("--all", "--timeout", "0.01", "--", "cat") == (1, b"", "")


# -- leases


def test_the_lease_is_renewed_while_the_command_runs(store, started, tmp_path):
    """For longer than it is, and nobody else gets the entry."""
    store.push("mail", b"x")
    go = tmp_path / "go"
    script = f"while ! test -e {shlex.quote(str(go))}; do sleep 0.01; done"
    puller = started("--", "sh", "-c", script, lease=3)

    def deadline():
        (entry,) = store.entries("mail")
        return entry.deadline

    first = eventually(deadline)
    eventually(lambda: deadline() > first + 0.9)
    assert store.pullp("mail") is None
    go.touch()
    assert ended(puller) == (0, b"", "")
    assert outcomes(store) == ["acked"]


@pytest.mark.parametrize("code", [0, 5])
def test_a_lease_that_was_lost_is_one_line_and_exit_3(store, process, code):
    """Whatever the command did: another may have done it too."""
    store.push("mail", b"x")
    program = (
        "import sqlspace, os, sys\n"
        "with sqlspace.open(sys.argv[1]) as store:\n"
        "    store.remove('mail', int(os.environ['SQLSPACE_SEQ']))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    words = (sys.executable, "-c", program, store.path, str(code))
    found, out, complaint = process("--all", "--", *words)
    assert (found, out) == (3, b"")
    told = [line for line in lines(complaint) if "ended with 5" not in line]
    assert len(told) == 1
    assert "lease of entry 1 of 'mail' is lost" in told[0]


def test_a_lost_lease_is_told_once_though_its_renewal_saw_it_first(store, started, tmp_path):
    """The library's own line is left out, since the settling says the same."""
    store.push("mail", b"x")
    go = tmp_path / "go"
    script = f"while ! test -e {shlex.quote(str(go))}; do sleep 0.01; done"
    log = "-c", LOGGING, store.path, script
    puller = subprocess.Popen(
        [sys.executable, *log], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with puller:
        eventually(lambda: [state for _, state, _ in seen(store)] == ["leased"])
        store.clear("mail")
        assert puller.stdout.readline() == b"lost\n"
        go.touch()
        code, _, complaint = ended(puller)
    assert (code, len(lines(complaint))) == (3, 1)


LOGGING = """
import logging, sys
import sqlspace.cli

class Tell(logging.Handler):
    def emit(self, record):
        if "is lost" in record.getMessage():
            print("lost", flush=True)

logging.getLogger("sqlspace").addHandler(Tell())
path, script = sys.argv[1:]
sys.argv[1:] = ["pull", path, "mail", "--lease", "0.1", "--", "sh", "-c", script]
sqlspace.cli.run()
"""


# -- signals

WAITS = "echo ready; while :; do sleep 0.01; done"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_command_and_gives_its_entry_back(store, started, number, code):
    """Sent to us alone; SIGINT waits a moment, for a terminal would have sent it to both."""
    store.push("mail", b"x")
    puller = started("--all", "--wait", "--", "sh", "-c", WAITS)
    assert puller.stdout.readline() == b"ready\n"
    puller.send_signal(number)
    assert ended(puller) == (code, b"", "")
    assert seen(store) == [(b"x", "ready", 1)]


def test_a_terminals_ctrl_c_reaches_both(store, started):
    """The command may end in its own way, and its entry is given back though it exits with 0."""
    store.push("mail", b"x")
    script = f"trap 'echo mine; exit 0' INT TERM; {WAITS}"
    puller = started("--", "sh", "-c", script)
    assert puller.stdout.readline() == b"ready\n"
    os.killpg(puller.pid, signal.SIGINT)
    assert ended(puller) == (130, b"mine\n", "")
    assert seen(store) == [(b"x", "ready", 1)]


def test_a_command_that_exits_with_0_when_it_is_ended_is_not_done(store, started):
    """Many do so, done or not; the work is rather done twice."""
    store.push("mail", b"x")
    puller = started("--", "sh", "-c", f"trap 'exit 0' TERM; {WAITS}")
    assert puller.stdout.readline() == b"ready\n"
    puller.terminate()
    assert ended(puller)[0] == 143
    assert seen(store) == [(b"x", "ready", 1)]


def test_a_second_ctrl_c_ends_a_command_that_will_not_end(cli, path, store, monkeypatch):
    """At once, and by force."""
    monkeypatch.setattr(sqlspace.cli.running, "_PATIENCE_SECONDS", 1000)
    store.push("mail", b"x")
    script = f"trap '' INT TERM; while kill -INT {os.getpid()}; do sleep 0.01; done"
    code, complaint = cli("pull", path, "mail", "--lease", "60", "--", "sh", "-c", script)
    assert (code, complaint) == (130, "")
    assert seen(store) == [(b"x", "ready", 1)]


def test_after_ctrl_c_a_command_has_time_to_end_by_itself(cli, path, store, tmp_path, monkeypatch):
    """It is not told to terminate at once, while it is at it."""
    monkeypatch.setattr(sqlspace.cli.running, "_PATIENCE_SECONDS", 1000)
    store.push("mail", b"x")
    told = tmp_path / "told"
    script = f"trap 'echo > {told}' TERM; kill -INT {os.getpid()}; sleep 0.1; exit 0"
    code, complaint = cli("pull", path, "mail", "--lease", "60", "--", "sh", "-c", script)
    assert (code, complaint) == (130, "")
    assert seen(store) == [(b"x", "ready", 1)]
    assert not told.exists()


def test_a_command_that_will_not_end_is_killed_in_the_end(cli, path, store, monkeypatch):
    """Some time after it was told; nobody waits for ever."""
    monkeypatch.setattr(sqlspace.cli.running, "_GRACE_SECONDS", 0.05)
    store.push("mail", b"x")
    script = f"trap '' TERM; kill -TERM {os.getpid()}; {WAITS}"
    code, complaint = cli("pull", path, "mail", "--lease", "60", "--", "sh", "-c", script)
    assert (code, complaint) == (143, "")
    assert seen(store) == [(b"x", "ready", 1)]


def test_what_is_to_be_ignored_stays_ignored(store, started):
    """As nohup and a shell's & ask for, of us and of the command."""
    store.push("mail", b"x")
    puller = started(
        *("--", "sh", "-c", "echo ready; read -r line; sleep 0.05; echo done"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert puller.stdout.readline() == b"ready\n"
    os.killpg(puller.pid, signal.SIGHUP)
    assert ended(puller) == (0, b"done\n", "")


def test_a_killed_puller_loses_nothing(store, started):
    """A kill -9 leaves the lease, and the entry comes back when it is over."""
    store.push("mail", b"x")
    puller = started("--", "sh", "-c", WAITS, lease=0.3)
    assert puller.stdout.readline() == b"ready\n"
    os.killpg(puller.pid, signal.SIGKILL)
    assert store.pull("mail", PATIENCE_SECONDS) == b"x"


def test_the_handlers_are_those_from_before(cli, path, store):
    """Whoever calls the command line from a program of his own has his own signals again."""
    store.push("mail", b"x")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    assert cli("pull", path, "mail", "--lease", "60", "--", "true")[0] == 0
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


# -- what can't be started


@pytest.mark.parametrize("name", ["no-such-program", "/no/such/program", "/etc/passwd", "/tmp"])
def test_a_program_that_is_not_there_is_misuse_and_nothing_is_touched(cli, path, store, name):
    """Looked for before an entry is claimed: it costs no attempt."""
    store.push("mail", b"x")
    code, complaint = cli("pull", path, "mail", "--lease", "60", "--", name)
    assert (code, len(lines(complaint))) == (2, 1)
    assert name in complaint
    assert seen(store) == [(b"x", "ready", 0)]


def test_a_program_that_turns_out_to_be_none_is_misuse_and_nacked(cli, path, store, tmp_path):
    """A file that may be executed and can't be; --all --wait doesn't go on with it."""
    fake = tmp_path / "fake"
    fake.write_bytes(b"\x00\x01")
    fake.chmod(0o755)
    store.push("mail", b"x")
    code, complaint = cli("pull", path, "mail", "--lease", "60", "--all", "--wait", "--", fake)
    assert (code, len(lines(complaint))) == (2, 1)
    assert os.fspath(fake) in complaint
    assert seen(store) == [(b"x", "ready", 1)]


def test_headers_that_are_too_large_for_a_process_are_that_entrys_failure(cli, path, store):
    """It is given back, and in the end a dead letter; a worker goes on."""
    store.push("mail", b"x", headers={"large": "x" * 3_000_000})
    store.push("mail", b"y")
    words = ("--lease", "60", "--all", "--max-attempts", "1", "--", "true")
    code, complaint = cli("pull", path, "mail", *words)
    assert code == 123
    assert "headers" in complaint
    assert seen(store) == []
    assert store.len("mail/dead") == 1


def test_a_machine_that_starts_no_process_is_exit_3_and_nacked(cli, path, store, monkeypatch):
    """It isn't the program's fault, nor the user's."""
    store.push("mail", b"x")

    def fail(*arguments, **options):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(sqlspace.cli.running.subprocess, "Popen", fail)
    code, complaint = cli("pull", path, "mail", "--lease", "60", "--", "cat")
    assert (code, complaint) == (3, f"sqlspace: cat: {os.strerror(errno.EAGAIN)}\n")
    assert seen(store) == [(b"x", "ready", 1)]


def test_a_disk_with_no_room_for_stdin_is_exit_3_and_nacked(cli, path, store, monkeypatch):
    """The line names the directory."""
    store.push("mail", bytes(100_000))
    monkeypatch.setattr(
        sqlspace.programs.tempfile,
        "TemporaryFile",
        lambda: open("/dev/full", "w+b"),  # noqa: SIM115
    )
    code, complaint = cli("pull", path, "mail", "--lease", "60", "--", "cat")
    assert (code, len(lines(complaint))) == (3, 1)
    assert tempfile.gettempdir() in complaint
    assert [state for _, state, _ in seen(store)] == ["ready"]


@pytest.mark.parametrize(
    "words",
    [
        ["cat"],
        ["--", "cat"],
        ["--ordered"],
        ["--max-attempts", "3"],
        ["--retry-delay", "3"],
        ["--lease", "60"],
        ["--lease", "60", "cat"],
        ["--lease", "60", "cat", "--", "x"],
        ["--lease", "60", "--json", "--", "cat"],
        ["--lease", "0", "--", "cat"],
        ["--lease", "-1", "--", "cat"],
        ["--lease", "inf", "--", "cat"],
        ["--lease", "nan", "--", "cat"],
        ["--lease", "60", "--max-attempts", "0", "--", "cat"],
        ["--lease", "60", "--retry-delay", "inf", "--", "cat"],
        ["--lease", "60", "--retry-delay", "-1", "--", "cat"],
        ["--lease", "60", "--", "no-such-program"],
        ["--lease", "60", "--", ""],
    ],
    ids=" ".join,
)
def test_misuse_is_one_line_and_makes_no_file(cli, path, words):
    """All of it is checked before the file is touched."""
    code, complaint = cli("pull", path, "mail", *words)
    assert (code, len(lines(complaint))) == (2, 1)
    assert not os.path.exists(path)


def test_attempts_need_a_key_that_can_have_dead_letters(cli, path):
    """Checked before the file is touched."""
    words = ("--lease", "60", "--max-attempts", "3", "--", "cat")
    code, complaint = cli("pull", path, "k" * 1020, *words)
    assert (code, len(lines(complaint))) == (2, 1)
    assert not os.path.exists(path)


def test_options_of_the_command_are_its_own(store, process):
    """Behind the dashes nothing is ours, further dashes neither."""
    store.push("mail", b"x")
    words = ("--", "sh", "-c", 'echo "$@"', "sh", "--json", "--", "--all", "-h")
    assert process(*words) == (0, b"--json -- --all -h\n", "")
