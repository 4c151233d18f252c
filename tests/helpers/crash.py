"""A campaign of power cuts and faults: as many seeds as there is time for, on all processors.

Each seed is a run of stores that is cut at every event, and then runs in which the disk fails, too.
`--faults` has the disk fail at each single operation of two short scripts, once and for good, in
each way, and ends when all have been tried.

It ends with exit code 1 if a promise was broken, and with the names of the images that show it;
`--replay IMAGE` makes one of them again.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections import Counter

from faults import Injector
from powercuts import Explorer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
SHOWN = 20  # violations


class Worker:
    """Explores one seed after the other, in a process of its own, and tells how far it is."""

    def __init__(self, ends, news):
        self.ends = ends
        self.news = news
        self.told = Counter()

    def run(self, seeds, every_fault):
        try:
            for seed in iter(seeds.get, None):
                if every_fault:
                    self.explore(seed, Injector(sample=None, watch=self.watch))
                else:
                    self.explore(seed, Explorer(watch=self.watch))
                    self.explore(seed, Injector(watch=self.watch))
                if time.monotonic() >= self.ends:
                    break
        except KeyboardInterrupt:
            pass
        except BaseException:
            self.news.put(("broken", traceback.format_exc()))
            raise
        self.news.put(("done", None))

    def explore(self, seed, explorer):
        self.told.clear()
        self.news.put(("seed", seed))
        explorer.explore(seed)
        self.tell(explorer)

    def watch(self, explorer):
        if explorer.images - self.told["images"] >= 250:
            self.tell(explorer)
        return time.monotonic() < self.ends

    def tell(self, explorer):
        now = Counter(images=explorer.images, calls=explorer.deeds)
        now["faults"] = getattr(explorer, "faults", 0)
        violations = explorer.violations[self.told["violations"] :]
        self.news.put(("more", (now - self.told, violations)))
        self.told = now
        self.told["violations"] = len(explorer.violations)


def work(seeds, ends, news, every_fault):
    Worker(ends, news).run(seeds, every_fault)


def campaign(minutes, processes, coming, *, every_fault=False):
    """Run it, until its time is over or Ctrl-C; the exit code."""
    context = multiprocessing.get_context("spawn")
    seeds, news = context.Queue(maxsize=processes), context.Queue()
    begins = time.monotonic()
    ends = begins + minutes * 60
    workers = [
        context.Process(target=work, args=(seeds, ends, news, every_fault), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    counts, explored, violations = Counter(), [], []
    with (
        contextlib.suppress(KeyboardInterrupt),
        Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console
        ) as progress,
    ):
        task = progress.add_task("", total=None if every_fault else minutes * 60)
        at_work = len(workers)
        while at_work:
            if not seeds.full():
                seeds.put(next(coming, None))
            try:
                kind, what = news.get(timeout=0.2)
            except queue.Empty:
                kind, what = "nothing", None
            if kind == "seed":
                explored.append(what)
            elif kind == "more":
                counts += what[0]
                shown = what[1][: max(0, SHOWN - len(violations))]
                violations += what[1]
                for name, text in shown:
                    progress.console.print(f"{name}: {text}", markup=False)
            elif kind == "broken":
                progress.console.print(what, markup=False)
                return 2
            elif kind == "done":
                at_work -= 1
            progress.update(
                task,
                completed=time.monotonic() - begins,
                description=f"{counts['images']:,} images, {len(violations):,} violations",
            )
    seconds = time.monotonic() - begins
    console.print(
        f"seeds       {min(explored, default='-')} to {max(explored, default='-')}\n"
        f"minutes     {seconds / 60:.1f}\n"
        f"calls       {counts['calls']:,}\n"
        f"faults      {counts['faults']:,}\n"
        f"images      {counts['images']:,}\n"
        f"a second    {counts['images'] / seconds:,.0f}\n"
        f"violations  {len(violations):,}"
    )
    return int(bool(violations))


def replay(image):
    """Make it again; the exit code."""
    explorer = Injector() if "!" in image else Explorer()
    try:
        explorer.replay(image)
    except (ValueError, IndexError):
        console.print(f"{image}: there is no such image", markup=False)
        return 2
    for name, text in explorer.violations:
        console.print(f"{name}: {text}", markup=False)
    console.print(f"{image}: {'broken' if explorer.violations else 'no promise is broken'}")
    return int(bool(explorer.violations))


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/crash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--faults", action="store_true", help="every single one of two scripts")
    parser.add_argument("--replay", metavar="IMAGE", help="as a campaign has printed it")
    asked = parser.parse_args()
    if asked.replay is not None:
        return replay(asked.replay)
    if not asked.minutes > 0 or asked.processes < 1:
        parser.error("--minutes and --processes must be positive")
    if asked.faults:
        return campaign(math.inf, asked.processes, iter(("full", "group")), every_fault=True)
    return campaign(asked.minutes, asked.processes, itertools.count(asked.seed))


if __name__ == "__main__":
    sys.exit(main())
