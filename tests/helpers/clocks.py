"""A wall clock for tests, which stands still until it is told to go on."""

from sqlspace import clock

START_MICROS = 1_800_000_000_000_000
YEAR_SECONDS = 31_557_600.0


class Clock:
    """Stands in for `sqlspace.clock.now`, in this process."""

    def __init__(self):
        self.micros = START_MICROS

    def now(self):
        return self.micros

    def go(self, seconds):
        """Forwards, or backwards."""
        self.micros += round(seconds * 1e6)

    @property
    def seconds(self):
        return self.at(0)

    def at(self, ahead):
        """So many seconds from now, as the file has it."""
        return (self.micros + round(ahead * 1e6)) / 1e6


def install(monkeypatch):
    """The clock of this process from now on, until `monkeypatch` undoes it."""
    injected = Clock()
    monkeypatch.setattr(clock, "now", injected.now)
    return injected
