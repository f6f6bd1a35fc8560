"""What a family of VLMs must offer, so that one pruning code serves all of them.

Letters: I images, G images of a group (all with the same N), N tokens of an image (CLS is none of them), k tokens kept,
C tower width, V width of the values that the projector reads, D width of the language model, B prompts, L positions.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.vlms.hidden_states import resolve_layer
from ocvtp.vlms.images import Facts, Grid, Images, Kind, Layout, Map, Part, Placed


class Vision(ABC):
    """What the tower made of some images. `members` are the numbers of images that have the same N."""

    counts: list[int]
    """N of each image."""
    grids: list[Grid]
    """Rows and columns of each image's tokens."""

    def layout(self, member: int) -> Layout:
        """Where the tokens of an image stand."""
        return (Part(0, self.grids[member]),)

    @abstractmethod
    def tokens(self, layer: int, members: Sequence[int]) -> Tensor:
        """`hidden_states[layer]` without CLS, [G, N, C]; only of layers that were asked for."""

    @abstractmethod
    def values(self, members: Sequence[int]) -> Tensor:
        """What is handed on of each token that is kept, [G, N, V]."""

    @abstractmethod
    def received(self, block: int, members: Sequence[int]) -> Tensor:
        """Attention that each token receives in an encoder block (counted from 0), [G, N].

        Mean over heads and over all queries, CLS among them. `hidden_states[block]` must have been asked for.
        """

    def from_cls(self, block: int, members: Sequence[int]) -> Tensor:
        """Attention that CLS pays to each token in an encoder block, mean over heads, [G, N] float32.

        Of each tile its own CLS. `Incompatible` where the tower has none.
        """
        raise Incompatible("the vision tower has no CLS token: use the attention that tokens receive")

    @abstractmethod
    def keys(self, block: int, members: Sequence[int]) -> Tensor:
        """Keys of an encoder block, mean over heads, [G, N, E]; `hidden_states[block]` must have been asked for.

        As the block's projection makes them: before rotary positions, where the tower has those.
        """

    def cls_values(self, members: Sequence[int]) -> Tensor:
        """The CLS rows of the layer that values come from, one a tile, [G, tiles, V].

        Tiles stand in the order of `layout`: part by part, and row by row in each. `Incompatible` where the tower has
        no CLS, or where values are made of several rows of it.
        """
        raise Incompatible("no CLS of the vision tower can be handed on: leave it out")


Early = Callable[[Vision], None]


class Family(ABC):
    """One loaded VLM as pruning sees it. Holds no state of its own beside the model."""

    vision_inputs: ClassVar[frozenset[str]]
    """Arguments of the model's `forward` that describe images."""
    position_inputs: ClassVar[frozenset[str]] = frozenset()
    """Those of them that `generate` needs for the positions of a prompt."""
    column_inputs: ClassVar[Mapping[str, int]] = {}
    """Arguments with an entry a column, [B, L], that are cut like the prompts, and what stands for padding."""
    nested: ClassVar[bool] = False
    """Its processor takes images prompt by prompt, as lists of lists."""
    facts: Facts

    def __init__(self, model: Any) -> None:
        self.model = model
        self.facts = self.facts_of(model.config)

    @property
    @abstractmethod
    def tower(self) -> Any:
        """The vision model."""

    @property
    @abstractmethod
    def projectors(self) -> list[Any]:
        """The modules that make tokens of the language model of the tower's; they may lie in the tower."""

    @classmethod
    @abstractmethod
    def facts_of(cls, config: Any) -> Facts:
        """Read a config; `BadInput` where this kind of the family is not supported."""

    def untrimmed(self) -> "Family":
        """The same with all that the tower sees as tokens, in one grid: what pruners are trained on. Here: itself."""
        return self

    def index(self, layer: int) -> int:
        """The index into `hidden_states`, 1 to depth, of a layer counted as in the paper."""
        return resolve_layer(layer, self.facts.depth, vlm="the vision tower of this VLM")

    # --- Images ------------------------------------------------------------------------------------------------------

    def prepare(self, processor: Any, image: Image.Image) -> Image.Image:
        """An image as the model's processor should get it to answer questions: as it is, unless a family says more."""
        return image

    def preprocess(self, processor: Any, images: list[Image.Image], *, mode: str) -> Images:
        """Images for the tower. `mode` says how they become the shape that it wants: `pad` or `squash`.

        Here: as the processor makes them, whatever the mode.
        """
        check_mode(mode)
        made = processor.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        found = self.images(made)
        assert found is not None  # noqa: S101 - the processor was given some
        return found

    @property
    def pixel_shape(self) -> tuple[int | None, ...] | None:
        """Of `pixel_values` as the model's processor makes them, with None where a size depends on the images.

        Here: not known, and `handle.embed` refuses none.
        """
        return None

    @abstractmethod
    def images(self, call: Mapping[str, Any]) -> Images | None:
        """The images among the arguments of `forward` or `generate`; None if there are none."""

    @abstractmethod
    def pixels_of(self, images: Images, number: int) -> Tensor:
        """What belongs to one image, whatever the others of its batch are."""

    @abstractmethod
    def counts(self, images: Images) -> list[int]:
        """N of each image, from shapes alone."""

    @abstractmethod
    def grids(self, images: Images) -> list[Grid]:
        """Rows and columns of tokens of each image, from shapes alone."""

    def maps(self, images: Images, number: int) -> list[Map]:
        """Where the tokens of an image lie over it, from shapes alone. Here: over all of it, stretched."""
        rows, columns = self.grids(images)[number]
        return [Map(torch.arange(rows * columns).view(rows, columns))]

    def spans(self, images: Images) -> list[int]:
        """Placeholders that each image has in an unpruned prompt. Here: one a token."""
        return self.counts(images)

    # --- Vision ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(
        self, images: Images, layers: Collection[int], *, values: bool = True, ready: Early | None = None
    ) -> Vision:
        """Run the tower once and keep `hidden_states` of these layers.

        Without `values` it stops after the deepest layer that is asked for. If that is not the last one, and there are
        no videos, `ready` is given what there is as soon as it is done, without values, before the tower goes on.
        """

    def project(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Values [k, V] of each image as the language model reads them, [k, D]. Here: as they are."""
        return list(values)

    def place(self, images: Images, number: int, indices_k: Tensor, features_kD: Tensor) -> Placed:
        """Where the tokens of an image that stay go in the prompt. Here: token n to placeholder n."""
        return Placed(features_kD, indices_k, indices_k, self.spans(images)[number])

    @property
    def takes_outputs(self) -> bool:
        """Whether transformers is of those that have `mm_encoder_outputs`: they differ in what getters return."""
        return "mm_encoder_outputs" in inspect.signature(type(self.model).forward).parameters

    def features(self, features_XD: Tensor, kind: Kind = "image") -> Any:
        """What the model's `get_image_features`, or `get_video_features`, would return of all tokens that stay.

        Those of all images, or of all frames, stand in a row.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=(features_XD,))

    # --- Prompts -----------------------------------------------------------------------------------------------------

    @property
    def placeholder(self) -> int:
        """The token id that stands for a vision token."""
        token: int = self.model.config.image_token_id
        return token

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        """The token ids that stand for vision tokens: of images, and where videos are supported of these."""
        found: dict[Kind, int] = {"image": self.placeholder}
        if "pixel_values_videos" in self.vision_inputs:
            found["video"] = self.model.config.video_token_id
        return found

    def stands_for(self, ids_BL: Tensor) -> Tensor:
        """True where a vision token goes, [B, L]."""
        return torch.isin(ids_BL, torch.tensor(list(self.placeholders.values()), device=ids_BL.device))

    @property
    def padding(self) -> int:
        """The token id that stands where there is nothing."""
        config = self.model.config
        found = getattr(config, "pad_token_id", None)
        found = getattr(config.get_text_config(), "pad_token_id", None) if found is None else found
        return 0 if found is None or found < 0 else int(found)

    def positions(self, call: Mapping[str, Any], mask_BL: Tensor, past: int) -> Tensor:
        """Positions of all columns of unpruned prompts, [P, B, q], as the model has them.

        Args:
            call: arguments of `forward`.
            mask_BL: of the cache's columns and of the new ones.
            past: columns in the cache.
        """
        given: Tensor | None = call.get("position_ids")
        if given is not None:
            return given.expand(len(mask_BL), -1)[None]
        if past:  # as the model counted when it filled the cache
            return torch.arange(past, mask_BL.shape[1], device=mask_BL.device).expand(len(mask_BL), -1)[None]
        return (mask_BL.long().cumsum(1) - 1).clamp(min=0)[None]

    def spread(self, call: Mapping[str, Any], positions_Bq: Tensor, mask_Bq: Tensor) -> Tensor:
        """Positions of new columns that may hold images, [P, B, q], as the model has them.

        Args:
            call: arguments of `forward`.
            positions_Bq: what they would be if there was text in all of them.
            mask_Bq: 1 for tokens, 0 for padding.
        """
        return positions_Bq[None]

    def position_ids(self, positions_PBS: Tensor) -> Tensor:
        """Positions in the shape that the model takes."""
        return positions_PBS[0]

    def find(self, ids_BL: Tensor, images: Images) -> list[tuple[int, int, int]]:
        """Row, first column and length of each image's placeholders; of a frame likewise.

        Raises:
            BadInput: placeholders and images do not fit.
        """
        spans = self.spans(images)
        found = list[tuple[int, int, int]]()
        for kind, placeholder in self.placeholders.items():
            mine = spans[: images.stills] if kind == "image" else spans[images.stills :]
            found += self._find(ids_BL, mine, placeholder, "images" if kind == "image" else "frames")
        return found

    def _find(self, ids_BL: Tensor, spans: list[int], placeholder: int, what: str) -> list[tuple[int, int, int]]:
        where = (ids_BL == placeholder).nonzero().tolist()
        if len(where) != sum(spans):
            raise BadInput(
                f"{len(spans)} {what} of {_listed(spans)} tokens need {sum(spans)} placeholders (token id "
                f"{placeholder}), but the prompts have {len(where)}: use the processor of this model"
            )
        found, start = list[tuple[int, int, int]](), 0
        for number, span in enumerate(spans):
            (row, first), (last_row, last) = where[start], where[start + span - 1]
            if row != last_row or last - first != span - 1:
                raise BadInput(
                    f"the {span} placeholders of {what[:-1]} {number} do not stand in a row: from row {row}, column "
                    f"{first} to row {last_row}, column {last}"
                )
            found.append((row, first, span))
            start += span
        return found


def _listed(numbers: list[int]) -> str:
    distinct = sorted(set(numbers))
    return str(distinct[0]) if len(distinct) == 1 else ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)


def take(tensor: Tensor, members: Sequence[int]) -> Tensor:
    """Rows of a tensor; the tensor itself if they are all of them."""
    if list(members) == list(range(len(tensor))):
        return tensor
    return tensor[list(members)]


def check_mode(mode: str) -> None:
    """`BadInput` for an unknown way to shape images."""
    if mode not in ("pad", "squash"):
        raise BadInput(f"preprocessing {mode!r}: pad or squash is needed")
