"""The rows as tables: in the terminal, and in Markdown, short enough for a README and in full."""

import os
import platform
from collections.abc import Iterable, Sequence

import apsw
from bench_picture import PANELS, TITLE, VERBS
from bench_rows import Part, Row, number
from rich.table import Table

MOUNTS = "/proc/self/mounts"
IN_MEMORY = {"tmpfs", "ramfs"}


def machine(folder: str) -> str:
    """What the figures are of."""
    return ", ".join(
        [
            f"{_processor()}, {os.cpu_count()} cores",
            f"{platform.system()} {platform.release()}",
            file_system(folder),
            f"Python {platform.python_version()}",
            f"apsw {apsw.apsw_version()}",
        ]
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def file_system(folder: str) -> str:
    """The kind that a folder lies on, as Linux has it."""
    found = ("", "file system unknown")
    try:
        with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                _, point, kind, *_ = line.split(" ")
                if os.path.commonpath([point, os.path.realpath(folder)]) == point:
                    found = max(found, (point, kind), key=lambda mount: len(mount[0]))
    except OSError:
        pass
    return found[1]


def table(part: Part) -> Table:
    """For the terminal."""
    headings, *lines = _cells(part)
    made = Table(*headings)
    for row, line in zip(part.rows, lines, strict=True):
        made.add_row(*line, style="yellow" if row.met is False else None)
    return made


def _cells(part: Part) -> list[list[str]]:
    """The headings and the rows, without the columns in which nothing stands."""
    rows = [row.cells for row in part.rows]
    shown = [nth for nth in range(len(part.headings)) if any(row[nth] for row in rows)]
    return [[line[nth] for nth in shown] for line in (part.headings, *rows)]


def markdown(parts: Sequence[Part], where: str) -> str:
    """The short tables, then all of it."""
    short = [
        (f"{number(row.figure)} {part.figure}", *row.cells[1:3], f"{part.title}: {row.name}")
        for part in parts
        for row in part.rows
        if row.short and row.figure is not None
    ]
    about = "Medians of rounds in turns, with their quartiles."
    found = ["# How fast", "", f"{where}. {about}"]
    if matrix := _matrix([row for part in parts for row in part.rows]):
        found += ["", f"{TITLE}, push / pull:", "", *matrix]
    if short:
        found += ["", *_table(("", "aim", "met", "what"), short)]
    for part in parts:
        headings, *lines = _cells(part)
        found += ["", f"## {part.title}", "", *_table(headings, lines)]
        for note in part.notes:
            found += ["", note]
    return "\n".join(found) + "\n"


def _matrix(rows: Iterable[Row]) -> list[str]:
    """The picture's figures: a line for each peer."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        if row.bar is not None and row.figure is not None:
            panel, peer, verb = row.bar
            found.setdefault(peer, {})[panel, verb] = number(row.figure)
    lines = []
    for peer, cells in found.items():
        pairs = [
            [cells[panel, verb] for verb in VERBS if (panel, verb) in cells] for panel in PANELS
        ]
        lines.append((peer, *(" / ".join(pair) for pair in pairs)))
    return _table(("to", *PANELS), lines) if lines else []


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        "|" + "---|" * len(headings),
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines),
    ]
