"""The one retry policy: by cause, bounded, the same for every executor.

crashed, lost, node    again, `tries` attempts in all, on another node if there is one
preempted              again, `preemptions` attempts
timeout                again only if the attempt left something new to resume from, `preemptions` attempts
oom                    once more, with twice the memory (or what there is)
exception, cancelled   never: again would end the same
"""

from collections.abc import Sequence
from dataclasses import replace

from cluster.protocol import Cause
from cluster.task import Resources

MORE_MEMORY = 2.0
ELSEWHERE = (Cause.CRASHED, Cause.LOST, Cause.NODE)  # the node may be to blame
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds


def next_resources(
    causes: Sequence[Cause],
    last: Resources,
    *,
    tries: int,
    preemptions: int,
    progressed: bool = False,
    memory_limit_gb: float | None = None,
) -> Resources | None:
    """What to give the next attempt, by how each one so far ended and what the last had; None if there is to be none.

    `progressed`: the last one left something new in its `resume/`. `memory_limit_gb`: the most that one can get.
    """
    cause = causes[-1]
    limits = {**dict.fromkeys(ELSEWHERE, tries), Cause.PREEMPTED: preemptions, Cause.OOM: 2}
    if causes.count(cause) >= (preemptions if cause is Cause.TIMEOUT and progressed else limits.get(cause, 1)):
        return None
    if cause is not Cause.OOM:
        return last
    memory = min(last.memory_gb * MORE_MEMORY, memory_limit_gb or float("inf"))
    return replace(last, memory_gb=memory) if memory > last.memory_gb else None


def pause(failures: int, attempt: str) -> float:
    """Seconds to wait before the next attempt: doubling, with a jitter drawn from the attempt's name."""
    jitter = 0.75 + 0.5 * int(attempt[:4], 16) / 0xFFFF
    return min(FIRST_PAUSE * 2.0 ** max(failures - 1, 0), LONGEST_PAUSE) * jitter
