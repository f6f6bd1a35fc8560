"""Representative tokens without training: greedy choices over any tokens, and how well a choice stands for the rest."""

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from ocvtp.selection.css import css
from ocvtp.selection.fps import fps
from ocvtp.selection.kept_error import prototype_error, span_error
from ocvtp.selection.medoids import medoids
from ocvtp.selection.qr import qr

CHOICES: Final[Mapping[str, Callable[..., Tensor]]] = {"qr": qr, "css": css, "fps": fps, "medoids": medoids}
"""By name; each takes tokens, keep, mask and check_values, and returns indices."""

__all__ = ["CHOICES", "css", "fps", "medoids", "prototype_error", "qr", "span_error"]
