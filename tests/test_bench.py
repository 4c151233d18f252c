"""The benchmark runs: what it says is for its reader to judge, and nothing of it is asserted."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.once
def test_the_benchmark_measures_what_it_names(tmp_path):
    """A raw statement that has changed, or a verb, ends it; it leaves no file behind."""
    options = ["--rounds", "2", "--times", "20", "--rows", "2000", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("push", "pull", "claim", "ack", "multiprocessing.Queue"):
        assert name in done.stdout
    assert list(tmp_path.iterdir()) == []
