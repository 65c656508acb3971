"""What tests of programs that use aiouffd can build on; public, and shipped with it.

``aiouffd.testing.sources`` has the tests that every source passes, to be inherited.
"""
