"""Trace of a record, for https://ui.perfetto.dev and chrome://tracing.

The form is the Trace Event Format, as its JSON object: ``traceEvents`` is a list of objects that
have a name, a category (``cat``), a phase (``ph``), a process (``pid``), a thread (``tid``), a
time (``ts``, in microseconds, with a fraction) and ``args`` to be shown.  The phases used here:

* ``i``, an instant: a touch that nobody waited for.  Its scope ``s`` is ``t``, its thread, and
  then it must have a ``tid``.
* ``X``, a complete event with a duration (``dur``, in microseconds): a touch with its wait.
* ``M``, metadata: ``process_name`` and ``thread_name`` with ``args.name``, and
  ``thread_sort_index`` with ``args.sort_index``.

Perfetto takes ``pid`` and ``tid`` as 32-bit numbers (as strings they would become names), and
numbers in ``args`` as signed 64-bit ones: so addresses are written as text.

Knows: the format.
Must not know: who recorded.

Laws of this file:

* Time begins with the record, so that a fraction of a microsecond survives a double.
* A trace is written piece by piece: there may be hundreds of thousands of touches.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from itertools import chain
from typing import Final

from .record_file import write_whole
from .touch_log import TouchLog


def save(record: TouchLog, path: str | os.PathLike[str]) -> None:
    """Write a trace: a track for each thread, an event for each touch, as long as its wait.

    Args:
        record: What to write.
        path: Where to, by convention a .json.

    Raises:
        OSError: It cannot be written; what was there before is still there.
    """
    write_whole(path, pieces(record))


def pieces(record: TouchLog) -> Iterator[str]:
    """Give the text of a trace, in pieces."""
    yield '{"traceEvents": ['
    separator = "\n"
    for event in chain(_tracks(record), _events(record)):
        yield separator + event
        separator = ",\n"
    what = "every touch" if record.every else "first touches"
    other = json.dumps({"recorded": what, "began_ns": str(record.began_ns)})
    yield f'\n], "displayTimeUnit": "ns", "otherData": {other}}}\n'


def _tracks(record: TouchLog) -> Iterator[str]:
    """Name processes and threads; threads stand in the order of their first touch."""
    seen: set[int] = set()
    for at, thread in enumerate(record.threads()):
        of = {"ph": "M", "pid": thread.process, "tid": thread.thread}
        if thread.process not in seen:
            seen.add(thread.process)
            which = "test process" if thread.process == os.getpid() else "process"
            called = {"name": f"{which} ({thread.process})"}
            yield json.dumps({"name": "process_name", **of, "args": called})
        name = thread.name or "thread"
        yield json.dumps({"name": "thread_name", **of, "args": {"name": name}})
        yield json.dumps({"name": "thread_sort_index", **of, "args": {"sort_index": at}})


def _events(record: TouchLog) -> Iterator[str]:
    text = functools.lru_cache(maxsize=4096)(json.dumps)  # the same few names again and again
    began_ns = record.began_ns
    for touch in record:
        access = touch.access.value
        page = str(record.page_of(touch))
        took = f'"ph": "X", "dur": {_us(touch.waited_ns)}' if touch.waited_ns else _INSTANT
        call = "" if touch.system_call is None else f', "system_call": {touch.system_call}'
        pc = "" if touch.pc is None else f', "pc": "{touch.pc:#x}"'
        yield (
            f'{{"name": {text(f"{access} {page}")}, "cat": "{access}", {took},'
            f' "ts": {_us(touch.time_ns - began_ns)},'
            f' "pid": {touch.process}, "tid": {touch.thread}, "args": {{"number": {touch.number},'
            f' "page": {text(page)}, "offset": "{touch.offset:#x}", "access": "{access}",'
            f' "where": {text(touch.where)}{call}{pc}, "outcome": {text(touch.outcome)}}}}}'
        )


_INSTANT: Final = '"ph": "i", "s": "t"'


def _us(ns: int) -> str:
    """Write nanoseconds as microseconds, all of them."""
    return f"{'-' if ns < 0 else ''}{abs(ns) // 1000}.{abs(ns) % 1000:03d}"
