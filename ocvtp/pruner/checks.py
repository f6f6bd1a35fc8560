"""What the pruner is given, before it computes. Only `finite` looks at values.

Letters: B images, N tokens, C token width.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.pruner.config import CHOICES, check_whole

PRECISIONS: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


def tokens(tokens_BNC: Tensor, width: int, device: torch.device) -> None:
    """[B, N, width], floating, on the device, of at least one image and one token."""
    if not isinstance(tokens_BNC, Tensor) or tokens_BNC.ndim != 3:
        what = f"of shape {list(tokens_BNC.shape)}" if isinstance(tokens_BNC, Tensor) else type(tokens_BNC).__name__
        raise BadInput(f"tokens are {what}: a tensor [images, tokens, {width}] is needed")
    if not tokens_BNC.is_floating_point():
        raise BadInput(f"tokens are {tokens_BNC.dtype}: a floating type is needed")
    batch, count, found = tokens_BNC.shape
    if batch == 0 or count == 0:
        raise BadInput(f"tokens of shape {list(tokens_BNC.shape)}: at least one image and one token are needed")
    if found != width:
        raise Incompatible(f"tokens are {found} wide, the pruner was made for {width}: another VLM?")
    if tokens_BNC.device != device:
        raise BadInput(f"tokens are on {tokens_BNC.device}, the pruner is on {device}: move one of them")


def mask(mask_BN: Tensor, tokens_BNC: Tensor) -> Tensor:
    """The mask as booleans on the tokens' device."""
    if not isinstance(mask_BN, Tensor) or mask_BN.shape != tokens_BNC.shape[:2]:
        shape = list(mask_BN.shape) if isinstance(mask_BN, Tensor) else type(mask_BN).__name__
        raise BadInput(f"mask {shape} of tokens {list(tokens_BNC.shape)}: {list(tokens_BNC.shape[:2])} is needed")
    return mask_BN.to(tokens_BNC.device, torch.bool)


def finite(tokens_BNC: Tensor) -> None:
    """No NaN, no infinity; names the images that have some."""
    # One sum tells, for any number that is not finite makes the sum so; a sum that overflows is looked into.
    if bool(tokens_BNC.sum(dtype=torch.float32).isfinite()):
        return
    bad_B = ~tokens_BNC.isfinite().flatten(1).all(1)
    if images := bad_B.nonzero()[:, 0].tolist():
        shown = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
        raise BadInput(f"tokens of image {shown} of the batch hold NaN or infinity")


def numbers(name: str, value: Any, batch: int) -> list[int]:
    """One number of at least 1 for each image; a single one holds for all."""
    found = list(value) if isinstance(value, Sequence) else [value] * batch
    if len(found) != batch:
        raise BadInput(f"{name} has {len(found)} numbers for {batch} images")
    for item in found:
        check_whole(name, item, 1)
    return found


def seeds(values: Sequence[int], batch: int) -> list[int]:
    """One whole number for each image."""
    found = [int(value) for value in values]
    if len(found) != batch:
        raise BadInput(f"{len(found)} seeds for {batch} images: one for each is needed")
    return found


def options(**values: str) -> None:
    """Options of `PrunerConfig` that a call gives."""
    for name, value in values.items():
        if value not in CHOICES[name]:
            raise BadInput(f"{name} is {value!r}: one of {', '.join(CHOICES[name])} is needed")


def fill_scores(fill: str, scores_BN: Tensor | None, tokens_BNC: Tensor) -> None:
    """Scores are there if and only if `fill` is `attention`, one a token."""
    if fill == "attention":
        if scores_BN is None:
            raise BadInput("fill='attention' needs fill_scores [images, tokens]: what attention each token receives")
        if scores_BN.shape != tokens_BNC.shape[:2] or not scores_BN.is_floating_point():
            raise BadInput(f"fill_scores are {scores_BN.dtype} {list(scores_BN.shape)}: floating "
                           f"{list(tokens_BNC.shape[:2])} is needed")  # fmt: skip
    elif scores_BN is not None:
        raise BadInput(f"fill_scores are of no use with fill={fill!r}: use fill='attention'")


def precision(given: str | None) -> torch.dtype | None:
    """The type of matrix products; None leaves all in that of the weights."""
    if given is None:
        return None
    if given not in PRECISIONS:
        raise BadInput(f"precision is {given!r}: {', '.join(PRECISIONS)}, or None for that of the weights, is needed")
    return PRECISIONS[given]
