"""The benchmark runs: what it says is for its reader to judge, and nothing of it is asserted."""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
SMALL = {
    "rounds": 2,
    "times": 20,
    "seconds": 0.02,
    "rows": 2000,
    "operations": 1000,
    "idle": 0.1,
    "crowd": 20,
}


@pytest.mark.once
def test_the_benchmark_measures_what_it_names(tmp_path):
    """A raw statement that has changed, or a verb, ends it; it leaves no file behind."""
    under_test, into = tmp_path / "under test", tmp_path / "into"
    under_test.mkdir()
    options = [f"--{name}={figure}" for name, figure in SMALL.items()]
    options += ["--quick", f"--folder={under_test}", f"--into={into}"]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = (into / "bench.md").read_text()
    for name in ("push", "pull_many", "64 threads", "'group'", "multiprocessing.Queue", "p99.9"):
        assert name in done.stdout
        assert name in report
    assert list(under_test.iterdir()) == []


def test_the_picture_has_a_bar_for_each_figure(monkeypatch):
    """It is drawn from the rows that the tables show; a peer that isn't there has none."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_picture import PANELS, picture  # noqa: PLC0415  # the line above makes it importable
    from bench_rows import Row  # noqa: PLC0415

    rows = [
        Row("slower", [0.5], bar=(PANELS[0], "a <peer>", "push")),
        Row("faster", [8.0, 9.0, 10.0], bar=(PANELS[0], "a <peer>", "pull")),
        Row("alone", [3.0], bar=(PANELS[3], "another", "push")),
        Row("no bar", [2.0]),
        Row("not installed", [], bar=(PANELS[1], "a third", "push")),
    ]
    drawn = ET.fromstring(picture(rows, "a machine"))
    texts = ["".join(each.itertext()) for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a machine", PANELS[0], PANELS[3], "a <peer>", "another"} <= set(texts)
    assert [text for text in texts if text in {"0.50", "9.00", "3.00"}] == ["0.50", "9.00", "3.00"]
    assert not {PANELS[1], "a third", "2.00"} & set(texts)
    assert picture(rows[3:], "a machine") is None
