"""Post-copy migration: a running program moves, its memory follows.

``outgoing`` sends, ``incoming`` receives, ``wire`` is what they say to each other and ``program``
how a program lets either of them at its memory.
"""
