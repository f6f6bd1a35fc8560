"""Budgets of videos: so many tokens a frame, a video, or a second.

Frames are pruned one by one, as images are, each with its share. Where the tower puts two frames into one patch, as
Qwen-VL's do, a frame is such a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ocvtp.errors import BadInput
from ocvtp.methods import Budget
from ocvtp.methods.tiles import share_evenly

Per = Literal["frame", "video", "second"]
_PERS: tuple[Per, ...] = ("frame", "video", "second")
_RIGHT = 'such as 16, 0.25, "16/frame", "128/video", "25%/video" or "32/second"'


@dataclass(frozen=True)
class VideoBudget:
    """A budget, and of what it is."""

    budget: Budget
    per: Per = "frame"

    @classmethod
    def parse(cls, keep: object) -> "VideoBudget":
        """Read what a caller gave; `BadInput` for what is no budget."""
        if not isinstance(keep, str) or "/" not in keep:
            return cls(Budget.parse(keep))
        number, _, what = keep.partition("/")
        per = next((each for each in _PERS if each == what.strip()), None)
        if per is None:
            raise BadInput(f"video_keep is {keep!r}: a budget a frame, a video or a second is needed, {_RIGHT}")
        budget = Budget.parse(int(number) if number.strip().isdigit() else number)
        if per == "second" and budget.count is None:
            raise BadInput(f"video_keep is {keep!r}: of a second a count is needed, such as 32/second")
        return cls(budget, per)

    def keeps(self, counts: Sequence[int], seconds: float | None, video: int) -> list[int]:
        """Tokens that stay of each frame of a video.

        Args:
            counts: tokens of each frame.
            seconds: from frame to frame; None if nobody said.
            video: its number, for people.

        Raises:
            BadInput: less than a token a frame, or a budget a second of a video whose speed is not known.
        """
        if self.per == "frame":
            return [self.budget.at_most(count) for count in counts]
        if self.per == "video":
            total = self.budget.at_most(sum(counts))
        else:
            if seconds is None:
                raise BadInput(
                    f"video_keep is {self.budget.written}/second, but nobody says how long video {video} is: give "
                    "second_per_grid_ts, as Qwen2.5-VL's processor does, or a budget a frame or a video"
                )
            assert self.budget.count is not None  # noqa: S101 - as `parse` has made sure
            total = min(int(self.budget.count * seconds * len(counts) + 0.5), sum(counts))
        if total < len(counts):
            raise BadInput(
                f"video {video} may keep {total} tokens, but has {len(counts)} frames: one token of each must stay"
            )
        return share_evenly(total, list(counts))
