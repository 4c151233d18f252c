"""What an entry is, by its row and the clock: the words of which the statements are made.

`migrations/0002_clock.sql` says what they mean. ?1 is now, in every statement that uses them.
"""

from .arguments import KEY_BYTES

__all__ = [
    "DEAD",
    "DIED_FIRST",
    "GRACE_MICROS",
    "HELD",
    "LAST",
    "LAST_LEASE",
    "LEASED",
    "LIVE",
    "LONGEST_WITH_DEAD",
    "NO_SEQ",
    "OVER",
    "UNEXPIRED",
    "dead_key",
]

UNEXPIRED = "(expires_at IS NULL OR expires_at > ?1 AND lives_since <= ?1)"
HELD = "(until_at > ?1 AND since_at <= ?1)"
OVER = "(until_at <= ?1 OR since_at > ?1)"
LEASED = f"(deadline IS NOT NULL AND {HELD})"
LAST = "(deadline IS NOT NULL AND max_attempts IS NOT NULL AND attempts >= max_attempts)"
LAST_LEASE = "deadline IS NOT NULL AND attempts >= max_attempts AND state < 3"  # as the index says
DIED_FIRST = f"({UNEXPIRED} OR expires_at > deadline)"
LIVE = f"({LEASED} OR {UNEXPIRED} AND NOT {LAST})"


DEAD = "/dead"
LONGEST_WITH_DEAD = KEY_BYTES - len(DEAD)
NO_SEQ = (1 << 62) + 1  # beyond those that a row can have
GRACE_MICROS = 60_000_000  # by so much more than twice its length may an end lie ahead


def dead_key(key: str) -> str | None:
    """Where the dead letters of `key` stand; None if it is too long to have any."""
    return key + DEAD if len(key.encode()) <= LONGEST_WITH_DEAD else None
