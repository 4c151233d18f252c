"""The command line: each command is a few verbs of a Store, made fit for a shell.

Here stand those that change something; those that only look are in `looking`.

Only `push` makes a store; the others refuse a file that holds none. What is given on the command
line is checked before the file is touched.

Every command but `pull` and `forward` opens the store with history=None: of several open stores the
smallest history counts, and to look must not cut the history of an application that keeps more.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

import click

from sqlspace import dead_letters, rules
from sqlspace.arguments import ROW_BYTES, check_headers, check_size
from sqlspace.errors import DeadlineError, SpaceError
from sqlspace.pushing import Batch
from sqlspace.records import Entry
from sqlspace.store import Store, open, open_existing

from . import forwarding, looking, options, running, terminal

__all__ = ["commands", "run"]

# A batch of `pull --all` is lost if nobody reads it any more, and stands in memory: no more
# payloads than this, and one at a time if they are larger than that.
_BATCH_ENTRIES = 256
_BATCH_BYTES = 1 << 20


def run() -> None:
    """What the program does; ends by `SystemExit`."""
    terminal.prepare()
    commands.main(prog_name="sqlspace")


@click.group(
    "sqlspace",
    cls=terminal.Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=options.examples("sqlspace push queue.db mail 'hello'", "sqlspace pull queue.db mail")
    + "\n\nExit codes: 0 done, 1 nothing there or timed out, 2 misuse, 3 the store failed; "
    "130 after Ctrl-C, 141 when nobody reads the output any more.",
)
@click.version_option(package_name="sqlspace")
@click.pass_context
def commands(context: click.Context) -> None:
    """Queues in one SQLite file: keys with entries, first in, first out.

    Any number of programs may use the file at the same time.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(terminal.MISUSE)


@commands.command(
    epilog=options.examples(
        "sqlspace push queue.db mail 'hello' --header from=me",
        "tail -f app.log | sqlspace push queue.db log --lines",
    )
)
@options.database
@options.key
@click.argument("payload", required=False)
@click.option(
    "--header",
    "headers",
    metavar="NAME=VALUE",
    multiple=True,
    callback=options.checked(options.named_headers),
    help="Repeatable.",
)
@click.option("--lines", is_flag=True, help="Push each line of stdin, without its newline.")
@options.timing
@click.option(
    "--dedupe",
    callback=options.checked(options.name),
    metavar="TEXT",
    help="Add nothing if KEY holds an entry with this TEXT, or held one that the file remembers.",
)
@click.option(
    "--max-len",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Wait until KEY holds fewer entries, for ever unless told --timeout.",
)
@click.option(
    "--timeout",
    type=float,
    callback=options.checked(options.seconds),
    metavar="SECONDS",
    help="With --max-len: wait so long at most, then exit 1.",
)
@click.option("--seq", "tell", is_flag=True, help="Write the entry's number.")
@click.option("--no-sync", is_flag=True, help="Faster; a power cut may lose the newest entries.")
@options.opening
def push(
    *,
    database: str,
    key: str,
    payload: str | None,
    headers: dict[str, str],
    lines: bool,
    ttl: float | None,
    delay: float | None,
    dedupe: str | None,
    max_len: int | None,
    timeout: float | None,
    tell: bool,
    no_sync: bool,
    opening: dict[str, Any],
) -> None:
    """Add an entry behind all others of KEY.

    Makes DATABASE if it isn't there.

    Without PAYLOAD it is stdin, whole, as it is: a newline at its end belongs to it. A PAYLOAD that
    begins with a dash stands after --. Writes nothing, unless told --seq.

    With --lines what has come by now goes into one transaction, so a slow source is pushed line by
    line and a fast one in large batches; if one fails, those before it are in.
    """
    single = payload, dedupe, max_len
    if lines and (headers or any(option is not None for option in single)):
        raise click.UsageError(
            "--lines reads stdin, and goes with none of PAYLOAD, --header, --dedupe, --max-len"
        )
    if timeout is not None and max_len is None:
        raise click.UsageError("--timeout bounds the wait for room, and needs --max-len")
    Batch.checked(key, [], ttl, delay)  # before stdin is read, which may take long
    source = terminal.source() if payload is None else None
    data = b""
    if not lines:
        data = os.fsencode(payload or "") if source is None else source.read(ROW_BYTES + 1)
        check_size(key, data, check_headers(headers))
    with open(database, sync=not no_sync, history=None, **opening) as store:
        if lines:
            _push_lines(store, key, ttl, delay, tell=tell)
            return
        seq = store.push(
            key,
            data,
            headers=headers,
            dedupe=dedupe,
            max_len=max_len,
            timeout=timeout,
            ttl=ttl,
            delay=delay,
        )
        if tell:
            terminal.write_line(str(seq))


def _push_lines(
    store: Store, key: str, ttl: float | None, delay: float | None, *, tell: bool
) -> None:
    done = 0
    try:
        for batch in terminal.lines():
            seqs = store.push_many(key, batch, ttl=ttl, delay=delay)
            done += len(batch)
            if tell:
                terminal.write_line("\n".join(map(str, seqs)))
    except (SpaceError, ValueError) as error:
        if done:
            error.args = (f"{error}; the first {done:,} lines were pushed", *error.args[1:])
        raise


@commands.command(
    cls=options.CommandWithProgram,
    epilog=options.examples(
        "sqlspace pull queue.db mail --timeout 10 > message",
        "sqlspace pull queue.db jobs --all --json | jq -r .payload",
        "sqlspace pull queue.db mail --lease 60 -- sendmail -t",
        "sqlspace pull queue.db jobs --lease 60 --all --wait --max-attempts 5 -- ./work",
        "sqlspace pull queue.db jobs --lease 60 -- sh -c 'cat > job-$SQLSPACE_SEQ'",
    ),
)
@options.database
@options.key
@click.option("--wait", is_flag=True, help="Wait for an entry, for ever unless told --timeout.")
@click.option(
    "--timeout",
    type=float,
    callback=options.checked(options.seconds),
    metavar="SECONDS",
    help="Wait for one, so many seconds at most.",
)
@options.many
@options.leasing
@options.history
@options.as_json
@options.opening
def pull(
    *,
    database: str,
    key: str,
    argv: list[str],
    wait: bool,
    timeout: float | None,
    limit: int | None,
    terms: running.Terms | None,
    history: int | None,
    as_json: bool,
    opening: dict[str, Any],
) -> None:
    """Take the first entry of KEY, or run COMMAND for it.

    Writes its payload as it is, with no newline behind it.

    Never waits unless told --wait or --timeout: if nothing is there, exit 1. With --limit or --all
    it waits for the first only, and takes what is there then. With --json a line for each.

    An entry that was taken is out of the file. One that can't be written (the disk is full, nobody
    reads the pipe, Ctrl-C) is put back; with --limit and --all a batch of 1 MB or 256 entries may
    be lost then.

    With --lease the entry stays in the file until COMMAND, which stands after --, has ended with 0.
    The payload is its stdin; SQLSPACE_KEY, SQLSPACE_SEQ, SQLSPACE_ID (the same each time),
    SQLSPACE_ATTEMPTS (1 the first time) and SQLSPACE_HEADERS (a JSON object) are in its
    environment. The lease is renewed while it runs.
    When it fails, its code is a line on stderr, the entry is ready again after --retry-delay, and
    we go on with the next of --limit or --all. Ctrl-C and SIGTERM end it too, and give its entry
    back. To wait is to wait for each entry: --all --wait goes on for ever.

    Exit codes with --lease: 0 all succeeded, 1 nothing was there, 123 some COMMAND failed; 2 it
    can't be started, or 3 its lease was lost or the store failed, and both end it at once; 143
    after SIGTERM.
    """
    if terms is not None and as_json:
        raise click.UsageError("--json writes, and doesn't go with --lease")
    seconds = timeout if wait or timeout is not None else 0.0
    with open_existing(database, history=history, **opening) as store:
        if terms is not None:
            code = running.run_for_entries(
                store, key, argv, terms, limit=limit or 1, seconds=seconds
            )
            click.get_current_context().exit(code)
        elif limit is None:
            _pull_one(store, key, seconds, as_json=as_json)
        else:
            if seconds != 0:
                store.wait(key, seconds)
            _pull_many(store, key, limit, as_json=as_json)


def _pull_one(store: Store, key: str, seconds: float | None, *, as_json: bool) -> None:
    terminal.writable()
    grab = store._wait_and_take([key], seconds, None)  # noqa: SLF001  # pull, but able to go back
    payload = grab.head.payload
    try:
        terminal.write(_in_json(key, payload) + b"\n" if as_json else payload)
    except BaseException:
        grab.restore()
        raise


def _pull_many(store: Store, key: str, limit: int, *, as_json: bool) -> None:
    taken, batch = 0, 1
    while taken < limit:
        terminal.writable()
        payloads = store.pull_many(key, min(batch, limit - taken))
        if not payloads:
            break
        taken += len(payloads)
        lines = [_in_json(key, payload) for payload in payloads] if as_json else payloads
        terminal.write(b"".join(line + b"\n" for line in lines))
        # What comes next is guessed from what came last.
        small = sum(map(len, payloads)) < _BATCH_BYTES // 2
        batch = min(2 * batch, _BATCH_ENTRIES) if small else 1
    if not taken:
        raise DeadlineError


def _in_json(key: str, payload: bytes) -> bytes:
    return json.dumps({"key": key, **terminal.spelled(payload)}, ensure_ascii=False).encode()


@commands.command(
    epilog=options.examples(
        "sqlspace dead queue.db mail",
        "sqlspace dead queue.db mail --requeue",
        "sqlspace dead queue.db mail --drop --seq 17",
        "sqlspace dead queue.db mail --json | jq -r .payload",
    )
)
@options.database
@options.key
@click.option("--requeue", is_flag=True, help="Move all to the end of the keys they came from.")
@click.option("--drop", is_flag=True, help="Delete all, or the one of --seq.")
@click.option("--seq", type=click.IntRange(min=1), metavar="NUMBER", help="Only this one.")
@options.as_json
@options.opening
def dead(
    *,
    database: str,
    key: str,
    requeue: bool,
    drop: bool,
    seq: int | None,
    as_json: bool,
    opening: dict[str, Any],
) -> None:
    """List the dead letters of KEY, which stand under KEY/dead.

    The oldest first; if there are none, exit 1. A line for each, with tabs between: its number,
    where it was (key and number), attempts, when it died (UTC), why, and how its payload begins.
    With --json an object each, and all of the payload.

    --requeue and --drop write how many they moved or deleted, 0 included; --drop --seq exits 1 if
    there is none of that number.
    """
    if requeue and (drop or seq is not None):
        raise click.UsageError("--requeue moves all, and goes with neither --drop nor --seq")
    if as_json and (requeue or drop):
        raise click.UsageError("--json lists, and goes with neither --requeue nor --drop")
    under = rules.dead_key(key)
    if under is None:
        raise click.UsageError("KEY is too long to have dead letters")
    with open_existing(database, history=None, **opening) as store:
        if requeue:
            terminal.write_line(str(store.requeue(key)))
        elif drop and seq is None:
            terminal.write_line(str(store.clear(under)))
        elif drop:
            _drop_one(store, under, seq or 0)
        elif seq is None:
            _list_dead(store.entries(under), as_json=as_json)
        else:
            letter = store.get(under, seq)
            _list_dead([letter] if letter else [], as_json=as_json)


def _drop_one(store: Store, under: str, seq: int) -> None:
    dropped = store.remove(under, seq)
    terminal.write_line(str(int(dropped)))
    if not dropped:
        raise DeadlineError


def _list_dead(letters: Iterable[Entry], *, as_json: bool) -> None:
    found = False
    for letter in letters:
        found = True
        if as_json:
            terminal.write_entry(letter)
            continue
        told = letter.headers.get  # nothing of it, if somebody pushed it here
        origin = f"{told(dead_letters.ORIGIN_KEY, '-')} {told(dead_letters.ORIGIN_SEQ, '-')}"
        died = terminal.moment(letter.pushed_at)
        columns = [str(letter.seq), origin, told(dead_letters.ORIGIN_ATTEMPTS, "-"), died]
        columns += [told(dead_letters.ORIGIN_REASON, "-"), terminal.shortened(letter.payload)]
        terminal.write_line("\t".join(map(terminal.printable, columns)))
    if not found:
        raise DeadlineError


@commands.command(epilog=options.examples("sqlspace compact queue.db"))
@options.database
@options.as_json
@options.opened
def compact(*, store: Store, as_json: bool) -> None:
    """Make the file as small as it can be.

    Forgets the history, and gives free pages back to the system. Safe at any time; others wait
    meanwhile, about 1 s for 100 MB.
    """
    done = store.compact()
    if as_json:
        terminal.write_json(dataclasses.asdict(done))
    else:
        before, after = terminal.size(done.bytes_before), terminal.size(done.bytes_after)
        terminal.write_line(f"{before} before, {after} after")


@commands.command(
    epilog=options.examples(
        "sqlspace backup queue.db queue-monday.db", "sqlspace backup queue-monday.db queue.db"
    )
)
@options.database
@click.argument("target")
@options.opened
def backup(*, store: Store, target: str) -> None:
    """Copy DATABASE to TARGET, while it is in use; or bring a copy back.

    TARGET must not be there yet, nor a TARGET-wal, which SQLite would carry over into it.
    """
    store.backup(target)


for _command in (*forwarding.COMMANDS, *looking.COMMANDS):
    commands.add_command(_command)
