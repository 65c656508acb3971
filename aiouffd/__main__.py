"""``python -m aiouffd``: the same as the ``aiouffd`` command."""

import sys

from aiouffd.cli import main

if __name__ == "__main__":
    sys.exit(main())
