"""Pasting: what an exploration found is the text of a test that finds it again."""

from __future__ import annotations

import ast
import textwrap

import pytest

from aiouffd.testing.pasting import Span, as_test
from aiouffd.testing.schedules import Move
from aiouffd.testing.strategies import Fixed
from tests.testing.simulated import Program, run


def add_one() -> Program:
    yield "read", "x"
    yield "write", "x"


def moves() -> list[Move]:
    programs = {"a": add_one, "b": add_one}
    return run(programs, Fixed([("a", 1), ("b", "end")], programs)).moves


def pasted(source: str, *, why: str = "1 == 2") -> str:
    """Write the test for the one call of explore in a file."""
    source = textwrap.dedent(source)
    (call,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("explore")
    )
    assert call.end_lineno is not None
    assert call.end_col_offset is not None
    place = Span(call.lineno, call.end_lineno, call.col_offset, call.end_col_offset)
    text = as_test(moves(), why=why, source=source, place=place)
    ast.parse(text)
    return text


def test_a_test_with_its_call_replaced() -> None:
    """The test is as it was, under another name, with the order in place of the exploration."""
    text = pasted(
        '''
        import pytest

        @pytest.mark.limit(5)
        def test_counter(uffd):
            """Two that add one each."""
            region = uffd.region(1, name="é"); lib = load()
            uffd.explore({"a": lambda: lib.add(region),
                          "b": lambda: lib.add(region)},
                         preemptions=1, orders=100,
                         reset=lambda: region.poke(0, bytes(8)),
                         check=check)
            uffd.close()

        def test_other(uffd):
            pass
        ''',
        why="assert 1 == 2\n  where 1 = x\n",
    )
    assert text == textwrap.dedent(
        '''\
        # Found by explore(): assert 1 == 2
        #   where 1 = x
        @pytest.mark.limit(5)
        def test_counter_order_a515(uffd):
            """Two that add one each."""
            region = uffd.region(1, name="é"); lib = load()
            uffd.interleave(
                {"a": lambda: lib.add(region),
                 "b": lambda: lib.add(region)},
                order=[
                    ("a", 1),
                    # a stands before its write of memory+0x0 at write x
                    ("b", "end"),
                    # b has ended
                    ("a", "end"),
                    # a has ended
                ],
                reset=lambda: region.poke(0, bytes(8)),
                check=check,
            )
            uffd.close()
        '''
    )


def test_what_depends_on_the_exploration_goes() -> None:
    """Where the call's value is used, the call alone is left and what follows is not."""
    text = pasted(
        """
        class TestAll:
            async def test_counter(self, uffd):
                found = uffd.explore(participants, check=check)
                assert found.orders == 5
        """
    )
    assert "async def test_counter_order_" in text
    assert "found" not in text
    assert text.endswith("        check=check,\n    )\n")
    assert "\n    uffd.interleave(\n" in text


def test_what_waits_for_the_race_goes() -> None:
    """A test that expects a race to be found becomes one that expects none."""
    text = pasted(
        """
        def test_counter(uffd):
            with uffd.record():
                with pytest.raises(RaceFound) as found:
                    uffd.explore(participants, check=check)
            print(found.value.test)
        """
    )
    assert "raises" not in text
    assert "print" not in text
    assert "    with uffd.record():\n        uffd.interleave(\n" in text


@pytest.mark.parametrize(
    "source",
    [
        "uffd.explore(participants)",
        "def helper(uffd):\n    uffd.explore(participants)",
        "def test_x(uffd):\n    def helper():\n        uffd.explore(participants)\n    helper()",
        "def test_x(uffd):\n  try:\n   _ = uffd.explore(participants)\n  finally:\n   0",
    ],
)
def test_a_call_in_no_test(source: str) -> None:
    """Outside of tests, and where it cannot be taken out, there are names to fill in."""
    assert pasted(source) == BARE


def test_no_source() -> None:
    """Where there is no source, or the call is not in it, there are names to fill in as well."""
    assert as_test(moves(), why="1 == 2") == BARE
    assert as_test(moves(), why="1 == 2", source="x()", place=Span(1, 1, 0, 9)) == BARE


BARE = """\
# Found by explore(): 1 == 2
def test_order_a515(uffd):
    uffd.interleave(
        {"a": a, "b": b},
        order=[
            ("a", 1),
            # a stands before its write of memory+0x0 at write x
            ("b", "end"),
            # b has ended
            ("a", "end"),
            # a has ended
        ],
        reset=reset,
        check=check,
    )
"""
