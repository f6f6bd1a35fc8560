"""Vision towers that stand alone, as methods and measures see the towers of VLMs.

Letters: I images, G images of a group, N tokens of an image (CLS is none of them), C tower width.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.json_files import read_json
from ocvtp.vlms.family import Early, Family, Vision, take
from ocvtp.vlms.images import Facts, Grid, Images


@dataclass(frozen=True)
class Kind:
    """What a class of towers is like.

    Attributes:
        name: of the class of transformers.
        cls: rows before the patches.
        last: layer that is handed on, counted from the end as in VLMs of this tower.
        side: of its images in pixels; None: as its config says.
        mean, std: of its colours, unless the folder has a preprocessor_config.json.
    """

    name: str
    cls: int
    last: int
    side: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CLIP: Final = Kind("CLIPVisionModel", 1, -2, None, (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
_SIGLIP: Final = Kind("SiglipVisionModel", 0, -1, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
KINDS: Final[Mapping[str, Kind]] = {
    "dinov2": Kind("Dinov2Model", 1, -1, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}
"""By `model_type` of config.json."""


class TowerVision(Vision):
    """Hidden states, without what comes before the patches."""

    def __init__(self, family: "TowerFamily", states: Sequence[Tensor], count: int) -> None:
        self._family, self._states = family, states
        self.counts = [family.facts.tokens or 0] * count
        self.grids = family.grids_of(count)

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:  # noqa: D102 - as in Vision
        return take(self._states[layer], members)[:, self._family.kind.cls :]

    def values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self.tokens(self._family.facts.feature_layer, members)

    def received(self, block: int, members: Sequence[int]) -> NoReturn:  # noqa: D102
        raise Incompatible(_ALONE)

    def from_cls(self, block: int, members: Sequence[int]) -> NoReturn:  # noqa: D102
        raise Incompatible(_ALONE)

    def keys(self, block: int, members: Sequence[int]) -> NoReturn:  # noqa: D102
        raise Incompatible(_ALONE)

    def cls_values(self, members: Sequence[int]) -> NoReturn:  # noqa: D102
        raise Incompatible(_ALONE)


_ALONE = (
    "this method reads attention, keys or CLS; of a tower without a VLM only tokens are read: inspect it with --vlm"
)


class TowerFamily(Family):
    """A tower without a language model: it looks at images, and there is nothing to hand tokens on to."""

    vision_inputs: ClassVar[frozenset[str]] = frozenset({"pixel_values"})

    def __init__(self, model: Any, kind: Kind, side: int, colours: tuple[Sequence[float], Sequence[float]]) -> None:
        """`side` of its images in pixels; mean and standard deviation of their `colours`."""
        config = model.config
        grid = (side // config.patch_size,) * 2
        depth = config.num_hidden_layers
        self.model, self.kind, self._side, self._colours = model, kind, side, colours
        self.facts = Facts(grid[0] * grid[1], grid, config.hidden_size, depth, depth + 1 + kind.last, kind.cls > 0)

    @classmethod
    def facts_of(cls, config: Any) -> NoReturn:  # noqa: D102 - as in Family
        raise Incompatible("a tower's facts follow from its folder: ocvtp.inspection.towers.load")

    @property
    def tower(self) -> Any:  # noqa: D102
        return self.model

    @property
    def projectors(self) -> list[Any]:
        """None: there is nothing to project for."""
        return []

    def grids_of(self, count: int) -> list[Grid]:
        """Rows and columns of tokens of some images."""
        assert self.facts.grid is not None  # noqa: S101
        return [self.facts.grid] * count

    def preprocess(self, processor: Any, images: list[Image.Image], *, mode: str) -> Images:
        """The middle of each image (`crop`), as these towers were trained, or all of it (`squash`)."""
        if mode not in ("crop", "squash"):
            raise BadInput(f"preprocessing {mode!r}: crop or squash is needed")
        size = (self._side, self._side)
        squares = [square(image) if mode == "crop" else image for image in images]
        pixels = np.stack([np.asarray(each.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for each in squares])
        mean, std = (torch.tensor(each)[:, None, None] for each in self._colours)
        return Images((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)

    def images(self, call: Mapping[str, Any]) -> NoReturn:  # noqa: D102
        raise Incompatible(_NO_PROMPTS)

    def pixels_of(self, images: Images, number: int) -> Tensor:  # noqa: D102
        return images.pixels[number]

    def counts(self, images: Images) -> list[int]:  # noqa: D102
        return [self.facts.tokens or 0] * len(images)

    def grids(self, images: Images) -> list[Grid]:  # noqa: D102
        return self.grids_of(len(images))

    def spans(self, images: Images) -> NoReturn:  # noqa: D102
        raise Incompatible(_NO_PROMPTS)

    def encode(
        self, images: Images, layers: Collection[int], *, values: bool = True, ready: Early | None = None
    ) -> TowerVision:
        """In one go: nothing is ready before the tower is done."""
        model = self.model
        pixels = images.pixels.to(model.device, model.dtype)
        found = TowerVision(self, model(pixel_values=pixels, output_hidden_states=True).hidden_states, len(images))
        if ready is not None:
            ready(found)
        return found

    def project(self, values: Sequence[Tensor]) -> NoReturn:  # noqa: D102
        raise Incompatible(_NO_PROMPTS)


_NO_PROMPTS = "a tower without a language model takes no prompts"


def square(image: Image.Image) -> Image.Image:
    """The middle of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def load(folder: Path, device: str = "cpu") -> TowerFamily:
    """A tower from a folder with config.json and weights, in float32 on a CPU and in its own type elsewhere.

    Raises:
        BadInput: the folder holds no such tower.
        Corrupt: a file of it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no config.json: a folder with a tower of transformers is needed")
    written = read_json(path).get("model_type")
    kind = KINDS.get(str(written))
    if kind is None:
        raise BadInput(f"{path} is of the type {written!r}: as towers {', '.join(KINDS)} are read")
    import transformers

    model = getattr(transformers, kind.name).from_pretrained(folder, dtype=torch.float32 if device == "cpu" else "auto")
    processor = folder / "preprocessor_config.json"
    given = read_json(processor) if processor.is_file() else {}
    colours = (given.get("image_mean", kind.mean), given.get("image_std", kind.std))
    return TowerFamily(model.to(device).eval(), kind, kind.side or model.config.image_size, colours)
