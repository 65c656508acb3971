"""What this kernel, build, user and container allow."""

from __future__ import annotations

from .gates import open_userfaultfd

__all__ = ["open_userfaultfd"]
