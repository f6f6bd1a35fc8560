"""Intrinsic measures of methods: what they keep of images, and how well that stands for all. No language model.

Letters: I images of a batch, G images of a group, N tokens of an image, k tokens kept.
"""

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from PIL import Image

from ocvtp.data.coverage import Covered, Objects
from ocvtp.data.decoding import open_image
from ocvtp.errors import BadInput
from ocvtp.inspection.segments import Picture
from ocvtp.methods import Budget, Encoded, Method, entry_of, options_of
from ocvtp.pruner.seeding import derive
from ocvtp.pruning.choosing import encode_groups
from ocvtp.selection import prototype_error, span_error
from ocvtp.tokens.object_masks import objects
from ocvtp.vlms.family import Family, Vision
from ocvtp.vlms.images import Images, Map

MEASURES: Final = ("cover", "small", "span", "span_on", "near", "distinct", "milliseconds")


@dataclass(frozen=True)
class Subject:
    """A tower, alone or of a VLM, and how images get to it.

    Attributes:
        family: of it.
        processor: of a VLM; None of a tower that stands alone.
        fit: `pad`, `squash` or `crop`.
    """

    family: Family
    processor: Any
    fit: str

    def images(self, pictures: list[Image.Image]) -> Images:
        """Images for the tower."""
        return self.family.preprocess(self.processor, pictures, mode=self.fit)

    def maps(self, images: Images, number: int) -> list[Map]:
        """Where the tokens of an image lie over what the tower sees of it."""
        found = self.family.maps(images, number)
        grid = self.family.facts.grid
        if self.fit == "pad" and grid is not None and len(found) == 1:
            return [Map(found[0].numbers_hw, grid[1] / grid[0])]
        return found


@dataclass(frozen=True)
class Asked:
    """A method on one layer (None: its own), its trained pruner if it needs one, and its other options."""

    method: str
    layer: int | None = None
    pruner: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, pruner: Any = None) -> "Asked":
        """`css` or `css@12`; `BadInput` if what follows @ is no number."""
        name, at, layer = text.partition("@")
        if at and not re.fullmatch(r"-?[0-9]+", layer):
            raise BadInput(f"{text!r}: METHOD or METHOD@LAYER, such as css@9, is needed")
        return cls(name, int(layer) if at else None, pruner if entry_of(name).trained else None)

    @property
    def name(self) -> str:
        """As it was asked for."""
        return self.method if self.layer is None else f"{self.method}@{self.layer}"

    def build(self, family: Family, seed: int) -> Method:
        """The method; `BadInput` where it does not choose tokens before the LLM, or reads the prompt."""
        entry = entry_of(self.method)
        if entry.acts != "before the LLM" or entry.needs_text:
            raise BadInput(f"{self.method} needs a language model or a prompt, and inspect has neither")
        given = {"weights_seed": seed} if "weights_seed" in entry.options else {}
        given |= self.options
        if self.layer is not None:
            given["layer"] = self.layer
        method = entry.build(family, self.pruner, options_of(entry, given))
        assert method is not None  # noqa: S101 - it acts before the LLM
        return method


@dataclass
class Row:
    """One method at one budget with one seed.

    Attributes:
        method, keep, seed: which.
        tokens: kept, mean over images.
        cover, small: share of objects, and of small ones, with a kept token on them; None without masks.
        span, span_on: `ocvtp.selection.span_error` of the reference layer, and of what goes to the LLM.
        near: `ocvtp.selection.prototype_error` of what goes to the LLM.
        distinct: tokens that slots attend to most; of a method without slots, tokens kept.
        milliseconds: of the choice itself, an image, without the tower: median over batches; None of a method that
            works inside the tower.
    """

    method: str
    keep: int | float | str
    seed: int
    tokens: float
    cover: float | None
    small: float | None
    span: float
    span_on: float
    near: float
    distinct: float
    milliseconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        return asdict(self)


@dataclass
class _Sums:
    covered: Covered = field(default_factory=Covered)
    images: int = 0
    milliseconds: list[float] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@torch.no_grad()
def measure(
    subject: Subject,
    pictures: Sequence[Picture],
    asked: Sequence[Asked],
    keeps: Sequence[int | float | str],
    seeds: Sequence[int],
    *,
    layer: int,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Measure methods, each with every budget and, if it draws anything, every seed.

    The tower looks at each image once, and once more for each method that changes what it does.

    Args:
        subject: the tower.
        pictures: the images.
        asked: the methods.
        keeps: tokens an image, or shares of them.
        seeds: of what methods draw, and of untrained weights.
        layer: the reference layer, counted as in the paper.
        batch_size: images at once.
        progress: told images done and all of them.

    Raises:
        BadInput, Incompatible: as the methods do.
        BadImage: a file that is no image.
    """
    family, reference = subject.family, subject.family.index(layer)
    cells = [
        (one, keep, seed, one.build(family, seed))
        for one in asked
        for keep in keeps
        for seed in (seeds if entry_of(one.method).random else seeds[:1])
    ]
    layers = {reference}.union(*(method.layers() for *_, method in cells))
    sums = [_Sums() for _ in cells]
    for start in range(0, len(pictures), batch_size):
        some = pictures[start : start + batch_size]
        opened = [open_image(picture.path) for picture in some]
        images = subject.images(opened)
        vision = family.encode(images, layers)
        hit = [
            _objects(picture, image.size, subject.fit, subject.maps(images, number))
            for number, (picture, image) in enumerate(zip(some, opened, strict=True))
        ]
        names = [picture.path.name for picture in some]
        for (_, keep, seed, method), total in zip(cells, sums, strict=True):
            own = None if type(method).encode is not Method.encode else vision
            for encoded in encode_groups(
                family,
                method,
                Budget.parse(keep),
                images,
                [derive(seed, name) for name in names],
                [[]] * len(some),
                vision=own,
            ):
                _add(total, method, encoded, vision, reference, hit)
        if progress is not None:
            progress(min(start + batch_size, len(pictures)), len(pictures))
    return [_row(*cell[:3], total) for cell, total in zip(cells, sums, strict=True)]


def _objects(picture: Picture, size: tuple[int, int], fit: str, maps: Sequence[Map]) -> Objects | None:
    """None without segments."""
    try:
        return objects(picture.segments, size, fit, maps) if picture.segments else None
    except BadInput as error:
        raise BadInput(f"{picture.path}: {error}") from error


def _add(total: _Sums, method: Method, encoded: Encoded, vision: Vision, reference: int, hit: Sequence[Any]) -> None:
    tokens_GNC, values_GNV = vision.tokens(reference, encoded.members), vision.values(encoded.members)
    if total.images == 0:
        method.choose(encoded)  # untimed: the first call of all allocates and compiles
    _wait(tokens_GNC.device)
    before = time.perf_counter()
    indices_Gk = method.choose(encoded).indices_Gk.to(tokens_GNC.device)
    _wait(tokens_GNC.device)
    if type(method).encode is Method.encode:
        total.milliseconds.append(1000 * (time.perf_counter() - before) / len(encoded.members))
    attention_GKN = method.slots(encoded)
    if attention_GKN is None:
        distinct_G = (indices_Gk >= 0).sum(1)
    else:
        distinct_G = torch.zeros_like(attention_GKN[:, 0]).scatter(1, attention_GKN.argmax(2), 1.0).sum(1)
    numbers = {
        "tokens": (indices_Gk >= 0).sum(1),
        "span": span_error(tokens_GNC, indices_Gk),
        "span_on": span_error(values_GNV, indices_Gk),
        "near": prototype_error(values_GNV, indices_Gk),
        "distinct": distinct_G,
    }
    for name, values_G in numbers.items():
        total.numbers[name] += float(values_G.sum())
    total.images += len(encoded.members)
    for member, row in zip(encoded.members, indices_Gk.tolist(), strict=True):
        if hit[member] is not None:
            total.covered += hit[member].covered_by(row)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(asked: Asked, keep: int | float | str, seed: int, total: _Sums) -> Row:
    return Row(
        method=asked.name,
        keep=keep,
        seed=seed,
        cover=total.covered.share,
        small=total.covered.small_share,
        milliseconds=statistics.median(total.milliseconds) if total.milliseconds else None,
        **{name: value / total.images for name, value in total.numbers.items()},
    )


def summary(rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
    """One row for each budget and method: means over seeds, and how many there are."""
    groups: dict[tuple[Any, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.keep, row.method].append(row)
    for (keep, method), some in groups.items():
        means: dict[str, float | None] = {}
        for name in ("tokens", *MEASURES):
            known = [value for row in some if (value := getattr(row, name)) is not None]
            means[name] = sum(known) / len(known) if known else None
        yield {"method": method, "keep": keep, "seeds": len(some), **means}
