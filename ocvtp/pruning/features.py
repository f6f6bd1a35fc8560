"""Where shortened prompts get their vision tokens from: the model's own `get_image_features`.

A model of transformers embeds its prompt, asks that method for the features of the pixels that it was given, and puts
them where the placeholders are, together with whatever else they bring, such as DeepStack's planes. On a pruned model
the method hands out what stays of them. (`mm_encoder_outputs` would do the same, but transformers 5.17 has none.)
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ocvtp.pruning import calls

PIXELS = "pixel_values"
_GETTER = "get_image_features"


class Features(calls.Uncopied):
    """Stands in for that method of one model; outside of `given` and on other threads it is what it was."""

    def __init__(self, model: Any) -> None:
        """`model`: the one with tower and language model, without head."""
        self._model, self._now = model, threading.local()
        self._replaced = calls.Replaced(model, {_GETTER: self._get})

    def remove(self) -> None:
        """Give the model back as it was."""
        self._replaced.undo()

    @contextmanager
    def given(self, output: Any) -> Iterator[dict[str, Any]]:
        """Hand this out in here; gives the arguments with which the model asks for it."""
        self._now.output = output
        try:
            yield {PIXELS: torch.empty(1)}
        finally:
            self._now.output = None

    def _get(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        output = getattr(self._now, "output", None)
        return plain(*args, **kwargs) if output is None else output
