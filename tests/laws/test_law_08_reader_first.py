"""Law 8: remove the reader before closing the descriptor."""

from __future__ import annotations

import asyncio
import os

from aiouffd import Action, Mode, Userfaultfd, readiness
from tests.serving import image, serving
from tests.targets import until


async def test_a_closed_pagers_descriptor_number_is_nobodys() -> None:
    """The number's next owner gets none of the old events, though a duplicate lives on.

    epoll follows the open file: with a reader left behind, a fault of the old userfaultfd would
    call the reader of whatever has got its number.
    """
    loop = asyncio.get_running_loop()
    async with serving() as served:
        target, number = served.target, served.pager.uffd.fileno()
        with Userfaultfd.adopt(served.uffd.dup()) as keeper:
            await served.pager.aclose(Action.ZERO)
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            read: list[bytes] = []
            astray: list[BlockingIOError] = []

            def take() -> None:
                try:
                    read.append(os.read(number, 1))
                except BlockingIOError as error:
                    astray.append(error)

            try:
                if reading != number:
                    os.dup2(reading, number, inheritable=False)
                loop.add_reader(number, take)
                keeper.register(target.base, target.length, Mode.MISSING)
                touch = target.start_read(3)
                await target.blocked()
                assert keeper.info().pending == 1
                os.write(writing, b"x")
                await until(lambda: read, "the new owner's own event arrives")
                os.write(writing, b"y")
                await until(lambda: len(read) == 2, "and the next")
                assert not astray
                loop.remove_reader(number)
                keeper.copy(target.at(3), image(3 * 4096))
                assert await touch == 4
            finally:
                if reading != number:
                    os.close(number)
                os.close(reading)
                os.close(writing)


async def test_the_next_userfaultfd_of_a_number_gets_its_own_events_alone() -> None:
    """All of a loop are in one epoll, which lives on with the others: nothing old may be left.

    A registration left behind bears the old number, and would call who has it now, for ever.
    """
    loop = asyncio.get_running_loop()
    async with serving() as other, serving() as served:
        target, number = served.target, served.pager.uffd.fileno()
        with Userfaultfd.adopt(served.uffd.dup()) as keeper:
            await served.pager.aclose(Action.ZERO)
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            read: list[bytes] = []
            astray: list[BlockingIOError] = []

            def take(_rounds: int) -> int:
                try:
                    read.append(os.read(number, 1))
                except BlockingIOError as error:
                    astray.append(error)
                return 1

            try:
                if reading != number:
                    os.dup2(reading, number, inheritable=False)
                readiness.add_reader(loop, number, take)
                keeper.register(target.base, target.length, Mode.MISSING)
                touch = target.start_read(3)
                await target.blocked()
                assert keeper.info().pending == 1
                os.write(writing, b"x")
                await until(lambda: read, "the new owner's own event arrives")
                assert await other.target.start_read(5) == 6
                assert not astray
                readiness.remove_reader(loop, number)
                keeper.copy(target.at(3), image(3 * 4096))
                assert await touch == 4
            finally:
                if reading != number:
                    os.close(number)
                os.close(reading)
                os.close(writing)


async def test_closed_numbers_have_no_reader_left() -> None:
    """Neither the userfaultfd's nor the pidfd's number is known to the loop afterwards."""
    loop = asyncio.get_running_loop()
    async with serving() as served:
        number = served.uffd.fileno()
        await served.pager.aclose()
        assert served.uffd.closed
        assert not loop.remove_reader(number)
