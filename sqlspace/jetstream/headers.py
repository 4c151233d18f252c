"""What goes with an entry as headers of its message: its own, and how long it lives.

An entry's headers are the message's, so that every client of NATS reads them. What can't be one
there (a name that is no token, or is the server's or ours; a value with a line's end, with blanks
around it, or not in ASCII) goes into `Sqlspace-Headers`, a JSON object. So nothing is lost on the
way, and what others have published with headers of theirs comes back as it was.
"""

import json
import math
import re
from collections.abc import Mapping

__all__ = ["EXPIRES", "carried", "entry_headers", "expiry", "lifetime"]

EXPIRES = "Sqlspace-Expires"
"""When the entry is over, in Unix seconds; the server's own Nats-TTL counts whole ones."""
_REST = "Sqlspace-Headers"
_OURS = ("nats-", "sqlspace-")

_is_name = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_is_value = re.compile(r"[!-~]([ -~]*[!-~])?").fullmatch


def carried(headers: Mapping[str, str]) -> dict[str, str]:
    """An entry's headers as those of its message."""
    if not headers:
        return {}
    found: dict[str, str] = {}
    rest: dict[str, str] = {}
    lower = {name.lower() for name in headers}
    for name, value in headers.items():
        plain = _is_name(name) and _is_value(value) and not name.lower().startswith(_OURS)
        # Names that differ only in their case are one name to some clients.
        (found if plain and len(lower) == len(headers) else rest)[name] = value
    if rest:
        found[_REST] = json.dumps(rest, separators=(",", ":"))
    return found


def entry_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The entry's headers among those of a message."""
    found = {name: value for name, value in headers.items() if not name.lower().startswith(_OURS)}
    try:
        rest = json.loads(headers.get(_REST, "{}"))
    except (ValueError, RecursionError):
        rest = None
    if not isinstance(rest, dict) or not all(isinstance(value, str) for value in rest.values()):
        return {**found, _REST: headers[_REST]}  # another's
    return {**found, **rest}


def lifetime(expires_at: float | None, now: float, *, told: bool) -> dict[str, str]:
    """The headers of when it is over.

    Args:
        expires_at: In Unix seconds, or None.
        now: Likewise.
        told: Whether the server removes messages by itself, if it is told so.
    """
    if expires_at is None:
        return {}
    found = {EXPIRES: f"{expires_at:.6f}"}
    if told:
        found["Nats-TTL"] = str(max(1, math.ceil(expires_at - now)))
    return found


def expiry(headers: Mapping[str, str]) -> float | None:
    """When the entry of a message is over, in Unix seconds; None: never, as far as it says."""
    try:
        return float(headers[EXPIRES])
    except (KeyError, ValueError):
        return None
