"""Where inotify is to be had: one import, one way to find out that it isn't.

Linux grants a user 128 instances, so a process uses one for each purpose, shared by its stores.
"""

import contextlib
import sys
from typing import Any

__all__ = ["open_inotify"]


def open_inotify() -> Any:
    """A non-blocking `inotify_simple.INotify`, or None where there is none or its limit is reached.

    Callers must work without it, if more slowly.
    """
    if sys.platform != "linux":
        return None
    with contextlib.suppress(ImportError, OSError):
        import inotify_simple  # noqa: PLC0415  # on Linux only

        return inotify_simple.INotify(nonblocking=True)
    return None
