"""Videos: budgets of so many tokens a frame, a video, or a second, and how many frames a method sees at a time.

Frames are pruned one by one, as images are, each with its share; or several that follow one another, such as pairs, as
one image, which has the budgets of all of them and may spend them on one. Where the tower puts two frames into one
patch, as Qwen-VL's do, a frame is such a pair.

Letters: G groups of frames, F frames of a group, N tokens of a frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods import Budget
from ocvtp.methods.tiles import share_evenly
from ocvtp.vlms.family import Vision
from ocvtp.vlms.images import Images, Layout

Per = Literal["frame", "video", "second"]
_PERS: tuple[Per, ...] = ("frame", "video", "second")
_RIGHT = 'such as 16, 0.25, "16/frame", "128/video", "25%/video" or "32/second"'


@dataclass(frozen=True)
class VideoBudget:
    """A budget, of what it is, and how many frames the method sees at a time."""

    budget: Budget
    per: Per = "frame"
    group: int = 1

    @classmethod
    def parse(cls, keep: object, group: int = 1) -> "VideoBudget":
        """Read what a caller gave; `BadInput` for what is no budget or no number of frames."""
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise BadInput(f"video_group is {group!r}: a whole number of frames is needed, such as 2 for pairs")
        if not isinstance(keep, str) or "/" not in keep:
            return cls(keep if isinstance(keep, Budget) else Budget.parse(keep), group=group)
        number, _, what = keep.partition("/")
        per = next((each for each in _PERS if each == what.strip()), None)
        if per is None:
            raise BadInput(f"video_keep is {keep!r}: a budget a frame, a video or a second is needed, {_RIGHT}")
        budget = Budget.parse(int(number) if number.strip().isdigit() else number)
        if per == "second" and budget.count is None:
            raise BadInput(f"video_keep is {keep!r}: of a second a count is needed, such as 32/second")
        return cls(budget, per, group)

    def groups(self, images: Images) -> list[list[int]]:
        """Numbers of the images, and of the frames that go together; the last group of a video may have fewer."""
        found, done = [[number] for number in range(images.stills)], images.stills
        for frames in images.videos:
            numbers = range(done, done + frames)
            found += [list(numbers[first : first + self.group]) for first in range(0, frames, self.group)]
            done += frames
        return found

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


class Grouped(Vision):
    """What the tower made of frames, those of a group as one image: its parts are theirs, one after the other."""

    def __init__(self, vision: Vision, groups: Sequence[Sequence[int]]) -> None:
        """`groups` are numbers of images; those of a group have equally many tokens."""
        self._vision, self._groups = vision, groups
        self.counts = [sum(vision.counts[number] for number in group) for group in groups]
        self.grids = [(len(group) * vision.grids[group[0]][0], vision.grids[group[0]][1]) for group in groups]

    def layout(self, member: int) -> Layout:  # noqa: D102 - as in Vision
        group = self._groups[member]
        return tuple(
            replace(part, start=part.start + place * self._vision.counts[number])
            for place, number in enumerate(group)
            for part in self._vision.layout(number)
        )

    def _of(self, read: Callable[[list[int]], Tensor], members: Sequence[int]) -> Tensor:
        """Something of the tokens of each group, [G, F N, ...]."""
        frames_XNY = read([number for member in members for number in self._groups[member]])
        groups_GFNY: Tensor = frames_XNY.unflatten(0, (len(members), -1))
        return groups_GFNY.flatten(1, 2)

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._of(lambda numbers: self._vision.tokens(layer, numbers), members)

    def values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._of(self._vision.values, members)

    def received(self, block: int, members: Sequence[int]) -> Tensor:
        """Within each frame, as the tower sees them one by one."""
        return self._of(lambda numbers: self._vision.received(block, numbers), members)

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:
        """Of each frame its own CLS."""
        return self._of(lambda numbers: self._vision.from_cls(block, numbers), members)

    def keys(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._of(lambda numbers: self._vision.keys(block, numbers), members)

    def cls_values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._of(self._vision.cls_values, members)
