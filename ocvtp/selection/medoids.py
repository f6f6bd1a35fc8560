"""Greedy k-medoids (facility location): each pick brings the tokens, by cosine, nearest to their nearest pick.

What is raised is the sum over tokens of 1 + the cosine to the nearest pick (`ocvtp.selection.facility`).

Letters: B images, N tokens, C token width.
"""

from collections.abc import Sequence

from torch import Tensor

from ocvtp.selection import facility
from ocvtp.selection.cosines import cosines
from ocvtp.selection.greedy import Step, choose


def medoids(
    tokens: Tensor, keep: int | Sequence[int], mask: Tensor | None = None, *, check_values: bool | None = None
) -> Tensor:
    """Indices [B, keep]: arguments and results are those of `ocvtp.selection.greedy.choose`.

    Costs N^2 C multiply-accumulates, and N^2 additions a pick.
    """
    return choose(tokens, keep, mask, check_values, _begin)


def _begin(tokens_BNC: Tensor, exists_BN: Tensor, steps: int) -> tuple[Tensor, Step]:
    return facility.begin((1 + cosines(tokens_BNC)).clamp(min=0), exists_BN)
