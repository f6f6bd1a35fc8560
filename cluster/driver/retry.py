"""The one retry policy: by cause, bounded, the same for every executor.

crashed, lost, node    again, `tries` attempts in all, on another node if there is one
preempted              again, `preemptions` attempts
timeout                again only if the attempt left something new to resume from, `preemptions` attempts
oom                    once more, with twice the memory (or what there is)
exception, cancelled   never: again would end the same
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.protocol import Cause
from cluster.task import Resources

MORE_MEMORY = 2.0
ELSEWHERE = (Cause.CRASHED, Cause.LOST, Cause.NODE)  # the node may be to blame
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds


@dataclass(frozen=True)
class Policy:
    """How often a task is tried."""

    tries: int = 3
    preemptions: int = 10

    def limit(self, cause: Cause, *, progressed: bool) -> int:
        """How many attempts may end by this cause before the task has failed."""
        if cause in ELSEWHERE:
            return self.tries
        if cause is Cause.PREEMPTED or (cause is Cause.TIMEOUT and progressed):
            return self.preemptions
        return 2 if cause is Cause.OOM else 1

    def next(
        self,
        causes: Sequence[Cause],
        resources: Resources,
        *,
        progressed: bool = False,
        memory_limit_gb: float | None = None,
    ) -> Resources | None:
        """What to give the next attempt; None if there is to be none.

        Args:
            causes: how each attempt so far ended; not empty.
            resources: of the last attempt.
            progressed: whether the last attempt left something new in its `resume/`.
            memory_limit_gb: the most one attempt can get.
        """
        cause = causes[-1]
        if causes.count(cause) >= self.limit(cause, progressed=progressed):
            return None
        if cause is not Cause.OOM:
            return resources
        memory = min(resources.memory_gb * MORE_MEMORY, memory_limit_gb or float("inf"))
        return replace(resources, memory_gb=memory) if memory > resources.memory_gb else None


def pause(failures: int, attempt: str) -> float:
    """Seconds to wait before the next attempt: doubling, with a jitter drawn from the attempt's name."""
    jitter = 0.75 + 0.5 * int(attempt[:4], 16) / 0xFFFF
    return min(FIRST_PAUSE * 2.0 ** max(failures - 1, 0), LONGEST_PAUSE) * jitter
