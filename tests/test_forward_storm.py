"""Forwarders and their server, killed all the while: each entry is in the stream once, in order.

And planted bugs, which a storm must find: else it proves nothing.
"""

import pytest
from forward_storm import PLANTS, judged, storm
from proof import tried

# nats-py leaves those of connections that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")

SEED = 1
STORMS = 8  # the seldom bugs are mostly found in the first


@pytest.mark.once
def test_a_storm_loses_nothing_and_sends_nothing_twice():
    """Two forwarders and a server, killed and frozen at random, and a taker at the stream."""
    problems, counts = storm(messages=12_000, keys=4, kills=8, seed=SEED)
    assert problems == []
    assert counts["taken"] == 12_000
    deaths = f"{counts['forwarder kills']} + {counts['server kills']} kills"
    tried("a kill storm of forwarding", f"12,000 entries, {deaths}", seeds=SEED)


@pytest.mark.once
@pytest.mark.parametrize("plant", PLANTS)
def test_a_storm_finds_a_planted_bug(plant):
    """Each of them within a few storms."""
    for seed in range(SEED, SEED + STORMS):
        problems, _ = storm(messages=4_000, keys=3, kills=4, seed=seed, plant=plant)
        if problems:
            break
    assert problems
    tried(f"a kill storm with the bug {plant}", f"{seed - SEED + 1} storms", found="caught")


def test_the_judge_sees_what_is_lost_doubled_and_misplaced():
    """And nothing where there is nothing."""

    def taken(*numbers):
        return {"a": {seq: b"%d" % number for seq, number in enumerate(numbers)}}

    assert judged({"a": 3}, taken(0, 1, 2)) == []
    assert judged({"a": 3}, taken(0, 2)) == ["a: 1 lost, the first 1"]
    assert judged({"a": 3}, taken(0, 1, 1, 2)) == ["a: 1 sent twice, the first 1"]
    assert judged({"a": 3}, taken(0, 2, 1)) == ["a: 1 out of order, the first 1"]
