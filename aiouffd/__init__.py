"""aiouffd: page faults as coroutines. An asyncio-native userfaultfd framework for Linux."""

__version__ = "0.1.0"
