"""``python -m benchmarks``: measure everything and write docs/figures.md."""

from .report import main

main()
