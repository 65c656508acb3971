"""Pasting: an order that was found, as the text of a test that makes it again.

Knows: an order and where its steps came to; the source around the call that found it.
Must not know: threads, memory, any system call; how the source is found (``interleaving``).

Laws of this file:

* Where the call stands in a test, the text is that test, with the one call replaced: the same
  names mean the same there.  It needs no import that the test's file does not have.
* What came after the call is kept only if it does not depend on what the call gave.
* Each step says in a comment what its participant stands before when the next one takes over.
"""

from __future__ import annotations

import ast
import textwrap
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .schedules import Move, Step, runs_of

#: What a call of explore() may say that is nothing to one of interleave().
OF_EXPLORING: Final = frozenset({"preemptions", "orders", "seconds", "seed"})


@dataclass(frozen=True, slots=True)
class Span:
    """Where a piece of source is: lines counted from 1, columns in bytes of UTF-8, from 0."""

    line: int
    end_line: int
    column: int
    end_column: int


def as_order(steps: Iterable[tuple[Step, Move]]) -> str:
    """Write an order as the lines of a list, with a comment after each step."""
    lines = ["["]
    for (name, until), move in steps:
        lines.append(f'    ("{name}", {_quoted(until)}),')
        lines.append(f"    # {name} {move.after}")
    return "\n".join([*lines, "]"])


def _quoted(until: object) -> str:
    return f'"{until}"' if isinstance(until, str) else str(until)


def as_test(moves: Iterable[Move], *, why: str, source: str = "", place: Span | None = None) -> str:
    """Write the test.

    Args:
        moves: What happened.
        why: What was wrong then; it goes into a comment.
        source: The whole text of the file that the call stands in.
        place: Where in it.  Without source and place, or if the call stands in no test, names
            have to be filled in.
    """
    steps = list(runs_of(moves))
    order = as_order(steps)
    name = f"order_{zlib.crc32(repr([step for step, _ in steps]).encode()) & 0xFFFF:04x}"
    found = "".join(
        f"# {line}".rstrip() + "\n" for line in f"Found by explore(): {why}".splitlines()
    )
    around = None if place is None else _around(source, place)
    return found + (_bare(order, name, steps) if around is None else around.written(order, name))


def _bare(order: str, name: str, steps: Iterable[tuple[Step, Move]]) -> str:
    names = ", ".join(f'"{each}": {each}' for each in dict.fromkeys(step[0] for step, _ in steps))
    arguments = [f"{{{names}}}", f"order={order}", "reset=reset", "check=check"]
    return f"def test_{name}(uffd):\n{_call('uffd.interleave', arguments, 4)}"


def _call(callee: str, arguments: Iterable[str], indent: int) -> str:
    lines = "".join(f"{argument},\n" for argument in arguments)
    return textwrap.indent(f"{callee}(\n{textwrap.indent(lines, '    ')})\n", " " * indent)


@dataclass(frozen=True, slots=True)
class _Around:
    """A test's text around what is to be replaced."""

    test: str  #: its name
    before: str
    indent: int
    callee: str
    arguments: list[str]
    after: str

    def written(self, order: str, name: str) -> str:
        """Put the call in, and give the test a name of its own."""
        first, *others = self.arguments
        call = _call(self.callee, [first, f"order={order}", *others], self.indent)
        before = self.before.replace(f"def {self.test}", f"def {self.test}_{name}", 1)
        return textwrap.dedent(before + call + self.after)


def _around(source: str, place: Span) -> _Around | None:
    """Take a test apart around a call; None if the call is in no test, or cannot be taken out."""
    above = _above(ast.parse(source), place)
    test = next((each for each in reversed(above) if isinstance(each, _FUNCTION)), None)
    if test is None or not test.name.startswith("test"):
        return None
    call = above[-1]
    assert isinstance(call, ast.Call)
    replaced, depends = _replaced(above)
    lines = source.splitlines(keepends=True)
    first = min(each.lineno for each in (test, *test.decorator_list))
    around = _Around(
        test.name,
        "".join(lines[first - 1 : replaced.lineno - 1]),
        replaced.col_offset,
        _text(source, call.func).removesuffix("explore") + "interleave",
        [
            *(_text(source, each) for each in call.args),
            *(
                f"{each.arg}={_text(source, each.value)}"
                for each in call.keywords
                if each.arg not in OF_EXPLORING
            ),
        ],
        "" if depends else "".join(lines[(replaced.end_lineno or 0) : test.end_lineno]),
    )
    try:
        ast.parse(around.written("[]", "order"))
    except SyntaxError:  # what was left out had to be there: an except, say
        return None
    return around


def _above(tree: ast.AST, place: Span) -> list[ast.AST]:
    """List the nodes from the module down to the call; empty if no call is there."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and place == Span(
            node.lineno, node.end_lineno or 0, node.col_offset, node.end_col_offset or 0
        ):
            return [tree, node]
        if inner := _above(node, place):
            return [tree, *inner]
    return []


def _replaced(above: list[ast.AST]) -> tuple[ast.stmt, bool]:
    """Find the statement that the new call replaces, and whether what follows depends on it."""
    statements = [each for each in above if isinstance(each, ast.stmt)]
    for each in statements:
        if isinstance(each, ast.With) and "raises" in ast.unparse(each.items[0]):
            return each, True
    return statements[-1], not isinstance(statements[-1], ast.Expr)


def _text(source: str, node: ast.expr) -> str:
    """Give a node's source, its further lines as far to the left as its first."""
    first, *others = (ast.get_source_segment(source, node) or "").split("\n")
    margin = " " * node.col_offset
    return "\n".join([first, *(line.removeprefix(margin) for line in others)])


_FUNCTION: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
