"""The settings of serving: one set for any number of sessions.

Knows: what can be set, and to what it is set when nobody says.
Must not know: how any of it is done.

Laws of this file:

* Settings are data: nothing here is changed once it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .failure import Action, FailurePolicy
from .prefetch import Pace
from .working_set import WorkingSet

if TYPE_CHECKING:
    from .recording import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How sessions serve: one set of settings for any number of them.

    Attributes:
        failure: What happens to a fault that the source cannot answer.
        on_close: What becomes of missing pages when a session is closed before its target
            ends; HANG helps only a target that keeps its own copy of the userfaultfd.
        deadline: Seconds a fault may take before the failure policy's last action.
        warn_after: Seconds after which an unanswered fault is logged.
        chunk: Bytes to bring around each fault; 0 brings one page.
        max_in_flight: Reads at once per session.
        max_children: Forked children served at once per session, each by a descriptor and a
            pager; what is missing in further ones is settled by ``on_close`` at once (HANG,
            which takes a descriptor, is POISON there).  A target that forks faster than that
            is done ends its session.
        replay: A working set whose pages are brought before they are asked for; or one for each
            part of an image that has parts.
        any_image: Replay though it is unknown whether the set was made for this image.
        hydrate: How fast everything else is brought in the background.
        recorder: Records the sessions' working sets.
        let_go: When everything has been brought, or cannot be brought in the background, bring
            what is left, and let the target live on by itself (Session.complete).
    """

    failure: FailurePolicy = field(default_factory=FailurePolicy)
    on_close: Action = Action.POISON
    deadline: float | None = 30.0
    warn_after: float | None = 5.0
    chunk: int = 0
    max_in_flight: int = 256
    max_children: int = 64
    replay: WorkingSet | Mapping[str, WorkingSet] | None = None
    any_image: bool = False
    hydrate: Pace = Pace.OFF
    recorder: Recorder | None = None
    let_go: bool = False

    def replay_of(self, part: str) -> WorkingSet | None:
        """Give the working set for a part of the image, if there is one."""
        return self.replay.get(part) if isinstance(self.replay, Mapping) else self.replay
