"""CUDA graphs for functions of many small kernels, whose launches take longer than the kernels.

A function that has been called with tensors of the same shapes before is recorded, and replayed from then on. Elsewhere
than on CUDA, while something else records or traces, and where gradients are wanted, it simply runs.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_MOST = 16
"""Graphs that are held; each has memory for what its function makes."""


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class _Not(Enum):
    """Why there is no recording of what was called before."""

    YET = "called once, which is no reason to record"
    POSSIBLE = "cannot be recorded: it is not tried again"


class Replays:
    """The recorded graphs of some functions. Copies and pickles of it are empty: graphs hold addresses of memory."""

    def __init__(self) -> None:
        self._held = OrderedDict[Hashable, _Recorded | _Not]()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replays":
        return Replays()

    def __reduce__(self) -> tuple[type["Replays"], tuple[()]]:
        return Replays, ()

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`function(*tensors)`, replayed if it can be.

        Args:
            key: of all that the function depends on beside the tensors' values; the memory that it reads besides must
                stay where it is as long as the key is the same.
            function: from tensors to one, by operations that neither wait for the device nor read its memory.
            tensors: contiguous copies of them are made.

        Raises:
            torch.OutOfMemoryError: there is too little memory for the recording; the next call tries again.
        """
        if not _can(tensors):
            return function(*tensors)
        stream = torch.cuda.current_stream(tensors[0].device)
        shapes = tuple((tuple(each.shape), each.dtype, each.device) for each in tensors)
        key = (key, shapes, stream.cuda_stream)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if key not in self._held:
                self._hold(key, _Not.YET)
                return function(*tensors)
            recorded = self._held[key]
            if recorded is _Not.YET:
                recorded = self._record(function, tensors)
            self._hold(key, recorded)
            if isinstance(recorded, _Not):
                return function(*tensors)
            for held, given in zip(recorded.inputs, tensors, strict=True):
                held.copy_(given)
            recorded.graph.replay()
            return recorded.output.clone()

    def _hold(self, key: Hashable, recorded: _Recorded | _Not) -> None:
        self._held[key] = recorded
        self._held.move_to_end(key)
        while len(self._held) > _MOST:
            self._held.popitem(last=False)

    def _record(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> _Recorded | _Not:
        device = tensors[0].device
        inputs = tuple(each.detach().clone() for each in tensors)
        current, aside, graph = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        aside.wait_stream(current)
        try:
            with torch.cuda.stream(aside):  # what libraries set up at their first call cannot be recorded
                function(*inputs)
            current.wait_stream(aside)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = function(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("%s is not recorded as a CUDA graph, and runs as it is: %s", function, error)
            return _Not.POSSIBLE
        return _Recorded(graph, inputs, output)


def _can(tensors: tuple[Tensor, ...]) -> bool:
    if not tensors[0].is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
