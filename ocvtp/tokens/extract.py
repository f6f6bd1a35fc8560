"""Vision tokens of images, every layer asked for in one pass of the tower.

Letters: B images of a batch, N tokens of an image (the CLS token is none of them), C width of a token.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ocvtp.data.decoding import BadImage, open_image, read_image_file
from ocvtp.errors import BadInput
from ocvtp.tokens.manifest import DTYPES, Shard, ShardMeta
from ocvtp.tokens.read_ahead import read_ahead
from ocvtp.tokens.rows import TokenRow
from ocvtp.tokens.writer import ShardWriter, ensure_space
from ocvtp.vlms.hidden_states import resolve_layers


class Tower(Protocol):
    """What extraction needs of a VLM."""

    @property
    def name(self) -> str:
        """In the catalogue."""

    @property
    def revision(self) -> str:
        """Of the weights, as the hub counts."""

    @property
    def weights(self) -> str:
        """Fingerprint of the weights."""

    @property
    def depth(self) -> int:
        """Encoder blocks of the tower."""

    @property
    def width(self) -> int:
        """Numbers a token in the tower."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width in tokens, if every image has the same."""

    def preprocess(self, images: list[Image.Image], *, mode: str) -> Any:
        """What `tower` takes."""

    def grids(self, pixels: Any) -> list[tuple[int, int]]:
        """Height and width in tokens of each image."""

    def tower(self, pixels: Any, layers: Sequence[int]) -> Mapping[int, Tensor]:
        """`hidden_states[layer]` without CLS, [B, N, C] each, padded at the end; stops after the deepest layer."""


@dataclass(frozen=True)
class ImageRecord:
    """An image to extract: `sha256` is that of its file when it was sampled, or None if it may be any."""

    id: str
    path: Path
    sha256: str | None = None


def extract_tokens(
    vlm: Tower,
    records: Sequence[ImageRecord],
    layers: Sequence[int],
    folder: Path | str,
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    preprocessing: str = "pad",
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Shard]:
    """Write one shard a layer, `folder/layer_<layer>/tokens.arrow`, with the rows in the order of `records`.

    The files are a function of the arguments (the batch size too: matrix products of another size round otherwise).

    Args:
        vlm: whose tower runs, once for all layers.
        records: the images.
        layers: counted as in the paper (`ocvtp.vlms.hidden_states`).
        folder: is made if need be.
        dtype: of the stored tokens: float16, bfloat16 or float32.
        batch_size: images a pass.
        preprocessing: how an image becomes pixels, as `vlm.preprocess` names it.
        progress: called with (images done, images in all).

    Returns:
        Folder and manifest of each layer's shard.

    Raises:
        BadInput: before any work: a layer outside of the tower, no image, an id twice, an unknown dtype. During the
            work, with nothing left behind: an image that is missing, damaged or not the one that was sampled (names
            its id), tokens that are not finite or do not fit the dtype.
        DiskFull: there is no room; checked as soon as the size of the tokens is known.
    """
    indices = check_plan(vlm, records, layers, dtype=dtype, batch_size=batch_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writers = {
        layer: ShardWriter(folder / f"layer_{layer}", _meta(vlm, layer, index, dtype, preprocessing))
        for layer, index in indices.items()
    }
    starts = range(0, len(records), batch_size)
    batches = read_ahead(_decoded, (records[start : start + batch_size] for start in starts), 1)
    done = 0
    with ExitStack() as stack, torch.inference_mode():
        stack.callback(batches.close)
        for writer in writers.values():
            stack.enter_context(writer)
        for batch, images in batches:
            pixels = vlm.preprocess(images, mode=preprocessing)
            grids, states = vlm.grids(pixels), vlm.tower(pixels, sorted(set(indices.values())))
            if done == 0:
                tokens = max(height * width for height, width in grids) * len(records)
                ensure_space(folder, tokens * vlm.width * DTYPES[dtype].itemsize * len(writers))
            for layer, index in indices.items():
                tokens_BNC = states[index].cpu()
                for record, grid, tokens_NC in zip(batch, grids, tokens_BNC, strict=True):
                    writers[layer].add(TokenRow(record.id, tokens_NC[: grid[0] * grid[1]], grid))
            done += len(batch)
            if progress is not None:
                progress(done, len(records))
    return {layer: (writer.path.parent, writer.manifest) for layer, writer in writers.items()}


def check_plan(
    vlm: Tower, records: Sequence[ImageRecord], layers: Sequence[int], *, dtype: str, batch_size: int
) -> dict[int, int]:
    """What can be wrong before any work; returns the index into `hidden_states` of each layer."""
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r} of stored tokens: one of {', '.join(DTYPES)} is needed")
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}: at least one image is needed")
    if not records:
        raise BadInput("no images to extract tokens of")
    seen = set[str]()
    for record in records:
        if record.id in seen:
            raise BadInput(f"image {record.id} ({record.path}) is given twice")
        seen.add(record.id)
    return resolve_layers(layers, vlm.depth, vlm=f"the vision tower of {vlm.name}")


def _meta(vlm: Tower, layer: int, index: int, dtype: str, preprocessing: str) -> ShardMeta:
    return ShardMeta(
        vlm=vlm.name,
        revision=vlm.revision,
        weights=vlm.weights,
        layer=layer,
        tower_layer=index,
        width=vlm.width,
        dtype=dtype,
        preprocessing=preprocessing,
        grid=vlm.grid,
    )


def _decoded(batch: Sequence[ImageRecord]) -> tuple[Sequence[ImageRecord], list[Image.Image]]:
    return batch, [open_record(record) for record in batch]


def open_record(record: ImageRecord) -> Image.Image:
    """An image, decoded; `BadInput` names one that is missing, damaged or not the one that was sampled."""
    try:
        data = read_image_file(record.path)
        if record.sha256 is not None and hashlib.sha256(data).hexdigest() != record.sha256:
            raise BadInput(
                f"image {record.id}: {record.path} is not the file that was sampled (SHA-256 differs); sample again"
            )
        return open_image(data, name=str(record.path))
    except BadImage as error:
        raise BadInput(f"image {record.id}: {error}") from error
