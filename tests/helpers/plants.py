"""Bugs to plant in a storm's workers: a judge that doesn't find them is worth nothing."""

import queue
import threading
import time

from sqlspace import DeadlineError, entries, upkeep
from sqlspace.store import Store

__all__ = ["PLANTS"]


def return_early():
    """A pull returns its payload, and then commits the tombstone."""

    def pullp(store, key):
        found = queue.SimpleQueue()

        def take():
            try:
                with store.transaction() as together:
                    found.put(together.pullp(key))
                    time.sleep(0.005)
            except BaseException as error:  # on the way in
                found.put(error)

        threading.Thread(target=take, daemon=True).start()
        payload = found.get()
        if isinstance(payload, BaseException):
            raise payload
        return payload

    def pull(store, key, _timeout):
        payload = pullp(store, key)
        if payload is None:
            raise DeadlineError
        return payload

    Store.pullp, Store.pull = pullp, pull


def ack_without_token():
    """Who was frozen past a lease settles the work of another."""
    entries.ACK = entries.ACK.replace("token = ?3", "?3 NOTNULL")


def reuse_seqs():
    """A clear, the history and compact delete the row with the highest seq, too."""
    lowest = "seq < (SELECT max(seq) FROM sqlspace_entries)"
    for name in ("DELETE_KEY", "DELETE_TAKEN"):
        setattr(upkeep, name, getattr(upkeep, name).replace(lowest, "seq NOTNULL"))


def last_first():
    """The newest entry is the head."""
    for name in ("SELECT_HEAD", "SELECT_HEADS", "HEAD", "TAKE", "LEASE"):
        sql = getattr(entries, name)
        setattr(entries, name, sql.replace("ORDER BY seq", "ORDER BY seq DESC"))


PLANTS = {
    "return-early": return_early,
    "ack-without-token": ack_without_token,
    "reuse-seqs": reuse_seqs,
    "last-first": last_first,
}
