"""Where shortened prompts get their vision tokens from: the model's own `get_image_features`.

A model of transformers embeds its prompt, asks that method, and `get_video_features`, for the features of the pixels
that it was given, and puts them where the placeholders are, together with whatever else they bring, such as DeepStack's
planes. On a pruned model the methods hand out what stays of them. (`mm_encoder_outputs` would do the same, but
transformers 5.17 has none.)
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ocvtp.pruning import calls
from ocvtp.vlms.images import Kind

_ASK: Mapping[Kind, tuple[str, str]] = {
    "image": ("get_image_features", "pixel_values"),
    "video": ("get_video_features", "pixel_values_videos"),
}
"""The method that a model asks, and the argument that makes it do so."""


class Features(calls.Uncopied):
    """Stands in for these methods of one model; outside of `given` and on other threads they are what they were."""

    def __init__(self, model: Any) -> None:
        """`model`: the one with tower and language model, without head."""
        self._now = threading.local()
        methods = {name: partial(self._get, kind) for kind, (name, _) in _ASK.items() if hasattr(model, name)}
        self._replaced = calls.Replaced(model, methods)

    def remove(self) -> None:
        """Give the model back as it was."""
        self._replaced.undo()

    @contextmanager
    def given(self, outputs: Mapping[Kind, Any]) -> Iterator[dict[str, Any]]:
        """Hand these out in here; gives the arguments with which the model asks for them."""
        self._now.outputs = outputs
        try:
            yield {_ASK[kind][1]: torch.empty(1) for kind in outputs}
        finally:
            self._now.outputs = {}

    def _get(self, kind: Kind, plain: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = getattr(self._now, "outputs", {})
        return outputs[kind] if kind in outputs else plain(*args, **kwargs)
