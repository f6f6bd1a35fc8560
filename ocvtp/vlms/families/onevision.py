"""LLaVA-OneVision: a SigLIP tower; tiles are put together, resized if there are many of them, and rows get newlines.

All this happens behind the projector, so values are what the language model reads. A newline is none of the N tokens
and no part of a budget: it stays if a token of its row does. An image that shares its prompt with others is not cut
into tiles where the processor says so (`batch_num_images`), and has one newline at its end, which stays. Frames of a
video are single tiles, halved each way; the newline at its end stays, too.

Letters: I images, N tokens of an image, P patches of a tile, k tokens kept.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.vlms.anyres import Shape, resized, shape_of, shrunk, with_newlines
from ocvtp.vlms.family import Early
from ocvtp.vlms.images import Facts, Grid, Images, Kind, Layout, Map, Part, Placed
from ocvtp.vlms.tiled import TiledFamily, TiledVision, Tiles
from ocvtp.vlms.tower import device_of, fetched, recorded, weight_of

_SHRINK = 1.1
"""Tiles are resized if they have more tokens than the limit by the square of this (as in transformers)."""


@dataclass(frozen=True)
class Alone(Tiles):
    """An image in one tile."""

    @property
    def span(self) -> int:
        """With its newline."""
        return self.count + 1

    def newlines_of(self, indices_k: Tensor) -> tuple[Tensor, Tensor]:
        """Places of tokens among placeholders, and of the newline."""
        return indices_k, torch.tensor([self.count])


@dataclass(frozen=True)
class Frame(Tiles):
    """A frame of a video, halved each way; `last` of its video, which ends with a newline."""

    last: bool = False

    @property
    def grid(self) -> Grid:
        """Of the tokens."""
        return (math.ceil(self.side / 2),) * 2

    @property
    def layout(self) -> Layout:
        """One grid."""
        return (Part(0, self.grid),)

    @property
    def span(self) -> int:
        """With the newline of the video, behind its last frame."""
        return self.count + self.last

    def arranged(self, patches_TPX: Tensor) -> Tensor:
        """As the model resizes features."""
        return shrunk(patches_TPX[0], (self.side, self.side), self.grid)

    def newlines_of(self, indices_k: Tensor) -> tuple[Tensor, Tensor]:
        """Places of tokens among placeholders, and of the newline."""
        return indices_k, torch.arange(self.count, self.span)


class OneVisionFamily(TiledFamily):
    """`LlavaOnevisionForConditionalGeneration`; `Images.sizes` are [I, 3]: height, width, and whether it has tiles."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset(
        {"pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos", "image_sizes_videos"}
    )
    nested: ClassVar[bool] = True
    outer: ClassVar[int] = 2

    @classmethod
    def facts_of(cls, config: Any) -> Facts:  # noqa: D102 - as in Family
        return cls.tiled_facts(config, None, None)

    def images(self, call: Mapping[str, Any]) -> Images | None:
        """Images, and behind them the frames of videos as images of one tile."""
        pixels, sizes, together = call.get("pixel_values"), call.get("image_sizes"), call.get("batch_num_images")
        moving: Tensor | None = call.get("pixel_values_videos")
        if pixels is None and moving is None:
            return None
        if moving is not None and (moving.ndim != 5 or not moving.shape[1]):
            raise BadInput(f"pixel_values_videos of shape {list(moving.shape)}: [videos, frames, 3, H, W] is needed")
        videos = () if moving is None else (moving.shape[1],) * len(moving)
        frames_F3HW = None if moving is None else moving.flatten(0, 1)
        if pixels is None:
            assert frames_F3HW is not None  # noqa: S101 - as one of the two is there
            return Images(frames_F3HW[:, None], torch.zeros(len(frames_F3HW), 3, dtype=torch.long), videos)
        if sizes is None:
            raise BadInput("LLaVA-OneVision needs image_sizes beside pixel_values: use the processor of this model")
        sizes = torch.as_tensor(sizes)
        numbers = [1] * len(sizes) if together is None else torch.as_tensor(together).tolist()
        tiled = torch.tensor([number == 1 for number in numbers for _ in range(number)])
        if len(tiled) != len(sizes):
            raise BadInput(f"batch_num_images adds up to {len(tiled)} images, but image_sizes has {len(sizes)}")
        sizes = torch.cat([sizes, tiled[:, None].to(sizes)], 1)
        if frames_F3HW is None:
            return Images(pixels, sizes)
        if pixels.ndim != 5:
            raise BadInput(_shaped(pixels, len(sizes)))
        padded = torch.nn.functional.pad(frames_F3HW[:, None], (0,) * 7 + (pixels.shape[1] - 1,))
        return Images(torch.cat([pixels, padded]), torch.cat([sizes, sizes.new_zeros(len(padded), 3)]), videos)

    def shapes(self, images: Images) -> list[Alone | Frame | Shape]:  # noqa: D102 - as in TiledFamily
        assert images.sizes is not None  # noqa: S101 - as `images` has made sure
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        pinpoints = tuple((int(height), int(width)) for height, width in self.model.config.image_grid_pinpoints)
        limit = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        found = list[Alone | Frame | Shape]()
        for height, width, tiled in images.sizes[: images.stills].tolist():
            if not tiled:
                found.append(Alone(1, side))
                continue
            shape = shape_of((int(height), int(width)), pinpoints, vision.image_size, side, "spatial_unpad")
            rows, columns = shape.layout[1].grid
            ratio = math.sqrt(rows * columns / (limit * side**2))
            found.append(resized(shape, ratio) if ratio > _SHRINK else shape)
        for frames in images.videos:
            found += [Frame(1, side, last=frame == frames - 1) for frame in range(frames)]
        return found

    def tiles(self, images: Images) -> list[Tensor]:
        """Without those that fill up a batch."""
        numbers = [shape.tiles for shape in self.shapes(images)]
        given = images.pixels.shape
        if len(given) != 5 or given[0] != len(numbers) or given[1] < max(numbers):
            raise BadInput(_shaped(images.pixels, len(numbers)))
        return [pixels[:number] for pixels, number in zip(images.pixels, numbers, strict=True)]

    def encode(
        self, images: Images, layers: Collection[int], *, values: bool = True, ready: Early | None = None
    ) -> TiledVision:
        """Images first, then videos: the model has a way of its own for each."""
        if not images.videos:
            return super().encode(images, layers, values=values, ready=ready)
        self.check_size(images)
        shapes, parts = self.shapes(images), list[tuple[dict[int, Tensor], list[Tensor]]]()
        assert images.sizes is not None  # noqa: S101
        if images.stills:
            stills = Images(images.pixels[: images.stills], images.sizes[: images.stills])
            get = partial(self.model.model.get_image_features, **self.inputs(stills), return_dict=True)
            parts.append(self._passed(get, layers, values, lambda output: self.own(stills, output)))
        frames_F3HW, done = images.pixels[images.stills :, 0], 0
        for number in images.videos:
            video = frames_F3HW[done : done + number].to(device_of(self.tower, frames_F3HW.device))
            get = partial(self.model.model.get_video_features, video[None], return_dict=True)
            parts.append(self._passed(get, layers, values, partial(_frames, number * shapes[-1].count, number)))
            done += number
        states = {layer: torch.cat([found[layer] for found, _ in parts]) for layer in layers}
        return TiledVision(self.eye, states, shapes, [each for _, made in parts for each in made] if values else None)

    def _passed(
        self, get: Callable[[], Any], layers: Collection[int], values: bool, own: Callable[[Any], list[Tensor]]
    ) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Hidden states of one pass, and values of each image or frame."""
        with fetched(self.model.model):
            states, output = recorded(self.eye.blocks, layers, get, whole=values)
        return states, own(output) if values else []

    def inputs(self, images: Images) -> dict[str, Any]:
        """With sizes, and which images have tiles."""
        assert images.sizes is not None  # noqa: S101
        together = list[int]()
        for tiled, members in groupby(images.sizes[:, 2].tolist()):
            number = len(list(members))
            together += [1] * number if tiled else [number]
            if not tiled and number == 1:
                raise BadInput("one image of a prompt that has several, without the others: give all of them")
        pixels = images.pixels.to(device_of(self.tower, images.pixels.device))
        return {"pixel_values": pixels, "image_sizes": images.sizes[:, :2], "batch_num_images": together}

    def own(self, images: Images, output: Any) -> list[Tensor]:
        """Without newlines."""
        found = []
        for made_XD, shape in zip(output.pooler_output, self.shapes(images), strict=True):
            places_N, _ = shape.newlines_of(torch.arange(shape.count))
            found.append(made_XD[places_N.to(made_XD.device)])
        return found

    def features(self, features_XD: Tensor, kind: Kind = "image") -> Any:
        """A tuple for images, one tensor for videos."""
        output = super().features(features_XD, kind)
        if kind == "video":
            # Older models put the last newline there themselves.
            output.pooler_output = (features_XD if self.takes_outputs else features_XD[:-1])[None]
        return output

    def maps(self, images: Images, number: int) -> list[Map]:  # noqa: D102 - as in Family
        shape = self.shapes(images)[number]
        return shape.maps() if isinstance(shape, Shape) else super().maps(images, number)

    def place(self, images: Images, number: int, indices_k: Tensor, features_kD: Tensor) -> Placed:
        """Tokens, and the newlines of rows of which one stays."""
        shape = self.shapes(images)[number]
        return with_newlines(shape, indices_k, features_kD, weight_of(self.model.model, "image_newline"))


def _frames(tokens: int, frames: int, output: Any) -> list[Tensor]:
    """Of a video's features those of each frame, without the newline."""
    return list(output.pooler_output[0, :tokens].chunk(frames))


def _shaped(pixels: Tensor, number: int) -> str:
    return (
        f"pixel_values of shape {list(pixels.shape)} for {number} images with their tiles: use the processor of this "
        "model, with the image_grid_pinpoints of its config"
    )
