"""What users install is the wheel, not the checkout."""

import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(*command: object, cwd: pathlib.Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The project's wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    run(*command, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.once
@pytest.mark.timeout(300)
def test_the_wheel_works_in_an_empty_environment_away_from_the_checkout(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Installed with its extra `cli`, it applies the migrations and runs the command line."""
    empty = tmp_path / "empty"
    run(sys.executable, "-m", "venv", "--without-pip", empty, cwd=tmp_path)
    python = empty / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-q", f"{wheel}[cli]"),
        cwd=tmp_path,
    )
    code = "import sqlspace, sys; print(sqlspace.__file__); sqlspace.open('a.db').close()"
    assert str(empty) in run(python, "-c", code, cwd=tmp_path)
    database = tmp_path / "b.db"
    run(empty / "bin" / "sqlspace", "push", database, "mail", "hello", cwd=tmp_path)
    assert "mail" in run(empty / "bin" / "sqlspace", "stats", database, cwd=tmp_path)
    assert "hello" in run(python, "-m", "sqlspace", "pull", database, "mail", cwd=tmp_path)


def test_the_wheel_holds_the_package_its_types_and_its_migrations_and_nothing_else(
    wheel: pathlib.Path,
) -> None:
    """A wheel without the migrations can open nothing; one with the tests is untidy."""
    names = zipfile.ZipFile(wheel).namelist()
    migrations = sorted(path.name for path in (ROOT / "migrations").glob("*.sql"))
    held = sorted(
        name.rpartition("/")[2] for name in names if name.startswith("sqlspace/migrations/")
    )
    assert held == migrations
    assert "sqlspace/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sqlspace"}


def test_the_core_needs_apsw_and_inotify_and_imports_no_more() -> None:
    """Neither the command line's nor JetStream's libraries are the core's business."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(need.split(">")[0] for need in project["dependencies"]) == [
        "apsw",
        "inotify-simple",
    ]
    code = (
        "import sys, sqlspace; from sqlspace import testing; "
        "print(sorted({'click', 'rich', 'nats', 'sqlite3'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_the_top_level_holds_what_it_shall_hold() -> None:
    """The project's rooms are fixed, so that everybody finds their way."""
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    allowed = {"pyproject.toml", "sqlspace", "migrations", "tests", "scripts", "README.md"}
    assert top - {"dist"} == allowed | {"LICENSE", "CHANGELOG.md"}
