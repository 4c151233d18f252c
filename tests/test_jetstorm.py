"""The storm over JetStream, and planted bugs, each of which it must find."""

import pytest
from jetstorm import PLANTS, run
from proof import tried

SEED = 3


@pytest.mark.once
def test_a_storm_over_jetstream_breaks_no_rule(tmp_path):
    """Workers, server and network are killed, frozen and cut: each entry is taken once."""
    problems, counts = run(str(tmp_path), seconds=6.0, seed=SEED)
    assert problems == []
    for what in ("A", "T", "kills", "stops", "server kills", "cuts"):
        assert counts[what], what
    what = f"{counts['T']:,} taken, {counts['kills']} kills, {counts['server kills']} of the server"
    tried("a storm over JetStream", f"{what}, {counts['cuts']} cuts", seeds=SEED)


@pytest.mark.once
@pytest.mark.parametrize("plant", PLANTS)
def test_a_storm_over_jetstream_finds_planted_bugs(tmp_path, plant):
    for seed in (2, 1, 0, 3, 4, 5):
        (tmp_path / str(seed)).mkdir()
        problems, _ = run(str(tmp_path / str(seed)), seconds=2.0, seed=seed, plant=plant)
        if problems:
            tried(f"planted in it: {plant}", "2 s each", seeds=seed, found="caught")
            return
    raise AssertionError(f"{plant} was not found")
