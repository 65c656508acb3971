"""The sessions of one connection, which end together when it fails."""

from __future__ import annotations

import pytest

from aiouffd.errors import UffdError
from aiouffd.session_states import State
from aiouffd.sources.buffer import BufferSource
from aiouffd.together import Together
from tests.session_serving import model, served


async def test_one_that_cannot_be_closed_leaves_no_other_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told; the others are closed all the same."""
    source = BufferSource(model(4))
    async with served(source, pages=4) as (_, stuck), served(source, pages=4) as (_, other):

        async def refuse(_action: object = None) -> None:
            raise UffdError("it cannot be settled")

        together = Together()
        together.sessions += [stuck, other]
        with monkeypatch.context() as patched:
            patched.setattr(stuck, "aclose", refuse)
            await together.give_up(0.01)
        assert other.state is State.FAILED
        assert "could not be closed as asked" in caplog.text
        assert "it cannot be settled" in caplog.text
