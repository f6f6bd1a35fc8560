"""A second CUDA stream for work whose result is needed later, beside what the device is doing.

Tokens are chosen by hidden states of a layer that the tower has long passed when it is done: by layer 9 of CLIP's 24,
say. With `OCVTP_SIDE_STREAM=1` they are chosen there, and on CUDA the device goes on with the tower meanwhile. What is
chosen stays the same. Off by default, as no GPU has measured yet whether it pays (`benchmarks/gpu.py` compares both).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput

SWITCH = "OCVTP_SIDE_STREAM"


def wanted() -> bool:
    """Whether the switch is on, and nobody records or traces what is done.

    Raises:
        BadInput: it is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise BadInput(f"{SWITCH} is {value!r}: 1 turns the side stream on, 0 off")
    if value == "0" or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class Beside:
    """Work beside the current stream of a device. Elsewhere than on CUDA it is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _side(device) if device.type == "cuda" else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is asked for within begins after all that was asked for before, and does not hold up what comes later.

        What it reads must be held until `join`, so that its memory is not given to what comes later.
        """
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def join(self, *made: Tensor | None) -> None:
        """What is asked for from now on comes after it, and reads the tensors that it made."""
        if self._side is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._side)
        for each in made:
            if each is not None:
                # The side's memory is not given to others before this stream is done with it.
                each.record_stream(current)


@cache
def _side(device: torch.device) -> Any:
    """The same one each time, as graphs (`ocvtp.replay`) are recorded a stream."""
    return torch.cuda.Stream(device)
