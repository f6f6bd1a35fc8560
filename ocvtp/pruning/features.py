"""Vision tokens handed over: to the model itself, by its own `get_image_features`, or to another engine (`Embedded`).

A model of transformers embeds its prompt, asks that method, and `get_video_features`, for the features of the pixels
that it was given, and puts them where the placeholders are, together with whatever else they bring, such as DeepStack's
planes. On a pruned model the methods hand out what stays of them. (`mm_encoder_outputs` would do the same, but
transformers 5.17 has none.)

Letters: X tokens of an image that stay and what stays for their sake, k of them tokens, P rows of positions (1, or 3
for M-RoPE), S planes of DeepStack, L placeholders of an image, D width of the language model.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods import Method
from ocvtp.methods.inside import Inside
from ocvtp.pruning import calls
from ocvtp.pruning.splice import Positions, Spot
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Images, Kind, Placed

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


@dataclass(frozen=True)
class Embedded:
    """What the language model would read of one image.

    Attributes:
        features_XD: after the projector, in the order in which they are read, on the model's device.
        numbers_X: the number of the token in each row, ascending; -1 for what is no token, such as the newline after a
            row of tiles (LLaVA-NeXT, LLaVA-OneVision). On the CPU.
        positions_PX: of each row, counted from that of the image's first placeholder. On the CPU.
        span: positions that the image takes: text after it begins at the position of its first placeholder plus this.
        planes_SXD: what is added to these rows in the first S layers of the language model (Qwen3-VL's DeepStack).
    """

    features_XD: Tensor
    numbers_X: Tensor
    positions_PX: Tensor
    span: int
    planes_SXD: Tensor

    @property
    def kept(self) -> list[int]:
        """Numbers of the k tokens that stay, ascending."""
        return [number for number in self.numbers_X.tolist() if number >= 0]


def before_the_llm(name: str, method: Method | None) -> Method:
    """The method of a name; `BadInput` says why what the language model reads of one cannot be handed over."""
    if method is None:
        raise BadInput(f"{name} prunes nothing: the model's own get_image_features gives all tokens of an image")
    if isinstance(method, Inside):
        raise BadInput(
            f"{name} drops tokens inside the LLM, whose layers then read different ones: nothing that is handed over "
            "before it is what they read; choose a method before the LLM (`ocvtp methods` says which are)"
        )
    return method


def call_of(images: Any, family: Family) -> Mapping[str, Any]:
    """Arguments of `generate` with the images that a caller gave; `BadInput` for what the tower would not take."""
    call = {"pixel_values": images} if isinstance(images, Tensor) else images
    if not isinstance(call, Mapping):
        raise BadInput(
            f"images is a {type(images).__name__}: what the model's processor made of them is needed, such as "
            "processor(images=..., text=..., return_tensors='pt'), or its pixel_values"
        )
    if call.get("pixel_values_videos") is not None:
        raise BadInput("images holds pixel_values_videos: of videos nothing is handed over; leave them out")
    if call.get("pixel_values") is None:
        raise BadInput(f"images holds {', '.join(map(str, call)) or 'nothing'}, but no pixel_values")
    _check_pixels(call["pixel_values"], family.pixel_shape)
    return call


def _check_pixels(pixels: Any, wanted: tuple[int | None, ...] | None) -> None:
    if not isinstance(pixels, Tensor):
        kind = f"{type(pixels).__module__}.{type(pixels).__name__}"
        raise BadInput(f"pixel_values is a {kind}: a tensor is needed, as the processor makes with return_tensors='pt'")
    if not pixels.is_floating_point():
        raise BadInput(f"pixel_values is of {pixels.dtype}: the numbers that the model's processor makes are floating")
    sizes = list(pixels.shape)
    if wanted is not None and (
        len(sizes) != len(wanted) or any(there not in (None, size) for there, size in zip(wanted, sizes, strict=True))
    ):
        named = ", ".join("any" if size is None else str(size) for size in wanted)
        raise BadInput(f"pixel_values is of shape {sizes}: [{named}] is needed, as the model's processor makes it")
    if 0 in sizes:
        raise BadInput(f"pixel_values is of shape {sizes}: one image at least is needed")


def texts_of(prompts: Any, count: int, family: Family) -> list[list[int]]:
    """Of prompts, token ids of the text; `BadInput` unless there is one for each of `count` images."""
    given = list(prompts) if isinstance(prompts, Tensor) and prompts.ndim else prompts
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise BadInput(f"prompts is a {type(prompts).__name__}: token ids for each of {count} images are needed")
    if len(given) != count:
        raise BadInput(f"prompts has {len(given)} entries for {count} images: token ids for each of them are needed")
    found, vision = list[list[int]](), set(family.placeholders.values())
    most = family.model.get_input_embeddings().num_embeddings
    for number, prompt in enumerate(given):
        ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if (
            isinstance(ids, str | bytes)
            or not isinstance(ids, Sequence)
            or not all(type(token) is int for token in ids)
        ):
            raise BadInput(f"prompt {number} is no list of token ids: give what the model's tokenizer makes of it")
        if any(not 0 <= token < most for token in ids):
            raise BadInput(f"prompt {number} has token ids outside 0 to {most - 1}, those of this model")
        found.append([token for token in ids if token not in vision])
    return found


def embedded(family: Family, images: Images, placed: Sequence[Placed], mode: Positions) -> list[Embedded]:
    """Each image as if it stood in a prompt of its own."""
    width = family.model.config.get_text_config().hidden_size
    found = []
    for number, (each, length) in enumerate(zip(placed, family.spans(images), strict=True)):
        whole_PL = _positions(family, images, number, length)
        spot = Spot(each.features_XD, each.places_X, each.numbers_X, each.whole, 0, 0, length)
        positions_PX, further = spot.moved(whole_PL, mode)
        features_XD, *planes = each.features_XD.split(width, 1)
        found.append(
            Embedded(
                features_XD,
                each.numbers_X,
                positions_PX,
                int(whole_PL.max()) + 1 + further,
                torch.stack(planes) if planes else features_XD.new_empty(0, *features_XD.shape),
            )
        )
    return found


def _positions(family: Family, images: Images, number: int, length: int) -> Tensor:
    """Positions of an unpruned image that is all of a prompt, [P, L], from 0 on."""
    ids_1L = torch.full((1, length), family.placeholder)
    call: dict[str, Any] = {"input_ids": ids_1L, "mm_token_type_ids": torch.ones_like(ids_1L)}
    if images.sizes is not None and family.position_inputs:
        call["image_grid_thw"] = images.sizes[number : number + 1].cpu()
    return family.positions(call, torch.ones_like(ids_1L), 0)[:, 0]
