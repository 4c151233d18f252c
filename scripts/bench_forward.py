"""Store and forward: how fast what a store holds gets to an endpoint, beside its slower end.

The ends alone, in the same run: the store's claims and acks in batches of the same size, and
publishes of nats-py to the same server, as many of them under way as a batch has.
"""

import asyncio
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec

from bench_peers import MOST_ROUNDS, TEXT, versions
from bench_rows import Aim, Part, Plan, Row, each
from bench_servers import SERVERS, running
from bench_sides import in_order

import sqlspace

BATCH = 999  # as the forwarder has it

_names = itertools.count()


def forwarding(plan: Plan) -> list[Part]:
    """To a JetStream and to a function."""
    part = Part("Store and forward", "× the slower end", "forwarded, /s", "the slower end, /s")
    total = plan.times * 10
    server = next(server for server in SERVERS if server.name == "NATS JetStream")
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        store = stack.enter_context(sqlspace.open(os.path.join(place, "ours.db")))
        sides: dict[str, Callable[[], float]] = {
            "store": lambda: _store_alone(store, total, BATCH),
            "store, one by one": lambda: _store_alone(store, total // 10, 1),
            "to a function": lambda: _to_function(store, total // 10),
        }
        there = shutil.which(server.program) is not None and find_spec(server.module) is not None
        if there:
            url = f"nats://{stack.enter_context(running(server, place))}"
            sides |= {
                "nats-py": lambda: _publishes(url, total, BATCH),
                "nats-py, one by one": lambda: _publishes(url, total // 10, 1),
                "to a stream": lambda: _to_stream(store, url, total, ["mail"]),
                "to a stream, 4 keys": lambda: _to_stream(store, url, total, list("abcd")),
                "to a stream without batches": lambda: _to_stream(
                    store, url, total // 10, ["mail"], allow_atomic=False
                ),
            }
        found: dict[str, list[float]] = {}
        for nth in range(min(plan.rounds, MOST_ROUNDS) + 1):
            for side in in_order(sides, nth):
                figure = sides[side]()
                if nth:
                    found.setdefault(side, []).append(figure)
            plan.step()
    pairs = [("to a function", ("store, one by one",), None)]
    if there:
        aim = Aim("≥", 0.8)
        pairs += [
            ("to a stream", ("store", "nats-py"), aim),
            ("to a stream, 4 keys", ("store", "nats-py"), aim),
            ("to a stream without batches", ("store, one by one", "nats-py, one by one"), None),
        ]
        part.notes.append(
            "A stream gets each batch as one, with the position of what was sent; nats-py has "
            f"{BATCH} publishes under way. {versions(['nats-py'])}"
        )
    else:
        part.rows.append(Row("to a stream", [], None, f"{server.program} or nats-py not found"))
    for name, ends, aim in pairs:
        own = found[name]
        slower = min(ends, key=lambda end: sorted(found[end])[len(found[end]) // 2])
        part.rows.append(_row(f"{name}; slower: {slower}", own, found[slower], aim))
    return [part]


def _row(name: str, own: list[float], other: list[float], aim: Aim | None) -> Row:
    from bench_rows import spread

    return Row(name, each(own, other), aim, spread(own), spread(other))


def _timed(total: int, work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return total / (time.perf_counter() - begun)


def _filled(store: sqlspace.Store, total: int, keys: list[str]) -> int:
    for key in keys:
        store.push_many(key, [TEXT] * (total // len(keys)))
    return total // len(keys) * len(keys)


def _store_alone(store: sqlspace.Store, total: int, batch: int) -> float:
    total = _filled(store, total, ["mail"])

    def work() -> None:
        while claimed := store.claim_many("mail", batch):
            store.ack_many(claimed)

    return _timed(total, work)


def _to_function(store: sqlspace.Store, total: int) -> float:
    total = _filled(store, total, ["mail"])
    return _timed(total, lambda: sqlspace.forward(store, "mail", lambda _: None, drain=True))


def _to_stream(
    store: sqlspace.Store, url: str, total: int, keys: list[str], **config: bool
) -> float:
    from sqlspace.jetstream import Endpoint

    endpoint = Endpoint(url, stream=f"forward{next(_names)}")
    asyncio.run(_make(url, {**endpoint.settings.streams[0], **config}))
    total = _filled(store, total, keys)
    try:
        return _timed(total, lambda: sqlspace.forward(store, keys, endpoint, drain=True))
    finally:
        asyncio.run(_ask(url, f"STREAM.DELETE.{endpoint.subjects.entries}", b""))


def _publishes(url: str, total: int, under_way: int) -> float:
    return asyncio.run(_publish(url, total, under_way))


async def _publish(url: str, total: int, under_way: int) -> float:
    import nats

    under_way = min(under_way, total)
    name = f"raw{next(_names)}"
    await _make(url, {"name": name, "subjects": [f"{name}.*"]})
    client = await nats.connect(url)
    try:
        stream = client.jetstream()
        begun = time.perf_counter()
        for _ in range(total // under_way):
            acks = [await stream.publish_async(f"{name}.mail", TEXT) for _ in range(under_way)]
            await asyncio.gather(*acks)
        return (total // under_way) * under_way / (time.perf_counter() - begun)
    finally:
        await stream.delete_stream(name)
        await client.close()


async def _make(url: str, config: dict[str, object]) -> None:
    import json

    await _ask(url, f"STREAM.CREATE.{config['name']}", json.dumps(config).encode())


async def _ask(url: str, verb: str, payload: bytes) -> None:
    import nats

    client = await nats.connect(url)
    try:
        await client.request(f"$JS.API.{verb}", payload, timeout=5)
    finally:
        await client.close()
