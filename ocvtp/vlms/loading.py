"""A VLM loaded with its processor, ready for inference.

Letters: I images, N tokens of an image without CLS, C tower width.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ocvtp.errors import BadInput
from ocvtp.vlms.catalogue import CatalogEntry, resolve
from ocvtp.vlms.families import family_class, family_of
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Grid, Images
from ocvtp.vlms.tiled import TiledFamily


@dataclass(frozen=True)
class VLM:
    """A loaded VLM."""

    entry: CatalogEntry
    model: Any
    processor: Any
    family: Family

    @property
    def name(self) -> str:
        """In the catalogue, or its folder."""
        return self.entry.name

    @property
    def revision(self) -> str:
        """Commit on the hub; "" for a folder."""
        return self.entry.revision

    @property
    def weights(self) -> str:
        """What tells its weights from others."""
        return self.entry.weights

    @property
    def depth(self) -> int:
        """Encoder blocks of the tower."""
        return self.entry.depth

    @property
    def width(self) -> int:
        """C."""
        return self.entry.width

    @cached_property
    def _seen(self) -> Family:
        """The family with all that the tower sees as tokens."""
        return self.family.untrimmed()

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of the tokens that `tower` gives of an image; None where they depend on the image."""
        return self._seen.facts.grid

    def preprocess(self, images: list[Image.Image], *, mode: str = "pad") -> Images:
        """Images for the tower: padded to the shape that it wants, or squashed into it."""
        return self.family.preprocess(self.processor, images, mode=mode)

    def grids(self, images: Images) -> list[Grid]:
        """Rows and columns of the tokens that `tower` gives of each image."""
        return self._seen.grids(images)

    def tower(self, images: Images, layers: Collection[int]) -> dict[int, Tensor]:
        """Tokens of each layer, [I, N, C] without CLS, in one pass that stops after the deepest layer.

        They are what a pruner is trained on: all that the tower sees. Of LLaVA-NeXT that is tile upon tile with their
        padding, in one tall grid, in whatever mode the model is.

        Args:
            images: as `preprocess` makes them.
            layers: counted as in the paper: 9 is `hidden_states[9]`, -1 the last block's output.

        Returns:
            By layer as given. An image with fewer tokens than others is padded with zeros at the end.
        """
        indices = {layer: self.family.index(layer) for layer in layers}
        with torch.inference_mode():
            vision = self._seen.encode(images, set(indices.values()), values=False)
            everyone = range(len(images))
            if len(set(vision.counts)) == 1:
                return {layer: vision.tokens(index, everyone) for layer, index in indices.items()}
            return {
                layer: pad_sequence([vision.tokens(index, [i])[0] for i in everyone], batch_first=True)
                for layer, index in indices.items()
            }


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> VLM:
    """Load a VLM with its processor, ready for inference: SDPA attention, padding on the left.

    Args:
        name: of the catalogue, or a folder.
        revision: on the hub, instead of the catalogue's.
        device: where to put it.
        dtype: of the weights, such as `torch.bfloat16` or "float16"; None: float32 on a CPU, else bfloat16.

    Raises:
        BadInput: unknown name, unsupported model or dtype.
        NotAvailable: the weights are not on this machine; says how to get them.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    entry = resolve(name, revision=revision)
    wanted = _dtype(dtype, torch.device(device))
    model = AutoModelForImageTextToText.from_pretrained(entry.folder, dtype=wanted, attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(entry.folder)
    processor.tokenizer.padding_side = "left"
    model = model.to(device).eval()
    _settle(entry, model.config, processor)
    model.ocvtp_entry = entry
    return VLM(entry, model, processor, family_of(model))


@dataclass(frozen=True)
class ImageShape:
    """What a VLM makes of an image.

    Attributes:
        tokens: N.
        grid: rows and columns of these; None where they are those of tiles.
        tiles: that the tower sees one by one; None where it sees the image as it is.
    """

    tokens: int
    grid: Grid | None
    tiles: int | None


def image_shapes(entry: CatalogEntry, sizes: Sequence[tuple[int, int]]) -> list[ImageShape]:
    """What a VLM makes of images of these widths and heights in pixels, by its own processor; reads no weights.

    Raises:
        BadInput: an image that the processor refuses, such as a very narrow one; names its size.
    """
    from transformers import AutoConfig, AutoProcessor

    config, processor = AutoConfig.from_pretrained(entry.folder), AutoProcessor.from_pretrained(entry.folder)
    _settle(entry, config, processor)
    # Of the model shapes ask the config alone.
    family = family_class(entry.family, entry.name)(SimpleNamespace(config=config))
    found = dict[tuple[int, int], ImageShape]()
    for size in dict.fromkeys(sizes):
        try:
            images = family.preprocess(processor, [Image.new("RGB", size)], mode="pad")
        except ValueError as error:
            raise BadInput(f"{entry.name} cannot take an image of {size[0]} x {size[1]} pixels: {error}") from error
        (tokens,), (grid,) = family.counts(images), family.grids(images)
        tiles = len(family.tiles(images)[0]) if isinstance(family, TiledFamily) else None
        found[size] = ImageShape(tokens, grid if tiles is None else None, tiles)
    return [found[size] for size in sizes]


def _settle(entry: CatalogEntry, config: Any, processor: Any) -> None:
    """Put the catalogue's settings into config and processor."""
    for setting, value in entry.settings.items():
        setattr(config, setting, copy.deepcopy(value))
        if hasattr(processor.image_processor, setting):
            setattr(processor.image_processor, setting, copy.deepcopy(value))


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BadInput(f"dtype {dtype!r}: float32, bfloat16 or float16 is needed")
    return found
