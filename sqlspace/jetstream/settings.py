"""What a space over JetStream is made with, and what its streams are like."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from sqlspace.arguments import check_callable, check_int, check_timeout, kind, shown

from .connection import connect_options
from .subjects import Subjects

__all__ = ["NANOSECONDS", "Settings", "differences"]

NANOSECONDS = 1_000_000_000  # a second, as JetStream has durations
_OURS = frozenset(
    {
        *("servers", "error_cb", "disconnected_cb", "reconnected_cb", "closed_cb"),
        *("allow_reconnect", "max_reconnect_attempts", "no_echo"),
    }
)


class Settings:
    """What a space over JetStream is made with, checked before anything is touched."""

    def __init__(
        self,
        *,
        servers: object,
        stream: object,
        dumps: Callable[[Any], bytes],
        loads: Callable[[bytes], Any],
        replicas: object,
        storage: object,
        max_bytes: object,
        max_msgs: object,
        patience: object,
        connect: dict[str, Any],
    ) -> None:
        self.servers = _check_servers(servers)
        self.subjects = Subjects(stream)
        check_callable(dumps, "dumps")
        check_callable(loads, "loads")
        self.dumps, self.loads = dumps, loads
        self.replicas = check_int(replicas, "replicas", 1)
        if storage not in ("file", "memory"):
            raise ValueError(f"storage must be 'file' or 'memory', not {shown(storage)}")
        self.storage = storage
        self.max_bytes = -1 if max_bytes is None else check_int(max_bytes, "max_bytes", 1)
        self.max_msgs = -1 if max_msgs is None else check_int(max_msgs, "max_msgs", 1)
        seconds = check_timeout(patience, "patience")
        if not seconds:
            raise ValueError(f"patience must be more than 0 seconds and finite, not {patience}")
        self.patience = seconds
        known = connect_options()
        for name in connect:
            if name in _OURS or name not in known:
                raise TypeError(f"{name} is no option of a connection here")
        self.connect = connect

    @property
    def streams(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The streams of the entries and of the receipts, as they should be."""
        both = {
            "retention": "limits",
            "storage": self.storage,
            "num_replicas": self.replicas,
            "max_age": 0,
            "max_msgs_per_subject": -1,
            "discard": "new",
        }
        entries = {
            "name": self.subjects.entries,
            "subjects": [self.subjects.all_entries, self.subjects.all_positions],
            **both,
            "max_bytes": self.max_bytes,
            "max_msgs": self.max_msgs,
            "allow_direct": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_rollup_hdrs": True,  # for the positions
            "duplicate_window": max(120, math.ceil(4 * self.patience)) * NANOSECONDS,
            "republish": {
                "src": self.subjects.all_entries,
                "dest": self.subjects.all_rings,
                "headers_only": True,
            },
        }
        receipts = {
            "name": self.subjects.receipts,
            "subjects": [self.subjects.all_receipts],
            **both,
        }
        return entries, receipts


def differences(wanted: dict[str, Any], config: dict[str, Any]) -> str:
    """How a stream that is there differs where it matters, or ""."""
    sizes = {"name", "storage", "num_replicas", "max_bytes", "max_msgs", "duplicate_window"}
    sizes |= {"allow_atomic", "allow_msg_ttl"}  # what a server may lack, and some verbs only need
    must = {name: value for name, value in wanted.items() if name not in sizes}
    must |= {"deny_delete": False, "deny_purge": False, "sealed": False, "mirror": None}
    found = []
    for name, value in must.items():
        there = config.get(name, None if value is None else type(value)())
        if name == "republish" and isinstance(there, dict):
            there = {part: there.get(part) for part in value}
        if there != value:
            found.append(f"{name} is {there!r}, not {value!r}")
    return ", ".join(found)


def _check_servers(servers: object) -> list[str]:
    found = [servers] if isinstance(servers, str) else servers
    if not isinstance(found, Sequence) or isinstance(found, bytes | bytearray | memoryview):
        raise TypeError(f"servers must be str or several of them, not {kind(servers)}")
    if not found:
        raise ValueError("servers must name at least one")
    for server in found:
        if not isinstance(server, str):
            raise TypeError(f"servers must be str, not {kind(server)}")
    return list(found)
