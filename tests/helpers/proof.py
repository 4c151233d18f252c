"""What the long tests have tried, how often, and what they found: told at the end of a run."""

from typing import NamedTuple

__all__ = ["Line", "lines", "tried"]


class Line(NamedTuple):
    """One line of the table."""

    what: str
    times: str
    seeds: str
    found: str


lines: list[Line] = []


def tried(what, times, *, seeds="-", found="0 violations"):
    """Note a line for the table; the test itself has asserted what is said in it.

    Args:
        what: Was tried.
        times: How often, with its unit: "20,312 images".
        seeds: With which it can be done again.
        found: Of planted bugs: that they were caught, "1,534 of 2,163".
    """
    lines.append(Line(what, str(times), str(seeds), found))
