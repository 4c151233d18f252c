"""`sqlspace` and `python -m sqlspace`: the command line, if what it needs is installed.

Nothing else of the package imports `cli` and what it is made of (`looking`, `options`, `running`,
`terminal`, `top`, …), which need click, rich and tenacity; those come with the extra `cli`.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; ends by `SystemExit` with the exit code."""
    try:
        _run()
    except KeyboardInterrupt:  # before there is a command, or after
        sys.exit(130)


def _run() -> None:
    try:
        from . import cli  # noqa: PLC0415  # it imports what need not be installed
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        print(  # noqa: T201  # a command line's word to its user
            f"sqlspace: the command line needs {error.name}: pip install 'sqlspace[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    else:
        cli.run()


if __name__ == "__main__":
    main()
