"""Pages of documentation as programs: their Python run, and what their comments say compared.

The comment behind an expression is what the expression must give, if it begins with a literal
(`# b'hello'`, `# None; not yet`), or what it must raise, if it begins with the name of an exception
(`# DeadlineError after a second`). Other comments are for people alone.
"""

import ast
import builtins
import contextlib
import io
import re
import tokenize
from typing import NamedTuple

import sqlspace

__all__ = ["Block", "Page", "blocks", "run"]


class Block(NamedTuple):
    """What stands in a fence."""

    heading: str
    kind: str
    line: int  # of the page, that of its first line
    text: str


def blocks(page):
    """All blocks of a page, in order."""
    found, heading, fence = [], "", None
    for number, line in enumerate(page.splitlines(), 1):
        if fence is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif fence is None and line.startswith("```"):
            fence = (line.removeprefix("```"), number + 1, [])
        elif fence is not None and line == "```":
            kind, first, lines = fence
            found.append(Block(heading, kind, first, "\n".join(lines) + "\n"))
            fence = None
        elif fence is not None:
            fence[2].append(line)
    assert fence is None, f"{heading}: a fence that isn't closed"
    return found


class Page:
    """The names of one program, and how many of its comments were compared."""

    def __init__(self):
        self.names = {"__name__": "__main__", "_ensure": self._ensure, "_raises": self._raises}
        self.compared = 0

    def run(self, text, line=1):
        """Run a block as it stands; AssertionError if a comment of it says what isn't so."""
        tree = ast.parse("\n" * (line - 1) + text)
        tree = ast.fix_missing_locations(_Comparing(_comments(text, line)).visit(tree))
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, "the page", "exec"), self.names)

    def _ensure(self, found, expected, line):
        self.compared += 1
        assert type(found) is type(expected), f"line {line}: {found!r} is no {expected!r}"
        assert found == expected, f"line {line}: {found!r} instead of {expected!r}"

    @contextlib.contextmanager
    def _raises(self, name, line):
        self.compared += 1
        try:
            yield
        except Exception as error:
            assert type(error).__name__ == name, f"line {line}: {error!r} is no {name}"
        else:
            raise AssertionError(f"line {line}: no {name} was raised")


def _comments(text, line):
    """By the number of their line."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        token.start[0] + line - 1: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }


class _Comparing(ast.NodeTransformer):
    """Has each expression with such a comment compared with it."""

    def __init__(self, comments):
        self.comments = comments

    def visit_Expr(self, node):
        comment = self.comments.get(node.end_lineno, "")
        line = ast.Constant(node.lineno)
        name = (re.match(r"\w+", comment) or [""])[0]
        kind = getattr(sqlspace, name, getattr(builtins, name, None))
        if isinstance(kind, type) and issubclass(kind, Exception):
            call = ast.Call(ast.Name("_raises", ast.Load()), [ast.Constant(name), line], [])
            new = ast.With([ast.withitem(call)], [node])
        else:
            try:
                literal = ast.parse(comment.split(";")[0], mode="eval").body
                ast.literal_eval(literal)
            except (SyntaxError, ValueError):
                return node
            arguments = [node.value, literal, line]
            new = ast.Expr(ast.Call(ast.Name("_ensure", ast.Load()), arguments, []))
        return ast.copy_location(new, node)


def run(hear, tell):
    """In a child: run what it hears, until it is told to end; tells how many it has compared."""
    import json  # noqa: PLC0415  # only here
    import logging  # noqa: PLC0415

    logging.getLogger("sqlspace").addHandler(logging.NullHandler())
    page = Page()
    while (heard := hear()) != "end":
        text, line = json.loads(heard)
        page.run(text, line)
        tell("ran", page.compared)
