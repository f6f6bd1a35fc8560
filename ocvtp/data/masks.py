"""Masks of objects as COCO writes them."""

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


def decode_mask(code: dict[str, list[int]]) -> Mask:
    """The mask [H, W] of an uncompressed run-length code; `BadInput` if the runs do not fill the image."""
    height, width = code["size"]
    if sum(code["counts"]) != height * width:
        raise BadInput(f"run-length code of {sum(code['counts'])} pixels for an image of {height} x {width}")
    values = np.arange(len(code["counts"])) % 2 == 1
    return np.repeat(values, code["counts"]).reshape((height, width), order="F")
