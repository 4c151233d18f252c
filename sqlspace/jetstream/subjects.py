"""How keys are spelled as subjects: one token each, lossless, and readable where they are plain.

    NAME.key.mail           the entries of "mail"
    NAME.key.a=2Eb          those of "a.b": every byte but letters, digits, - and _ is =XX
    NAME.taken.17           the receipts of the entry with the seq 17
    NAME.sent.FILE.mail     what a store forwarded to "mail" last, by the file's id

Rings stand beside the streams, so that no stream keeps them: `NAME.new.mail`.
"""

import re

from sqlspace.arguments import kind, shown

__all__ = ["Subjects", "decoded", "encoded"]

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_SPELLED = [chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in range(256)]
_is_plain = re.compile(r"[A-Za-z0-9_-]+").fullmatch
# With the longest key, three characters a byte, a subject stays below the 4,096 bytes that a server
# reads as one line of the protocol.
_NAME_CHARACTERS = 128


def encoded(key: str) -> str:
    """A key as one token of a subject."""
    if _is_plain(key):
        return key
    return "".join([_SPELLED[byte] for byte in key.encode()])


def decoded(token: str) -> str:
    """The key that `encoded` has made this of."""
    return re.sub(
        rb"=(..)", lambda found: bytes.fromhex(found[1].decode()), token.encode()
    ).decode()


class Subjects:
    """The names of one space's streams and subjects.

    Args:
        name: The stream's, 1 to 128 letters, digits, - and _.
    """

    def __init__(self, name: object) -> None:
        if not isinstance(name, str):
            raise TypeError(f"stream must be str, not {kind(name)}")
        if not _is_plain(name) or not name.isascii() or len(name) > _NAME_CHARACTERS:
            raise ValueError(
                f"stream must be 1 to {_NAME_CHARACTERS} letters, digits, - and _, "
                f"not {shown(name)}"
            )
        self.entries = name  # the stream of the entries
        self.receipts = f"{name}-taken"  # the stream of the receipts
        self.all_entries = f"{name}.key.*"
        self.all_receipts = f"{name}.taken.*"
        self.all_rings = f"{name}.new.{{{{wildcard(1)}}}}"  # as a stream's republish has it
        self.all_positions = f"{name}.sent.*.*"
        self._entry = f"{name}.key."
        self._position = f"{name}.sent."
        self._receipt = f"{name}.taken."
        self._ring = f"{name}.new."

    def entry(self, key: str) -> str:
        """Where the entries of `key` are published."""
        return self._entry + encoded(key)

    def ring(self, key: str) -> str:
        """Where it rings when `key` gets an entry."""
        return self._ring + encoded(key)

    def position(self, file_id: str, key: str) -> str:
        """Where it is written what the store of this file has sent to `key` last."""
        return f"{self._position}{file_id}.{encoded(key)}"

    def receipt(self, seq: int) -> str:
        """Where it is written who has taken the entry `seq`."""
        return f"{self._receipt}{seq}"

    def seq_of(self, receipt: str) -> int:
        """The entry that a receipt is of."""
        return int(receipt[len(self._receipt) :])
