"""Arguments and options that several commands share, and how they are checked.

All of it happens before the file is touched, in the words of the library's own checks.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from sqlspace import programs, rules
from sqlspace.arguments import (
    check_delay_micros,
    check_key,
    check_lease_micros,
    check_timeout,
    check_ttl,
)
from sqlspace.store import open_existing

from . import running

__all__ = [
    "CommandWithProgram",
    "as_json",
    "checked",
    "database",
    "examples",
    "history",
    "key",
    "leasing",
    "many",
    "name",
    "named_headers",
    "number_or_all",
    "opened",
    "opening",
    "seconds",
    "timing",
    "utf_8",
]


def checked(check: Callable[[Any], Any]) -> Callable[..., Any]:
    """A callback of click: the value, if the library's own check passes it."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            return None if value is None else check(value)
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from None

    return callback


def seconds(value: float) -> float:
    """Of a wait: 0 or more, or infinity."""
    check_timeout(value, "it")
    return value


def number_or_all(text: str) -> int | None:
    """Of tombstones; None is all."""
    if text != "all" and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"it must be a number or all, not {text!a}")
    return None if text == "all" else int(text)


def utf_8(argument: str) -> str:
    """An argument in UTF-8, whatever the locale; what is none keeps lone surrogates."""
    return os.fsencode(argument).decode(errors="surrogateescape")


def name(argument: str) -> str:
    """A key, or what has the rules of one."""
    return check_key(utf_8(argument), "it")


def named_headers(headers: Iterable[str]) -> dict[str, str]:
    """Each of them NAME=VALUE."""
    named: dict[str, str] = {}
    for header in headers:
        title, equals, value = utf_8(header).partition("=")
        if not title or not equals:
            raise ValueError(f"it must be NAME=VALUE, not {header!a}")
        if title in named:
            raise ValueError(f"{title!a} is given twice")
        named[title] = value
    return named


def examples(*lines: str) -> str:
    """For a command's help."""
    return "\b\n" + "\n  ".join(("Examples:", *lines))


database = click.argument("database", metavar="DATABASE")
key = click.argument("key", callback=checked(name))
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, for a program.")


history = click.option(
    "--history",
    callback=checked(number_or_all),
    metavar="NUMBER|all",
    default="10000",
    show_default=True,
    help="How many entries taken the file remembers, over all keys; the smallest number of all "
    "programs that have it open counts.",
)


def many(command: Callable[..., None]) -> Callable[..., None]:
    """The options of how many, handed on as `limit`; None is one, with no newline behind it."""

    @click.option(
        "-n", "--limit", type=click.IntRange(min=1), help="Up to so many, a newline after each."
    )
    @click.option("--all", "every", is_flag=True, help="All, a newline after each.")
    @functools.wraps(command)
    def wrapped(*, limit: int | None, every: bool, **others: Any) -> None:
        if every and limit is not None:
            raise click.UsageError("--limit and --all don't go together")
        command(limit=sys.maxsize if every else limit, **others)

    return wrapped


def opening(command: Callable[..., None]) -> Callable[..., None]:
    """The options of opening, handed on as `opening`."""

    @click.option(
        "--allow-network",
        is_flag=True,
        help="Open a file on a network file system; only one machine may use it.",
    )
    @click.option(
        "--busy-timeout",
        type=float,
        callback=checked(seconds),
        metavar="SECONDS",
        default=30.0,
        show_default=True,
        help="Give up (exit 3) when others hold the write lock for longer.",
    )
    @functools.wraps(command)
    def wrapped(*, allow_network: bool, busy_timeout: float, **others: Any) -> None:
        opening = {"allow_network": allow_network, "busy_timeout": busy_timeout}
        command(opening=opening, **others)

    return wrapped


def opened(command: Callable[..., None]) -> Callable[..., None]:
    """The options of opening; DATABASE, which must be a store, is handed on as `store`."""

    @opening
    @functools.wraps(command)
    def wrapped(
        *, database: str, opening: dict[str, Any], history: int | None = None, **others: Any
    ) -> None:
        with open_existing(database, history=history, **opening) as store:
            command(store=store, **others)

    return wrapped


def timing(command: Callable[..., None]) -> Callable[..., None]:
    """The options of when a new entry is there."""

    def ttl_seconds(value: float) -> float | None:
        return check_ttl(value, "it")

    def delay_seconds(value: float) -> float:
        check_delay_micros(value, None, "it")
        return value

    command = click.option(
        "--delay",
        type=float,
        callback=checked(delay_seconds),
        metavar="SECONDS",
        help="Not to be taken until then.",
    )(command)
    return click.option(
        "--ttl",
        type=float,
        callback=checked(ttl_seconds),
        metavar="SECONDS",
        help="Gone then, if nobody has taken it.",
    )(command)


# -- a program that is run for entries


class CommandWithProgram(click.Command):
    """One of ours with the command line of another program behind two dashes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and remember what stands behind the first two dashes."""
        ctx.meta["sqlspace.dashes"] = len(args) - args.index("--") - 1 if "--" in args else 0
        return super().parse_args(ctx, args)


def leasing(command: Callable[..., None]) -> Callable[..., None]:
    """The program and the options of its leases, handed on as `argv` and `terms`, or None."""

    def lease_seconds(value: float) -> float:
        check_lease_micros(value, "it")
        return value

    def delay_seconds(value: float) -> float:
        check_delay_micros(value, None, "it")
        return value

    @click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARG]...]")
    @click.option(
        "--lease",
        type=float,
        callback=checked(lease_seconds),
        metavar="SECONDS",
        help="Run COMMAND for the entry. If we are killed, it is ready again after so long.",
    )
    @click.option(
        "--retry-delay",
        type=float,
        callback=checked(delay_seconds),
        metavar="SECONDS",
        help="With --lease: when COMMAND fails, nobody gets the entry until then.  [default: 1]",
    )
    @click.option(
        "--max-attempts",
        type=click.IntRange(min=1),
        metavar="NUMBER",
        help="With --lease: a dead letter after so many, see sqlspace dead.",
    )
    @click.option(
        "--ordered",
        is_flag=True,
        help="With --lease: no entry before an earlier one is done, or dead.",
    )
    @functools.wraps(command)
    def wrapped(
        *,
        key: str,
        argv: tuple[str, ...],
        lease: float | None,
        retry_delay: float | None,
        max_attempts: int | None,
        ordered: bool,
        **others: Any,
    ) -> None:
        terms = None
        if lease is None:
            if argv or ordered or retry_delay is not None or max_attempts is not None:
                raise click.UsageError(
                    "COMMAND, --retry-delay, --max-attempts and --ordered need --lease"
                )
        elif not argv:
            raise click.UsageError("--lease needs a COMMAND, after --")
        else:
            # Without the dashes, options of theirs that are also ours would be taken for ours.
            if len(argv) > click.get_current_context().meta["sqlspace.dashes"]:
                raise click.UsageError("COMMAND stands after --")
            programs.check_program(argv[0])
            if max_attempts is not None and rules.dead_key(key) is None:
                raise click.UsageError("--max-attempts needs a shorter KEY, for its KEY/dead")
            retry_delay = 1.0 if retry_delay is None else retry_delay
            terms = running.Terms(lease, max_attempts, ordered, retry_delay)
        command(key=key, argv=list(argv), terms=terms, **others)

    return wrapped
