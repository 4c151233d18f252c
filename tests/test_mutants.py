"""The list of broken lines fits the code and the suite; `scripts/mutate` breaks them."""

import collections
import pathlib

import pytest
from mutants import MUTANTS, place

ROOT = pathlib.Path(__file__).parent.parent


def test_every_broken_line_stands_once_and_is_still_python():
    """Else it breaks nothing, or not what it says, and its survival would prove nothing."""
    for mutant in MUTANTS:
        path = place(mutant, ROOT)
        text = path.read_text(encoding="utf-8")
        broken = text.replace(mutant.old, mutant.new)
        assert broken != text, mutant.name
        compile(broken, f"{mutant.name} in {path.name}", "exec")


def test_every_test_that_shall_notice_is_there():
    """A name without a test, and pytest runs none of the others either."""
    texts = {
        path.stem.removeprefix("test_"): path.read_text(encoding="utf-8")
        for path in ROOT.glob("tests/test_*.py")
    }
    for mutant in MUTANTS:
        for file, _, name in (test.partition("::") for test in mutant.tests):
            assert file in texts, mutant.name
            assert not name or f"def test_{name}(" in texts[file], mutant.name


def test_every_mutant_has_a_name_of_its_own():
    """The table tells by names."""
    counted = collections.Counter(mutant.name for mutant in MUTANTS)
    assert max(counted.values()) == 1, counted.most_common(3)


def test_a_line_that_stands_twice_or_not_at_all_is_refused():
    """What is broken is never a matter of luck."""
    for wrong in ("no such line", "import"):
        with pytest.raises(AssertionError, match="stands in"):
            place(MUTANTS[0]._replace(old=wrong), ROOT)
