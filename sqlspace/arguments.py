"""What callers hand in, checked once, before anything is touched.

Every function returns the value in the one form the rest of the package uses, or raises
`TypeError` or `ValueError` with the argument's name and the kind of the value it got.
"""

import json
import math
import numbers
from collections.abc import Iterable

__all__ = [
    "check_callable",
    "check_delay_micros",
    "check_flag",
    "check_headers",
    "check_int",
    "check_key",
    "check_keys",
    "check_lease_micros",
    "check_payload",
    "check_payloads",
    "check_size",
    "check_timeout",
    "check_ttl",
    "check_ttl_micros",
    "good_keys",
    "kind",
    "nameable",
    "shown",
]

KEY_BYTES = 1024
ROW_BYTES = 1_000_000_000  # SQLite's default limit of a row (SQLITE_MAX_LENGTH)

# The longest duration in the file, 1,000 years: twice as much, counted from any clock, fits int64.
LONGEST_MICROS = 31_557_600_000_000_000

good_keys: set[str] = set()  # those checked before; it saves a call to ask it before check_key
_GOOD_KEYS = 4096

# The row's other columns at their longest, those included that it gets later: a dedupe of 1,024
# bytes, and the headers of a dead letter, in which its key is named and each byte may be escaped.
ROW_OVERHEAD = 8192
_SHOWN = 100  # characters of a value in an error message


def kind(value: object) -> str:
    """How error messages name the kind of a value: its class."""
    return type(value).__name__


def shown(value: object) -> str:
    """How error messages show a value: in full, unless that would be a flood."""
    try:
        text = ascii(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        return f"{kind(value)} of more digits than can be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_key(key: object, argument: str = "key") -> str:
    """A key: a str of 1 to 1,024 bytes in UTF-8, no NUL, no lone surrogate."""
    if type(key) is not str:
        if not isinstance(key, str):
            raise TypeError(f"{argument} must be str, not {kind(key)}")
        key = str.__str__(key)  # a subclass may answer the questions below as it likes
    if key in good_keys:
        return key
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{argument} holds a lone surrogate: {shown(key)}") from None
    if not size:
        raise ValueError(f"{argument} must not be the empty str")
    if size > KEY_BYTES:
        raise ValueError(f"{argument} must be at most {KEY_BYTES:,} bytes in UTF-8, not {size:,}")
    if "\0" in key:
        raise ValueError(f"{argument} must not hold a NUL character: {shown(key)}")
    if len(good_keys) >= _GOOD_KEYS:
        good_keys.clear()
    good_keys.add(key)
    return key


def nameable(key: bytes | None) -> str | None:
    """A key as it stands in the file, unless somebody else's SQL made it one that no verb takes."""
    if key is None:
        return None
    try:
        return check_key(key.decode())
    except ValueError:
        return None


def check_keys(keys: object, argument: str = "keys") -> list[str]:
    """One or more keys, in the order given."""
    if isinstance(keys, str | bytes | memoryview) or not isinstance(keys, Iterable):
        raise TypeError(f"{argument} must be an iterable of str, not {kind(keys)}")
    checked = [check_key(key, f"{argument}[{index}]") for index, key in enumerate(keys)]
    if not checked:
        raise ValueError(f"{argument} must name at least one key")
    return list(dict.fromkeys(checked))


def check_payload(payload: object, argument: str = "payload") -> bytes:
    """A payload: anything bytes-like, copied."""
    if type(payload) is bytes:
        return payload
    try:
        view = memoryview(payload)  # type: ignore[arg-type]  # asking is the check
    except TypeError:
        raise TypeError(f"{argument} must be bytes-like, not {kind(payload)}") from None
    except (ValueError, BufferError) as error:  # a memoryview that was released
        raise ValueError(f"{argument} can't be read, a {kind(payload)}: {error}") from None
    with view:
        return view.tobytes()


def check_payloads(key: str, payloads: object) -> list[bytes]:
    """Several payloads for one key: an iterable of bytes-likes, copied."""
    if isinstance(payloads, bytes | bytearray | memoryview | str) or not hasattr(
        payloads, "__iter__"
    ):
        raise TypeError(f"payloads must be an iterable of bytes-like, not {kind(payloads)}")
    checked = []
    for index, payload in enumerate(payloads):
        argument = f"payloads[{index}]"
        checked.append(check_payload(payload, argument))
        check_size(key, checked[-1], None, argument)
    return checked


def check_size(key: str, payload: bytes, headers: str | None, argument: str = "payload") -> None:
    """Refuse what doesn't fit into one row of SQLite."""
    if len(payload) < ROW_BYTES // 4 and headers is None:
        return
    room = ROW_BYTES - ROW_OVERHEAD - len(key.encode()) - len((headers or "").encode())
    if len(payload) > room:
        raise ValueError(f"{argument} must be at most {room:,} bytes here, not {len(payload):,}")


def check_headers(headers: object) -> str | None:
    """Headers: a dict of str to str, as JSON; None if there are none."""
    if headers is None:
        return None
    if not isinstance(headers, dict):
        raise TypeError(f"headers must be dict[str, str] or None, not {kind(headers)}")
    headers = dict.copy(headers)  # what it holds now, whatever it says of that later
    for name, value in headers.items():
        if not isinstance(name, str):
            raise TypeError(f"headers must have str as names, not {kind(name)}")
        if not isinstance(value, str):
            raise TypeError(f"headers[{shown(name)}] must be str, not {kind(value)}")
    if not headers:
        return None
    text = json.dumps(headers, ensure_ascii=False, separators=(",", ":"))
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("headers hold a lone surrogate") from None
    if size > ROW_BYTES // 2:
        raise ValueError(f"headers must be at most {ROW_BYTES // 2:,} bytes as JSON, not {size:,}")
    return text


def check_flag(value: object, argument: str) -> bool:
    """True or False, and nothing that is merely true or false."""
    if value is not True and value is not False:
        raise TypeError(f"{argument} must be bool, not {kind(value)}")
    return value


def check_callable(value: object, argument: str) -> None:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(f"{argument} must be callable, not {kind(value)}")


def check_int(value: object, argument: str, least: int) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be int, not {kind(value)}")
    number = int.__int__(value)  # a subclass may say that it is another
    if number < least:
        raise ValueError(f"{argument} must be at least {least}, not {shown(value)}")
    return number


def check_timeout(timeout: object, argument: str = "timeout") -> float | None:
    """Seconds to wait, or None for ever.

    Raises:
        TypeError, ValueError: not a number; negative or NaN.
    """
    if timeout is None:
        return None
    seconds = _seconds(timeout, argument, "seconds as a number or None")
    return None if math.isinf(seconds) else seconds


def check_ttl(ttl: object, argument: str = "ttl") -> float | None:
    """Seconds to live, above 0; None or infinity is for ever."""
    seconds = check_timeout(ttl, argument)
    if seconds == 0:
        raise ValueError(f"{argument} must be more than 0 seconds")
    return seconds


def check_ttl_micros(ttl: object, argument: str = "ttl") -> int | None:
    """Seconds to live, above 0, as the file has them: microseconds, or None for ever."""
    seconds = check_ttl(ttl, argument)
    return None if seconds is None else _micros(seconds)


def check_delay_micros(delay: object, ttl_micros: int | None, argument: str = "delay") -> int:
    """Seconds until an entry is ready, as the file has them: microseconds, 0 if there is no delay.

    Args:
        delay: A finite number, or None.
        ttl_micros: As `check_ttl_micros` returned it: what expires before it is ready is refused.
        argument: Its name.
    """
    if delay is None:
        return 0
    seconds = _seconds(delay, argument, "seconds as a number or None")
    if math.isinf(seconds):
        raise ValueError(f"{argument} must be finite, not {shown(delay)}")
    micros = _micros(seconds) if seconds else 0
    if ttl_micros is not None and micros >= ttl_micros:
        raise ValueError(
            f"{argument} must be less than ttl, or the entry expires before it is ready: "
            f"{micros / 1e6:g} s are not less than {ttl_micros / 1e6:g} s"
        )
    return micros


def check_lease_micros(lease: object, argument: str = "lease") -> int:
    """Seconds of a lease, above 0 and finite, as the file has them: microseconds."""
    seconds = _seconds(lease, argument, "seconds as a number")
    if not seconds or math.isinf(seconds):
        raise ValueError(f"{argument} must be more than 0 seconds and finite, not {shown(lease)}")
    return _micros(seconds)


def _seconds(value: object, argument: str, wanted: str) -> float:
    """A number of 0 or more, infinity included."""
    # Mostly it is a float; to ask an ABC takes 0.3 µs.
    seconds = value if type(value) is float else _float(value, argument, wanted)
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"{argument} must be 0 or more seconds, not {shown(value)}")
    return seconds


def _float(value: object, argument: str, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be {wanted}, not {kind(value)}")
    try:
        return float(value)
    except OverflowError:  # beyond every clock; typeshed's Real has no order
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def _micros(seconds: float) -> int:
    """At least 1, for a duration that is there must not vanish; at most `LONGEST_MICROS`."""
    return max(1, round(min(seconds * 1e6, LONGEST_MICROS)))
