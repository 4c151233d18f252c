"""Does the suite notice? One broken line at a time, in a copy of the project.

    scripts/mutate                      all of `mutants.py`; half an hour on one processor
    scripts/mutate ack lease            those whose names hold one of these

First the tests are run on a copy in which nothing is broken: so what fails then, fails for the
mutant. A test that hangs is caught by its time limit, too. What survives and isn't explained in the
list makes this exit with 1; a copy that can't be tested, with 2.
"""

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from mutants import MUTANTS, plant

ROOT = pathlib.Path(__file__).parents[2]
TEST_SECONDS = 20  # one test
RUN_SECONDS = 60  # all those of a mutant
ALL_SECONDS = 3600  # all of the list, with nothing broken


class Verdict(NamedTuple):
    """What came of one run: caught by a test, or survived, or what kept it from being tested."""

    caught: str | None
    trouble: str
    seconds: float


def judge(mutant, tests, limit):
    """Run these tests in a copy with this mistake; None: with none."""
    begins = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sqlspace-mutant-") as directory:
        copy = pathlib.Path(directory, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        if mutant is not None:
            plant(mutant, copy)
        code, told = _run(copy, tests, limit)
    seconds = time.monotonic() - begins
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", told, re.MULTILINE)
    if code is None:
        return Verdict("the time limit", "", seconds)
    if code == 0:
        return Verdict(None, "", seconds)
    if code == 1 and failed:
        return Verdict(failed[1].removeprefix("tests/"), "", seconds)
    if code < 0:
        return Verdict(f"the end of the interpreter ({code})", "", seconds)
    return Verdict(None, told, seconds)


def _run(copy, tests, limit):
    """The exit code of pytest, None if it didn't end in time, and what it told."""
    told = copy / "told"
    with told.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-rfE"),
                *("-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"),
                f"--basetemp={copy / 'base'}",
                *map(_node, tests),
            ],
            cwd=copy,
            # Before what is installed; the tests' children get it from their parent's path.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), _helpers(copy)])},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    return code, told.read_text(encoding="utf-8", errors="backslashreplace")


def _end(process):
    """It, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _helpers(copy):
    return str(copy / "tests" / "helpers")


def _node(test):
    """As pytest has it: `delivery::an_ack_leaves_a_tombstone`, or a whole file."""
    file, _, name = test.partition("::")
    return f"tests/test_{file}.py" + (f"::test_{name}" if name else "")


def what_is_wrong(mutants):
    """What their tests say where nothing is broken; None: nothing."""
    tests = dict.fromkeys(test for each in mutants for test in each.tests)
    verdict = judge(None, tests, ALL_SECONDS)
    return verdict.caught or verdict.trouble or None


def campaign(mutants, processes):
    """Put them to the suite; the exit code."""
    begins = time.monotonic()
    if (complaint := what_is_wrong(mutants)) is not None:
        print(f"with nothing broken: {complaint}")
        return 2
    width = max(len(each.name) for each in mutants)
    survivors, untested = [], []
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        jobs = {pool.submit(judge, each, each.tests, RUN_SECONDS): each for each in mutants}
        for job in concurrent.futures.as_completed(jobs):
            mutant, verdict = jobs[job], job.result()
            if verdict.trouble:
                untested.append(mutant)
                told = f"could not be tested:\n{verdict.trouble}"
            elif verdict.caught:
                told = verdict.caught
            elif mutant.harmless:
                told = f"survived: {mutant.harmless}"
            else:
                survivors.append(mutant)
                told = f"SURVIVED: {mutant.lost}"
            print(f"{mutant.name.ljust(width)} {verdict.seconds:6.1f} s  {told}", flush=True)
    print(
        f"{len(mutants)} mutants, {len(survivors)} survived without an explanation, "
        f"{time.monotonic() - begins:.0f} s"
    )
    return 2 if untested else int(bool(survivors))


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/mutate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant's, or a part of it")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    chosen = [each for each in MUTANTS if any(part in each.name for part in asked.names or [""])]
    if not chosen:
        parser.error(f"no mutant's name holds {' or '.join(asked.names)}")
    if asked.processes < 1:
        parser.error("--processes must be positive")
    return campaign(chosen, asked.processes)


if __name__ == "__main__":
    sys.exit(main())
