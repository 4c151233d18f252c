"""`sqlspace forward`: the command, and the screen while it is at work.

The work is done by `sqlspace.forwarding` and `sqlspace.jetstream`; here it is told where to,
watched and ended. The latter needs nats-py and is imported only when a server is named.
"""

import contextlib
import logging
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sqlspace import programs, rules
from sqlspace.arguments import check_lease_micros
from sqlspace.forwarding import Forwarder, Route
from sqlspace.space import Context
from sqlspace.store import Store, open_existing

from . import options, terminal, top
from .signals import Signals

__all__ = ["COMMANDS"]

_LEASE_SECONDS = 5.0
_INTERVAL_SECONDS = 0.5
_REST = 10  # a rest after a look, in looks


class Work(Protocol):
    """A forwarder, or a receiver."""

    routes: dict[str, Route]
    on_end: Callable[[], object]

    def start(self) -> None:
        """Begin."""

    def is_at_work(self) -> bool:
        """Whether it goes on."""

    def end(self, *, force: bool = False) -> None:
        """End it, and wait for that."""


# -- the command


def _lease_seconds(value: float) -> float:
    check_lease_micros(value, "it")
    return value


@click.command(
    cls=options.CommandWithProgram,
    epilog=options.examples(
        "sqlspace forward queue.db mail -- sendmail -t",
        "sqlspace forward queue.db mail jobs --to nats://hub:4222 --stream work",
        "sqlspace forward queue.db mail --from nats://hub:4222 --stream work",
        "sqlspace forward queue.db mail --to tls://hub:4222 --creds me.creds --drain",
    ),
)
@options.database
@click.argument(
    "words", nargs=-1, type=click.UNPROCESSED, required=True, metavar="KEY... [-- COMMAND [ARG]...]"
)
@click.option("--to", multiple=True, metavar="URL", help="A NATS server; repeat it for a cluster.")
@click.option("--from", "source", multiple=True, metavar="URL", help="The way back: into DATABASE.")
@click.option("--stream", metavar="NAME", help="Of the server.  [default: sqlspace]")
@click.option("--creds", type=click.Path(exists=True, dir_okay=False), help="A credentials file.")
@click.option("--tls-ca", type=click.Path(exists=True, dir_okay=False), help="Who is trusted.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="Who we are.")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="Its key.")
@click.option(
    "--drain", is_flag=True, help="End when nothing is left; without COMMAND write how many went."
)
@click.option(
    "--timeout",
    type=float,
    callback=options.checked(options.seconds),
    metavar="SECONDS",
    help="End after so long, with 1.",
)
@click.option(
    "--lease",
    type=float,
    callback=options.checked(_lease_seconds),
    metavar="SECONDS",
    help="If we are killed, another goes on after so long.  [default: 5]",
)
@click.option(
    "--max-attempts",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="An entry is a dead letter after so many, see sqlspace dead.  [default: never]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="So many keys at a time.  [default: all, up to 8]",
)
@click.option("--quiet", is_flag=True, help="No screen, and nothing of what goes well.")
@options.history
@options.opening
def forward(
    *,
    database: str,
    words: tuple[str, ...],
    to: tuple[str, ...],
    source: tuple[str, ...],
    stream: str | None,
    creds: str | None,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    drain: bool,
    timeout: float | None,
    lease: float | None,
    max_attempts: int | None,
    workers: int | None,
    quiet: bool,
    history: int | None,
    opening: dict[str, Any],
) -> None:
    """Send the entries of each KEY to a server, or to COMMAND; hold them while that is down.

    In order per key, until Ctrl-C or SIGTERM. What fails is tried again, after 0.1 to 10 seconds,
    and nothing behind it on its key goes out before it; other keys go on. Any number of these may
    work at the same time, on the same keys too.

    COMMAND is run for each entry, as by `pull --lease`: the payload is its stdin, and SQLSPACE_KEY,
    SQLSPACE_SEQ, SQLSPACE_ID (the same whenever an entry is sent again), SQLSPACE_ATTEMPTS and
    SQLSPACE_HEADERS are in its environment. If it ends with 0 the entry has arrived; else it is
    tried again.

    In the stream of a NATS server (2.12.1 or later) each entry is once, whatever is killed; it is
    made if it isn't there. With --from they come back: each is deleted there when it is here.

    On a terminal a screen shows how it goes; q ends it. Else there is a line on stderr whenever
    something fails, or goes on.

    Exit codes: 0 drained or ended by q, 1 timed out, 2 misuse, 3 the store failed; 130 after
    Ctrl-C, 143 after SIGTERM. What is under way then is finished, or given back.
    """
    dashes = click.get_current_context().meta["sqlspace.dashes"]
    if dashes >= len(words):
        raise click.UsageError("there must be a KEY, and COMMAND stands after --")
    names, argv = words[: len(words) - dashes], list(words[len(words) - dashes :])
    keys = [_name(name) for name in names]
    if bool(to) + bool(source) + bool(argv) != 1:
        raise click.UsageError("there must be one of --to, --from, and a COMMAND after --")
    tls = _tls(tls_ca, tls_cert, tls_key)
    server = {"stream": stream, "user_credentials": creds, "tls": tls}
    connect = {name: value for name, value in server.items() if value is not None}
    if argv and connect:
        raise click.UsageError("--stream, --creds and --tls-… are for a server")
    if source and (lease or max_attempts or workers):
        raise click.UsageError("--lease, --max-attempts and --workers are for what is sent")
    if max_attempts is not None and any(rules.dead_key(key) is None for key in keys):
        raise click.UsageError("--max-attempts needs a shorter KEY, for its KEY/dead")
    if argv:
        programs.check_program(argv[0])
    context = Context(timeout)
    with open_existing(database, history=history, **opening) as store:
        work: Work
        if source:
            work = _receiver(store, keys, source, connect, drain=drain, context=context)
        else:
            work = Forwarder(
                store,
                keys,
                argv or _endpoint(to, connect),
                lease=lease or _LEASE_SECONDS,
                max_attempts=max_attempts,
                workers=workers,
                drain=drain,
                context=context,
            )
        with _told(quiet=quiet):
            code = _attended(store, work, context, shows=not quiet and terminal.is_capable())
        if drain and not argv and code in (terminal.DONE, terminal.NOTHING):
            terminal.write_line(str(sum(route.sent for route in work.routes.values())))
        click.get_current_context().exit(code)


def _name(word: str) -> str:
    try:
        return options.name(word)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'KEY...'") from None


def _tls(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext | None:
    if ca is None and cert is None and key is None:
        return None
    if key is not None and cert is None:
        raise click.UsageError("--tls-key is that of --tls-cert")
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        raise click.UsageError(f"--tls-…: {error}") from None
    return context


@contextlib.contextmanager
def _needing_nats() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise click.UsageError(str(error)) from None


def _endpoint(urls: tuple[str, ...], given: Mapping[str, Any]) -> Any:
    with _needing_nats():
        from sqlspace.jetstream import Endpoint  # noqa: PLC0415  # need not be installed
    return Endpoint(list(urls), **given)


def _receiver(
    store: Store,
    keys: list[str],
    urls: tuple[str, ...],
    given: Mapping[str, Any],
    *,
    drain: bool,
    context: Context,
) -> Work:
    endpoint = _endpoint(urls, given)
    from sqlspace.jetstream.receiving import Receiver  # noqa: PLC0415  # it is installed

    return Receiver(store, keys, endpoint, drain=drain, context=context)


# -- at work


@contextlib.contextmanager
def _told(*, quiet: bool) -> Iterator[None]:
    """Have the library tell of what goes on again, too."""
    log = logging.getLogger("sqlspace")
    before = log.level
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _ends(work: Work) -> Iterator[int]:
    """A descriptor that can be read when the work may be over.

    To wait for a lock instead isn't enough: a signal that another thread gets doesn't end that.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def tell() -> None:
        with contextlib.suppress(OSError):
            os.write(writer, b".")

    work.on_end = tell
    try:
        yield reader
    finally:
        work.on_end = lambda: None
        os.close(writer)
        os.close(reader)


def _attended(store: Store, work: Work, context: Context, *, shows: bool) -> int:
    """Have it done until it ends, or is to; the exit code."""
    quits = False
    with (
        Signals([signal.SIGCHLD, signal.SIGWINCH], context.cancel) as signals,
        _ends(work) as ends,
    ):
        try:
            work.start()
            if shows:
                quits = _watch(store, work, signals)
            while not quits and work.is_at_work():
                left = context.deadline and context.deadline - time.monotonic()
                if signals.sleep(left, ends):
                    os.read(ends, 1024)
        finally:
            try:
                work.end()
            except KeyboardInterrupt:  # pressed again
                work.end(force=True)
        if signals.stop is not None:
            return terminal.SIGNALED + signals.stop
    over = context.deadline is not None and time.monotonic() >= context.deadline
    return terminal.NOTHING if over and not quits else terminal.DONE


# -- the screen


@dataclass(frozen=True, slots=True)
class _Look:
    """How it went until a moment, and since the moment before."""

    at: float  # monotonic
    rest: float
    sent: dict[str, int]
    held: dict[str, int]
    rates: dict[str, float]


def _look(store: Store, work: Work, before: _Look | None) -> _Look:
    at = time.monotonic()
    sent = {key: route.sent for key, route in work.routes.items()}
    held = {key: store.len(key) for key in work.routes}
    rates = {}
    if before is not None:
        seconds = max(at - before.at, 1e-3)
        rates = {key: (number - before.sent[key]) / seconds for key, number in sent.items()}
    rest = max(_INTERVAL_SECONDS, _REST * (time.monotonic() - at))
    return _Look(at, rest, sent, held, rates)


def _state(look: _Look, key: str, route: Route, now: float) -> Text:
    if route.failure:
        left = max(0.0, route.retry_at - now)
        return Text(f"down, next try in {left:.0f} s: {terminal.printable(route.failure)}", "red")
    if look.rates.get(key):
        return Text("sending", "green")
    return Text("waiting" if look.held[key] else "idle", "dim")


def _screen(path: str, look: _Look, routes: dict[str, Route], told: str, height: int) -> Group:
    now = time.time()
    total = f"{sum(look.rates.values()):,.0f}/s, {sum(look.sent.values()):,} in all; "
    total += f"{sum(look.held.values()):,} held"
    lines: list[RenderableType] = [
        Text(f"{terminal.printable(path)}  {time.strftime('%H:%M:%S')}", "bold"),
        Text(total),
        Text(""),
    ]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("key", overflow="ellipsis", no_wrap=True)
    for title in ("held", "done", "per s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", overflow="ellipsis", no_wrap=True, ratio=1)
    # Those that fail first, then the fullest: they are what is looked for.
    keys = sorted(routes, key=lambda key: (not routes[key].failure, -look.held[key], key))
    room = max(1, height - len(lines) - 2)
    shown = keys if len(keys) <= room else keys[: room - 1]
    for key in shown:
        table.add_row(
            Text(terminal.printable(key)),  # not a str: rich would obey its [marks]
            f"{look.held[key]:,}",
            f"{look.sent[key]:,}",
            f"{look.rates[key]:,.0f}" if look.rates else "-",
            _state(look, key, routes[key], now),
        )
    lines.append(table)
    if len(shown) < len(keys):
        lines.append(Text(f"… and {len(keys) - len(shown):,} keys more"))
    lines.append(Text(terminal.printable(told or "q ends"), "dim"))
    for line in lines:
        if isinstance(line, Text):
            line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def _watch(store: Store, work: Work, signals: Signals) -> bool:
    """Draw it until it ends or is to; whether somebody pressed q."""
    told: list[str] = []
    look = _look(store, work, None)
    with (
        open(
            sys.stdout.fileno(), "w", encoding="utf-8", errors="backslashreplace", closefd=False
        ) as out,
        terminal.log_kept(told),
        top.keyboard() as keyboard,
        Live(
            console=Console(file=out),
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live,
    ):
        while work.is_at_work():
            height = live.console.size.height
            screen = _screen(store.path, look, work.routes, told[-1] if told else "", height)
            live.update(screen, refresh=True)
            if signals.sleep(_INTERVAL_SECONDS, *keyboard) and top.is_end(keyboard[0]):
                return True
            if time.monotonic() >= look.at + look.rest:
                look = _look(store, work, look)
    return False


COMMANDS = (forward,)
