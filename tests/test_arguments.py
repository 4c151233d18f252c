"""Durations, as callers give them and as the file has them."""

import math
from fractions import Fraction

import pytest

from sqlspace.arguments import (
    LONGEST_MICROS,
    check_delay_micros,
    check_lease_micros,
    check_ttl_micros,
)


def delay_micros(delay):
    return check_delay_micros(delay, None)


SECONDS_AND_MICROS = [(1, 1_000_000), (0.1, 100_000), (Fraction(1, 8), 125_000), (1.5e-6, 2)]


@pytest.mark.parametrize("check", [check_ttl_micros, delay_micros, check_lease_micros])
@pytest.mark.parametrize(("seconds", "micros"), SECONDS_AND_MICROS)
def test_a_duration_is_whole_microseconds(check, seconds, micros):
    """SQLite's STRICT column takes an int; half a microsecond is nobody's business."""
    found = check(seconds)
    assert found == micros
    assert type(found) is int


@pytest.mark.parametrize("check", [check_ttl_micros, delay_micros, check_lease_micros])
def test_a_duration_neither_vanishes_nor_overflows(check):
    """What is more than 0 stays so; twice the longest, from now on, fits into int64."""
    assert check(1e-300) == check(5e-324) == 1
    assert check(1e300) == check(10**300) == LONGEST_MICROS
    assert 10 * LONGEST_MICROS < 1 << 63


def test_what_has_no_end_and_what_is_no_delay():
    """A ttl may be infinite, which is none; a delay may be none, which is 0."""
    assert check_ttl_micros(None) is check_ttl_micros(math.inf) is check_ttl_micros(10**400) is None
    assert delay_micros(None) == delay_micros(0) == delay_micros(-0.0) == 0


@pytest.mark.parametrize("delay", [2, 2.0000001, 1e300])
def test_a_delay_ends_before_the_ttl_does(delay):
    """Otherwise the entry would expire before anybody could have it."""
    with pytest.raises(ValueError, match="delay must be less than ttl"):
        check_delay_micros(delay, check_ttl_micros(2))
    assert check_delay_micros(1.999999, check_ttl_micros(2)) == 1_999_999


BAD = {
    "str": ("1", TypeError, "must be seconds as a number.*, not str"),
    "bool": (True, TypeError, "must be seconds as a number.*, not bool"),
    "complex": (1j, TypeError, "must be seconds as a number.*, not complex"),
    "negative": (-0.1, ValueError, r"must be 0 or more seconds, not -0\.1"),
    "NaN": (math.nan, ValueError, "must be 0 or more seconds, not nan"),
    "far below 0": (-(10**400), ValueError, "must be 0 or more seconds, not -1000"),
}


@pytest.mark.parametrize("check", [check_ttl_micros, delay_micros, check_lease_micros])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_duration_is_refused(check, name):
    """With the argument's name, and the kind or the value."""
    value, error, message = BAD[name]
    with pytest.raises(error, match=message):
        check(value)


def test_each_kind_of_duration_has_its_own_bounds():
    """A ttl is more than 0, a delay finite, a lease both; and a lease can't be left out."""
    with pytest.raises(ValueError, match="ttl must be more than 0 seconds"):
        check_ttl_micros(0)
    with pytest.raises(ValueError, match="delay must be finite, not inf"):
        delay_micros(math.inf)
    for lease in (0, math.inf, 10**400):
        with pytest.raises(ValueError, match="lease must be more than 0 seconds and finite"):
            check_lease_micros(lease)
    with pytest.raises(TypeError, match="lease must be seconds as a number, not NoneType"):
        check_lease_micros(None)
