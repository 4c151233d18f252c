"""Queues in a server, where one is on PATH: each started on a socket of its own, and stopped.

Their files lie in the same folder as all others. A client has a connection of its own, and each of
its pushes is acknowledged before its next. Several clients are threads of one process, as ours are.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import NamedTuple

from bench_peers import MOST_ROUNDS, TEXT, VERBS, versions
from bench_rows import Aim, Part, Plan, Row, beside, each
from bench_sides import KEY, in_order
from bench_together import Client, in_threads, open_ours, rate

CLIENTS = (1, 16)
START_SECONDS = 10.0


class Server(NamedTuple):
    """A kind of server, as it is started."""

    name: str
    program: str
    module: str
    """Of its client."""
    package: str
    sync: bool
    """What of ours it stands beside: whether each push is on the disk when it is acknowledged."""
    command: Callable[[str, str], list[str]]
    """Of its folder and its address."""
    connect: Callable[[str], Client]
    aim: Aim | None = None
    tcp: bool = False


def _redis(appendfsync: str) -> Callable[[str, str], list[str]]:
    def command(folder: str, address: str) -> list[str]:
        options = ["--port", "0", "--unixsocket", address, "--dir", folder, "--save", ""]
        return ["redis-server", *options, "--appendonly", "yes", "--appendfsync", appendfsync]

    return command


def _connect_redis(address: str) -> Client:
    import redis

    client = redis.Redis(unix_socket_path=address, single_connection_client=True)
    client.ping()
    return Client(
        lambda payload: client.lpush(KEY, payload), lambda: client.rpop(KEY), client.close
    )


def _beanstalkd(folder: str, address: str) -> list[str]:
    return ["beanstalkd", "-b", folder, "-f0", "-l", f"unix:{address}"]


def _connect_beanstalkd(address: str) -> Client:
    import greenstalk

    client = greenstalk.Client(address, encoding=None)

    def get() -> object:
        try:
            job = client.reserve(timeout=0)
        except greenstalk.TimedOutError:
            return None
        client.delete(job)
        return job

    return Client(client.put, get, client.close)


def _nats(sync_interval: str) -> Callable[[str, str], list[str]]:
    def command(folder: str, address: str) -> list[str]:
        host, port = address.split(":")
        path = os.path.join(folder, "nats.conf")
        with open(path, "w", encoding="ascii") as file:
            file.write(f'listen: "{host}:{port}"\n')
            file.write(
                f'jetstream {{ store_dir: "{folder}/js", sync_interval: {sync_interval} }}\n'
            )
        return ["nats-server", "-c", path]

    return command


def _connect_nats(address: str) -> Client:
    import nats
    from nats.js.api import RetentionPolicy

    loop = asyncio.new_event_loop()
    run = loop.run_until_complete

    async def prepare() -> tuple[nats.NATS, nats.js.JetStreamContext, object]:
        client = await nats.connect(f"nats://{address}", connect_timeout=2)
        stream = client.jetstream()
        await stream.add_stream(name=KEY, subjects=[KEY], retention=RetentionPolicy.WORK_QUEUE)
        return client, stream, await stream.pull_subscribe(KEY, durable=KEY)

    client, stream, subscription = run(prepare())

    async def take() -> object:
        try:
            (message,) = await subscription.fetch(1, timeout=0.2)
        except nats.errors.TimeoutError:
            return None
        await message.ack_sync()
        return message

    def close() -> None:
        run(client.close())
        loop.close()

    return Client(
        lambda payload: run(stream.publish(KEY, payload)),
        lambda: run(take()),
        close,
    )


SERVERS = (
    Server(
        "Redis, appendfsync always",
        "redis-server",
        "redis",
        "redis",
        True,
        _redis("always"),
        _connect_redis,
        Aim("≥", 1),
    ),
    Server(
        "beanstalkd -f0",
        "beanstalkd",
        "greenstalk",
        "greenstalk",
        True,
        _beanstalkd,
        _connect_beanstalkd,
    ),
    Server(
        "NATS JetStream, sync always",
        "nats-server",
        "nats",
        "nats-py",
        True,
        _nats("always"),
        _connect_nats,
        tcp=True,
    ),
    Server(
        "Redis, appendfsync everysec",
        "redis-server",
        "redis",
        "redis",
        False,
        _redis("everysec"),
        _connect_redis,
    ),
    Server(
        "NATS JetStream",
        "nats-server",
        "nats",
        "nats-py",
        False,
        _nats('"2m"'),
        _connect_nats,
        tcp=True,
    ),
)


def servers(plan: Plan) -> list[Part]:
    """One client, and several."""
    title = "Beside servers, clients in threads"
    part = Part(title, "× its speed", "sqlspace, /s", "it, /s")
    there = []
    for server in SERVERS:
        if shutil.which(server.program) is None:
            part.rows.append(Row(server.name, [], None, f"{server.program} not found"))
        elif find_spec(server.module) is None:
            part.rows.append(Row(server.name, [], None, f"{server.package} not installed"))
        else:
            there.append(server)
    for sync in (True, False):
        against = [server for server in there if server.sync is sync]
        if against:
            _measure(part, plan, against, sync)
    if there:
        part.notes.append(
            "A NATS pull is a fetch and an acknowledged ack; each of its clients has its own loop. "
            + versions([server.package for server in there])
        )
    return [part]


def _measure(part: Part, plan: Plan, against: Sequence[Server], sync: bool) -> None:
    found: dict[tuple[str, int, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        ours = open_ours(os.path.join(place, "ours.db"), sync)
        stack.callback(ours.close)
        sides = {"sqlspace": [ours] * max(CLIENTS)}
        for server in against:
            address = stack.enter_context(running(server, place))
            clients = []
            for _ in range(max(CLIENTS)):
                clients.append(server.connect(address))
                stack.callback(clients[-1].close)
            sides[server.name] = clients
        for nth in range(min(plan.rounds, MOST_ROUNDS) + 1):
            for count in CLIENTS:
                for verb in VERBS:
                    for side in in_order(sides, nth):
                        verbs = [client.verb(verb, TEXT) for client in sides[side][:count]]
                        shares = in_threads(verbs, plan.seconds)
                        errors = [share.error for share in shares if share.errors]
                        if errors:
                            raise AssertionError(f"{side}: {errors[0]}")
                        if nth:
                            found.setdefault((side, count, verb), []).append(rate(shares))
            plan.step()
    for server in against:
        for count in CLIENTS:
            for verb in VERBS:
                own, other = found["sqlspace", count, verb], found[server.name, count, verb]
                name = f"{count} clients" if count > 1 else "one client"
                panel = f"{'16 threads' if count > 1 else name}, {'' if sync else 'no '}fsync"
                part.rows.append(
                    beside(
                        f"{server.name}: {name}, {verb}, {'' if sync else 'no '}fsync",
                        each(own, other),
                        own,
                        other,
                        server.aim,
                        bar=(panel, server.name, verb) if sync or count == 1 else None,
                    )
                )


@contextmanager
def running(server: Server, place: str) -> Iterator[str]:
    """It, on an address of its own, until the end."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        address = f"127.0.0.1:{_free_port()}" if server.tcp else os.path.join(folder, "socket")
        with subprocess.Popen(
            server.command(folder, address),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                _wait_for(server, address, process)
                yield address
            finally:
                process.terminate()


def _wait_for(server: Server, address: str, process: subprocess.Popen[bytes]) -> None:
    """Until it answers."""
    deadline = time.monotonic() + START_SECONDS
    pause = threading.Event()
    while True:
        try:
            if server.tcp:
                host, port = address.split(":")
                socket.create_connection((host, int(port))).close()
            else:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(address)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        pause.wait(0.05)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
