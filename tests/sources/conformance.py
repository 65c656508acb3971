"""The contract's old place; what is here comes from ``aiouffd.testing.sources``."""

from aiouffd.testing.sources import PAGE, SIZES, SourceContract, as_bytes, image

__all__ = ["PAGE", "SIZES", "SourceContract", "as_bytes", "image"]
