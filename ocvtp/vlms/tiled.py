"""What families have in common whose tower sees tiles of equal size one by one: an image is one tile, or several.

A family says of each image how its tokens come from patches of its tiles (`Tiles`); all else follows.

Letters: I images, G images of a group, T tiles of all images, P patches of a tile, L positions in the tower (CLS first,
where there is one), N tokens of an image, M patches on a side of a token, C tower width.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.vlms.family import Early, Family, Vision, take
from ocvtp.vlms.images import Facts, Grid, Images, Layout, Part
from ocvtp.vlms.tower import Ready, Tower, device_of, fetched, parts_of, recorded


@dataclass(frozen=True)
class Tiles:
    """An image whose tokens are squares of patches, tile after tile, row by row in each.

    Attributes:
        tiles: how many the tower sees.
        side: patches on a side of a tile.
        merge: M.
    """

    tiles: int
    side: int
    merge: int = 1

    @property
    def grid(self) -> Grid:
        """Rows and columns of the tokens, the tiles one below the other."""
        return self.tiles * self.side // self.merge, self.side // self.merge

    @property
    def count(self) -> int:
        """N."""
        rows, columns = self.grid
        return rows * columns

    @property
    def span(self) -> int:
        """Placeholders in an unpruned prompt."""
        return self.count

    @property
    def layout(self) -> Layout:
        """Where tokens stand: a part a tile."""
        side = self.side // self.merge
        return tuple(Part(tile * side * side, (side, side)) for tile in range(self.tiles))

    def arranged(self, patches_TPX: Tensor) -> Tensor:
        """Something of each patch of its tiles for its tokens: their mean, [N, X]."""
        if self.merge == 1:
            return patches_TPX.flatten(0, 1)
        side = self.side // self.merge
        squares_TsMsMX: Tensor = patches_TPX.unflatten(1, (side, self.merge, side, self.merge))
        return squares_TsMsMX.mean((2, 4)).flatten(0, 2)


class TiledVision(Vision):
    """Hidden states of the tiles, CLS first."""

    def __init__(
        self, tower: Tower, states: dict[int, Tensor], shapes: Sequence[Any], values: Sequence[Tensor] | int | None
    ) -> None:
        """`values`: of each image; or the layer whose tokens they are."""
        self._tower, self._states, self._shapes, self._values = tower, states, shapes, values
        self.counts = [shape.count for shape in shapes]
        self.grids = [shape.grid for shape in shapes]
        ends = torch.tensor([shape.tiles for shape in shapes]).cumsum(0).tolist()
        self._tiles = [range(end - shape.tiles, end) for end, shape in zip(ends, shapes, strict=True)]

    def layout(self, member: int) -> Layout:  # noqa: D102 - as in Vision
        layout: Layout = self._shapes[member].layout
        return layout

    def _seen(self, layer: int, members: Sequence[int]) -> Tensor:
        """Hidden states of the tiles of some images, [T, L, C]."""
        return take(self._states[layer], [tile for member in members for tile in self._tiles[member]])

    def _arranged(self, tiles_TPX: Tensor, members: Sequence[int]) -> Tensor:
        """Something of each patch of each tile of some images, for their tokens, [G, N, ...]."""
        parts = tiles_TPX.split([len(self._tiles[member]) for member in members])
        return torch.stack([self._shapes[m].arranged(part) for m, part in zip(members, parts, strict=True)])

    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._arranged(self._seen(layer, members)[:, self._tower.first :], members)

    def values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        assert self._values is not None  # noqa: S101 - without values nobody asks for them
        if isinstance(self._values, int):
            return self.tokens(self._values, members)
        return torch.stack([self._values[member] for member in members])

    def onward(self, layer: int, last: int, indices_Gk: Tensor, members: Sequence[int]) -> Tensor:
        """Some tokens of each image in `hidden_states[last]`, had they and CLS been alone from `layer` on, [G, k, C].

        Only where tokens are patches. Each tile is by itself; those with equally many of the tokens run together.

        Args:
            layer: of which `hidden_states` were recorded.
            last: a deeper one.
            indices_Gk: numbers of the tokens, each once; -1 is none, and its row is zero.
            members: which images.
        """
        states_TLC, first = self._seen(layer, members), self._tower.first
        patches, device, done = states_TLC.shape[1] - first, states_TLC.device, 0
        where, there_Gk = list[Tensor](), (indices_Gk >= 0).to(device)
        for member, indices_k in zip(members, indices_Gk.cpu().clamp(min=0), strict=True):
            seen = patches * len(self._tiles[member])
            patches_N = self._shapes[member].arranged(torch.arange(seen).view(-1, patches))
            where.append(done + patches_N[indices_k])
            done += seen
        where_Gk = torch.stack(where).to(device)
        stays_X = torch.zeros(done, dtype=torch.bool, device=device)
        stays_X[where_Gk[there_Gk]] = True
        stays_TP, made_TPC = stays_X.view(-1, patches), torch.zeros_like(states_TLC[:, first:])
        counts_T = stays_TP.sum(1)
        for count in set(counts_T.tolist()) - {0}:
            those_t = (counts_T == count).nonzero()[:, 0]
            places_tn = stays_TP[those_t].nonzero()[:, 1].view(-1, count)
            left_tnC = states_TLC[those_t[:, None], first + places_tn]
            left_tlC = self._tower.onward(torch.cat([states_TLC[those_t, :first], left_tnC], 1), layer, last)
            made_TPC[those_t[:, None], places_tn] = left_tlC[:, first:]
        return made_TPC.flatten(0, 1)[where_Gk] * there_Gk[..., None]

    def received(self, block: int, members: Sequence[int]) -> Tensor:
        """Within each tile: mean over heads and over the queries of that tile."""
        return self._arranged(self._tower.received(self._seen(block, members), block), members)

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        if not self._tower.first:
            return super().from_cls(block, members)
        return self._arranged(self._tower.from_cls(self._seen(block, members), block), members)

    def keys(self, block: int, members: Sequence[int]) -> Tensor:  # noqa: D102
        return self._arranged(self._tower.keys(self._seen(block, members), block), members)

    def cls_values(self, members: Sequence[int]) -> Tensor:  # noqa: D102
        if not self._tower.first or not isinstance(self._values, int):
            return super().cls_values(members)
        cls_TC = self._seen(self._values, members)[:, 0]
        return cls_TC.view(len(members), -1, cls_TC.shape[1])


class TiledFamily(Family):
    """A family with such a tower."""

    outer: ClassVar[int] = 1
    """Dimensions of `pixel_values` before those of a tile, [3, H, W]."""

    @classmethod
    def tiled_facts(cls, config: Any, tokens: int | None, grid: Grid | None) -> Facts:
        """The facts of its tower, which is fed to the language model from one layer, without CLS."""
        parts, vision = parts_of(config), config.vision_config
        layer = getattr(config, "vision_feature_layer", -1)
        strategy = getattr(config, "vision_feature_select_strategy", "default" if parts.cls else "full")
        wanted = "default" if parts.cls else "full"
        if not isinstance(layer, int) or strategy != wanted:
            raise BadInput(
                f"vision_feature_layer is {layer!r} and vision_feature_select_strategy is {strategy!r}: one layer, and "
                f"{wanted!r} (no CLS), are supported for a {vision.model_type}"
            )
        return Facts(
            tokens=tokens,
            grid=grid,
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            feature_layer=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
            cls=parts.cls,
        )

    @property
    def tower(self) -> Any:
        """The vision model."""
        return self.model.model.vision_tower

    @property
    def projectors(self) -> list[Any]:
        """What makes tokens of the language model of the tower's."""
        return [self.model.model.multi_modal_projector]

    @property
    def pixel_shape(self) -> tuple[int | None, ...]:
        """Any number of tiles of one size."""
        vision = self.model.config.vision_config
        size = vision.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return (*[None] * self.outer, vision.num_channels, *sides)

    @cached_property
    def eye(self) -> Tower:
        """The same with the names of its parts."""
        return Tower(self.tower)

    @abstractmethod
    def shapes(self, images: Images) -> Sequence[Any]:
        """How the tokens of each image come from its tiles: `Tiles`, or something with its attributes."""

    def tiles(self, images: Images) -> list[Tensor]:
        """The tiles of each image, [its tiles, 3, H, W]. Here: as they stand in a row."""
        return list(images.pixels.split([shape.tiles for shape in self.shapes(images)]))

    def check_size(self, images: Images) -> None:
        """`BadInput` for tiles of another size than the tower's, before it runs."""
        size = self.model.config.vision_config.image_size
        wanted = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(images.pixels.shape[-2:]) != wanted:
            height, width = images.pixels.shape[-2:]
            raise BadInput(
                f"pixel_values of {height} x {width} pixels, but the vision tower sees {wanted[0]} x {wanted[1]}: use "
                "the processor of this model"
            )

    def inputs(self, images: Images) -> dict[str, Any]:
        """Arguments of the model's `get_image_features`, for values that it makes."""
        return {"pixel_values": images.pixels}

    def own(self, images: Images, output: Any) -> list[Tensor]:
        """What the model's `get_image_features` made of each image, [N, D], one a token. Here: [T, P, D] in a row."""
        made_TPD: Tensor = output.pooler_output
        return [part.flatten(0, 1) for part in made_TPD.split([shape.tiles for shape in self.shapes(images)])]

    def pixels_of(self, images: Images, number: int) -> Tensor:  # noqa: D102 - as in Family
        return self.tiles(images)[number]

    def counts(self, images: Images) -> list[int]:  # noqa: D102
        return [shape.count for shape in self.shapes(images)]

    def grids(self, images: Images) -> list[Grid]:
        """As `Tiles` has them; `Vision.layout` has those of single tiles."""
        return [shape.grid for shape in self.shapes(images)]

    def spans(self, images: Images) -> list[int]:  # noqa: D102
        return [shape.span for shape in self.shapes(images)]

    def encode(
        self, images: Images, layers: Collection[int], *, values: bool = True, ready: Early | None = None
    ) -> TiledVision:
        """Values are what the model's own `get_image_features` makes."""
        self.check_size(images)
        inputs = self.inputs(images)
        inputs["pixel_values"] = inputs["pixel_values"].to(device_of(self.tower, images.pixels.device))
        get = self.model.model.get_image_features
        with fetched(self.model.model):
            states, output = recorded(
                self.eye.blocks, layers, lambda: get(**inputs, return_dict=True), whole=values,
                ready=self.early(images, layers, ready),
            )  # fmt: skip
        return TiledVision(self.eye, states, self.shapes(images), self.own(images, output) if values else None)

    def early(self, images: Images, layers: Collection[int], ready: Early | None) -> Ready | None:
        """What is ready when all of these layers are."""
        if ready is None:
            return None
        return Ready(max(layers), lambda states: ready(TiledVision(self.eye, states, self.shapes(images), None)))


class ProjectedLate(TiledFamily):
    """A family whose values are tokens of one layer of the tower, which a projector reads one by one."""

    def encode(
        self, images: Images, layers: Collection[int], *, values: bool = True, ready: Early | None = None
    ) -> TiledVision:
        """Stops after the layer that values come from."""
        self.check_size(images)
        wanted = {*layers, *([self.facts.feature_layer] if values else [])}
        states = self.eye.states(torch.cat(self.tiles(images)), wanted, self.early(images, layers, ready))
        return TiledVision(self.eye, states, self.shapes(images), self.facts.feature_layer)

    def project(self, values: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102 - as in Family
        projected = self.model.model.multi_modal_projector(torch.cat(list(values)))
        return list(projected.split([len(each) for each in values]))

    def numbers(self, images: Images) -> list[Tensor]:
        """For each image, [its tiles, P]: which of its tokens each patch is, for methods that run the tower themselves.

        `Incompatible` where not every patch is a token.
        """
        found, patches = [], (self.tower.config.image_size // self.tower.config.patch_size) ** 2
        for number, shape in enumerate(self.shapes(images)):
            if shape.count != shape.tiles * patches:
                raise Incompatible(
                    f"of the {shape.tiles * patches} patches of image {number} padding is cut off, so that only "
                    f"{shape.count} are tokens: set mm_patch_merge_type to 'flat', as "
                    "`ocvtp.vlms.families.llava_next.paper_mode` does"
                )
            patches_N = shape.arranged(torch.arange(shape.count).view(shape.tiles, -1))
            found.append(patches_N.argsort().view(shape.tiles, -1))
        return found
