"""Masks of objects as COCO writes them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocvtp.errors import BadInput

Mask = NDArray[np.bool_]


def encode_mask(mask_HW: Mask) -> dict[str, list[int]]:
    """COCO's uncompressed run-length code: lengths of runs of 0, 1, 0, ... down the columns."""
    flat = np.concatenate([[False], mask_HW.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], changes, [mask_HW.size]])).tolist()
    return {"size": list(mask_HW.shape), "counts": runs if runs[-1] else runs[:-1]}


def check_code(code: Mapping[str, Any]) -> None:
    """`BadInput` says what keeps this from being an uncompressed run-length code whose runs fill its image."""
    counts: Any = code.get("counts")
    size: Any = code.get("size")
    if isinstance(counts, str | bytes):
        raise BadInput("a segmentation is a compressed run-length code: uncompressed codes and polygons are read")
    for name, numbers in (("counts", counts), ("size", size)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise BadInput(
                f"{name} of a run-length code is {str(numbers)[:40]}: whole numbers of at least 0 are needed"
            )
    if len(size) != 2:
        raise BadInput(f"size of a run-length code is {size}: height and width are needed")
    if sum(counts) != math.prod(size):
        raise BadInput(f"run-length code of {sum(counts)} pixels for an image of {size[0]} x {size[1]}")


def decode_mask(code: Mapping[str, Any]) -> Mask:
    """The mask [H, W] of an uncompressed run-length code; `BadInput` as `check_code`."""
    check_code(code)
    height, width = code["size"]
    values = np.arange(len(code["counts"])) % 2 == 1
    return np.repeat(values, code["counts"]).reshape((height, width), order="F")
