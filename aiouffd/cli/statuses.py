"""Exit statuses: what each number means, and the error that carries one.

Knows: the numbers; docs/reference/command.md has the same table.
Must not know: commands.
"""

from __future__ import annotations

from typing import Final

from ..errors import UffdError

DONE: Final = 0
FAILED: Final = 1  #: an error, said in one line on stderr
USAGE: Final = 2  #: the command line was wrong
CUT_SHORT: Final = 3  #: living targets were closed by the policy: a second SIGTERM
NO_SERVER: Final = 4  #: nobody answers on the control socket
NO_SESSION: Final = 5  #: no such session lives there
REFUSED: Final = 6  #: the server says no, or this user may not ask
STANDS_STILL: Final = 7  #: whether the program runs at the other side is not known
LOST: Final = 8  #: what a program did since it moved is gone
INTERRUPTED: Final = 130  #: Ctrl-C
NO_READER: Final = 141  #: who read the output has gone


class CommandError(UffdError):
    """A command cannot do what it was asked to.

    Attributes:
        status: The exit status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
