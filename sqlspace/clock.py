"""The wall clock, as the file has it. Waits use the monotonic one instead, and never this."""

import time

__all__ = ["now"]


def now() -> int:
    """Unix time in microseconds."""
    return time.time_ns() // 1000
