"""How fast a store is: ratios, each of two things measured in turns, on this machine, in this run.

Beside the limit that SQLite sets: the same statements, raw. Beside other queues in a SQLite file,
and servers that are on PATH, at the same durability. Threads beside one thread, processes beside
one process, a crowded store beside an empty one; forwarding beside the slower of its two ends. What
counts is the ratio of the medians: the figures themselves change with the machine and with what
else it does.

With --into, the tables are written as bench.md and the picture as bench.svg.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import bench_aio
import bench_alone
import bench_backlog
import bench_forward
import bench_jetstream
import bench_latency
import bench_life
import bench_limits
import bench_local
import bench_peers
import bench_picture
import bench_report
import bench_servers
import bench_together
import bench_waiting
from bench_rows import Part, Plan
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SECTIONS: Mapping[str, Callable[[Plan], list[Part]]] = {
    "limits": bench_limits.limits,
    "alone": bench_alone.alone,
    "threads": bench_together.threads,
    "aio": bench_aio.coroutines,
    "processes": bench_together.processes,
    "peers": bench_peers.alone,
    "crowds": bench_peers.crowded,
    "servers": bench_servers.servers,
    "forward": bench_forward.forwarding,
    "jetstream": bench_jetstream.jetstream,
    "latency": bench_latency.latency,
    "bystanders": bench_waiting.bystanders,
    "idle": bench_waiting.idling,
    "local": bench_local.local,
    "life": bench_life.life,
    "backlog": bench_backlog.backlog,
}
QUICK = {
    "rounds": 3,
    "times": 500,
    "seconds": 0.06,
    "rows": 50_000,
    "operations": 20_000,
    "idle": 2.0,
    "crowd": 200,
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--into", metavar="FOLDER", help="write bench.md and bench.svg there")
    parser.add_argument("--folder", help="where the files under test go: a disk, not a tmpfs")
    parser.add_argument("--quick", action="store_true", help="rough figures in about a minute")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="a section of it")
    full = parser.add_argument_group("how much (all smaller with --quick)")
    full.add_argument("--rounds", type=int, default=9, help="medians are of so many")
    full.add_argument("--times", type=int, default=1500, help="operations a round, without fsync")
    full.add_argument("--seconds", type=float, default=0.2, help="a crowd works, a round")
    full.add_argument("--rows", type=int, default=1_000_000, help="of the backlog")
    full.add_argument("--operations", type=int, default=200_000, help="of the long life")
    full.add_argument("--idle", type=float, default=10.0, help="seconds of waiting for nothing")
    full.add_argument("--crowd", type=int, default=1000, help="waiters in memory")
    arguments = parser.parse_args()
    if arguments.quick:
        for name, most in QUICK.items():
            setattr(arguments, name, min(getattr(arguments, name), most))
    return arguments


def on_disk() -> str:
    """Where temporary files may go, and an fsync costs something."""
    places = [tempfile.gettempdir(), "/var/tmp", os.getcwd()]
    in_memory = bench_report.IN_MEMORY
    found = [place for place in places if bench_report.file_system(place) not in in_memory]
    return [*found, *places][0]


def main() -> None:
    arguments = parsed()
    console = Console(width=None if sys.stdout.isatty() else 140)
    aside = Console(stderr=True)
    folder = arguments.folder or on_disk()
    where = bench_report.machine(folder)
    console.print(f"{where}, load {os.getloadavg()[0]:.1f}")
    if bench_report.file_system(folder) in bench_report.IN_MEMORY:
        console.print(f"{folder} is in memory: its fsyncs cost nothing, so they say nothing")
    parts: list[Part] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    start = time.monotonic()
    with Progress(*columns, console=aside, transient=True, disable=not aside.is_terminal) as bar:
        names = arguments.only or list(SECTIONS)
        task = bar.add_task("", total=len(names))
        plan = Plan(
            folder=folder,
            rounds=arguments.rounds,
            times=arguments.times,
            seconds=arguments.seconds,
            rows=arguments.rows,
            operations=arguments.operations,
            idle_seconds=arguments.idle,
            crowd=arguments.crowd,
            step=lambda: bar.advance(task, 0.1),  # of a section: none has more than ten steps
        )
        for done, name in enumerate(names):
            bar.update(task, completed=done, description=name)
            for part in SECTIONS[name](plan):
                parts.append(part)
                console.print(bench_report.table(part))
                for note in part.notes:
                    console.print(note, style="dim")
    rows = [row for part in parts for row in part.rows]
    aims = [row.met for row in rows if row.met is not None]
    took = time.monotonic() - start
    console.print(f"{sum(aims)} of {len(aims)} aims met, in {took:.0f} s")
    if arguments.into:
        os.makedirs(arguments.into, exist_ok=True)
        _write(arguments.into, "bench.md", bench_report.markdown(parts, where))
        if drawn := bench_picture.picture(rows, where):
            _write(arguments.into, "bench.svg", drawn)


def _write(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
