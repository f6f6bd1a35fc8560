"""How many tokens stay: a count, a share, or a percentage."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from ocvtp.errors import BadInput

Keep = int | float | str
_RIGHT = 'a count such as 64, a share in (0, 1] such as 0.111, or a percentage such as "11.1%"'


@dataclass(frozen=True)
class Budget:
    """Tokens an image: `count` of them or the `share` of them, whichever is not None."""

    written: Keep
    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, keep: object) -> "Budget":
        """Read what a caller gave: whole numbers are counts, others shares; `BadInput` for what is neither."""
        if isinstance(keep, str):
            return cls(keep, share=_share(_number(keep), keep))
        if isinstance(keep, bool) or not isinstance(keep, Real):
            raise BadInput(f"keep is {keep!r}: {_RIGHT} is needed")
        if isinstance(keep, Integral):
            if keep < 1:
                raise BadInput(f"keep is {keep}: at least 1 token of an image must stay")
            return cls(int(keep), count=int(keep))
        return cls(float(keep), share=_share(float(keep), keep))

    def tokens(self, whole: int, what: str = "an image") -> int:
        """Tokens that stay of `whole`: a share is rounded to the nearest, halves up, and at least 1.

        Raises:
            BadInput: more than there are.
        """
        if self.share is not None:
            return max(1, int(self.share * whole + 0.5))
        assert self.count is not None  # noqa: S101 - one of the two is there
        if self.count > whole:
            raise BadInput(f"keep is {self.count}, but {what} has {whole} tokens: at most {whole} can stay")
        return self.count

    def at_most(self, whole: int) -> int:
        """As `tokens`, but all of an image that has fewer than the count: where images differ in size."""
        return whole if self.count is not None and self.count > whole else self.tokens(whole)


@dataclass(frozen=True)
class Entering(Budget):
    """What a method inside the LLM lets enter it of an image, given the budget itself."""

    of: Callable[[int, int], int] = lambda tokens, keep: tokens

    def at_most(self, whole: int) -> int:
        """Tokens that enter."""
        return self.of(whole, super().at_most(whole))


def _number(text: str) -> float:
    try:
        if not text.strip().endswith("%"):
            raise ValueError
        return float(text.strip()[:-1]) / 100
    except ValueError:
        raise BadInput(f"keep is {text!r}: {_RIGHT} is needed") from None


def _share(share: float, written: object) -> float:
    if not (math.isfinite(share) and 0 < share <= 1):
        raise BadInput(f"keep is {written!r}, a share outside (0, 1]: {_RIGHT} is needed")
    return share
