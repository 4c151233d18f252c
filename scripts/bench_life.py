"""A store's long life: many pushes and pulls at a small depth, with the history it has by default.

How long each took is told with the automatic checkpoints and without them. A checkpoint is told
apart without touching the store: after one, the first commit begins the -wal anew, and counts up
the checkpoint number in its header; so the operation before that one has checkpointed.

What else the machine does takes its time from some operations too, more than any percentile of
ours. So the raw statements live as long, in turns, and their percentiles stand beside ours.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench_rows import Aim, Part, Plan, Row, number
from bench_sides import KEY, PAYLOAD, raw_execute, raw_pull, raw_push

import sqlspace

DEPTH = 100
BLOCKS = 20  # that take turns
CHECKPOINT_NUMBER = slice(12, 16)
"""Of the -wal's header: https://www.sqlite.org/fileformat2.html#walformat"""


class Life:
    """Pushes and pulls by turns, and how many µs each of them took.

    Args:
        path: Of the database; its -wal is there.
        push: Adds an entry.
        pull: Takes one.
    """

    def __init__(self, path: str, push: Callable[[], Any], pull: Callable[[], Any]) -> None:
        self._path = path
        self._verbs = (push, pull)
        self.taken: list[float] = []
        self.checkpoints: set[int] = set()
        for _ in range(DEPTH):
            push()

    def live(self, operations: int) -> None:
        """Do so many."""
        log = os.open(self._path + "-wal", os.O_RDONLY)
        try:
            before = os.pread(log, 32, 0)[CHECKPOINT_NUMBER]
            for _ in range(operations // 2):
                for verb in self._verbs:
                    start = time.perf_counter()
                    verb()
                    self.taken.append((time.perf_counter() - start) * 1e6)
                    now = os.pread(log, 32, 0)[CHECKPOINT_NUMBER]
                    if now != before:
                        before = now
                        self.checkpoints.add(max(0, len(self.taken) - 2))
        finally:
            os.close(log)

    def plain(self) -> list[float]:
        """Of those that didn't checkpoint."""
        return [figure for nth, figure in enumerate(self.taken) if nth not in self.checkpoints]

    def checkpointing(self) -> list[float]:
        """Of the others."""
        return [self.taken[nth] for nth in sorted(self.checkpoints)]


def life(plan: Plan) -> list[Part]:
    """The percentiles of single operations, and the files' sizes at the end."""
    part = Part(f"A long life, sync=False, {DEPTH} live", "× p50", "µs", "raw, µs")
    with tempfile.TemporaryDirectory(dir=plan.folder) as place:
        path, plain_path = os.path.join(place, "life.db"), os.path.join(place, "raw.db")
        with sqlspace.open(path, sync=False) as store:
            ours = Life(path, lambda: store.push(KEY, PAYLOAD), lambda: store.pull(KEY))
            execute = raw_execute(plain_path, sync=False)
            raw = Life(plain_path, lambda: raw_push(execute, PAYLOAD), lambda: raw_pull(execute))
            for _ in range(BLOCKS):
                ours.live(plan.operations // BLOCKS)
                raw.live(plan.operations // BLOCKS)
            plan.step()
            sizes = {name: os.path.getsize(path + name) // 1024 for name in ("", "-wal")}
    p50 = statistics.median(ours.plain())
    for name, own, other, aim in (
        ("without the checkpoints", ours.plain(), raw.plain(), Aim("≤", 20)),
        ("with the checkpoints", ours.taken, raw.taken, None),
    ):
        ranks = zip(("p50", "p99", "p99.9", "longest"), _ranks(own), _ranks(other), strict=True)
        for rank, figure, limit in ranks:
            aimed = aim if rank == "p99.9" else None
            row = Row(
                f"{rank} of an operation, {name}",
                [figure / p50],
                aimed,
                number(figure),
                number(limit),
                short=aimed is not None,
            )
            part.rows.append(row)
    own, other = ours.checkpointing(), raw.checkpointing()
    if own and other:
        middle = statistics.median(own)
        limit = number(statistics.median(other))
        name = f"{len(own)} operations with a checkpoint, median"
        part.rows.append(Row(name, [middle / p50], None, number(middle), limit))
    part.notes.append(
        f"After {plan.operations:,} operations the file has {sizes['']:,} KB, and its -wal "
        f"{sizes['-wal']:,} KB."
    )
    return [part]


def _ranks(figures: Sequence[float]) -> tuple[float, float, float, float]:
    """The middle, the 99th and 99.9th percentile, and the longest."""
    ranks = statistics.quantiles(figures, n=1000)
    return ranks[499], ranks[989], ranks[998], max(figures)
