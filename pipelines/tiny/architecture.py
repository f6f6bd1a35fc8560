"""What the recipe has to know of a tiny VLM's architecture.

Letters: B images, H W pixels, R rows and C columns of an image's tokens, P patches, T tokens of an image, V tokens that
are kept, F features of a token, D width of the language model, N positions of a sequence.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ocvtp.data.scenes import PLAIN, Style
from pipelines.tiny.recipe import Recipe


class Architecture(ABC):
    """A class of transformers at a tiny size.

    Attributes:
        name: in the catalogue.
        about: what it is, for its card.
        start: what its weights are before the first stage, for its card.
        feature: what of the tower goes on, for its card.
        limits: what else it does not know, for its card.
        patch: width of the tower's patches in pixels.
        merge: patches on a side of a token.
        style: of the scenes that it learns from.
        recipe: how it is trained.
        norm_weight: of the penalty that keeps the tower's tokens near unit size.
        lead, tail: text of a prompt before and behind the image.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    start: ClassVar[str]
    feature: ClassVar[str]
    limits: ClassVar[str] = ""
    patch: ClassVar[int] = 8
    merge: ClassVar[int] = 1
    style: ClassVar[Style] = PLAIN
    recipe: ClassVar[Recipe]
    norm_weight: ClassVar[float] = 0.0
    lead: ClassVar[str] = "USER:"
    tail: ClassVar[str] = ""

    # --- What is saved -----------------------------------------------------------------------------------------------

    @abstractmethod
    def make_model(self) -> Any:
        """The model as training begins (float32); seed torch before."""

    @abstractmethod
    def make_processor(self) -> Any:
        """Its processor."""

    # --- Parts -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def tower(self, model: Any) -> nn.Module:
        """What is trained in the first stage, and frozen from then on."""

    @abstractmethod
    def projector(self, model: Any) -> nn.Module:
        """What makes embeddings of the tower's features."""

    def language(self, model: Any) -> nn.ModuleDict:
        """The language model with its head."""
        return nn.ModuleDict({"lm": model.model.language_model, "head": model.lm_head})

    # --- What goes through them --------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, model: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What the tower makes of each patch, row by row, [B, P, C], and of the whole picture, [B, C] each."""

    @abstractmethod
    def features(self, model: Any, pixels_B3HW: Tensor) -> Tensor:
        """All that the projector reads of each token, [B, T, F]."""

    @abstractmethod
    def project(self, model: Any, features_BVF: Tensor) -> Tensor:
        """Embeddings [B, V, D]; with planes that are added in later layers, if there are any, behind them."""

    def positions(self, chosen_BV: Tensor, _grid: tuple[int, int], lead: int, behind_M: Tensor) -> Tensor:
        """Positions of `lead` tokens, of those of the image, and of others that stand `behind_M` tokens after it."""
        first = lead + chosen_BV.shape[1]
        return torch.cat([torch.arange(first), first + behind_M]).expand(len(chosen_BV), -1)

    def decode(
        self, model: Any, inputs_BND: Tensor, mask_NN: Tensor, positions: Tensor, first: int, planes: list[Tensor]
    ) -> Tensor:
        """Last hidden states [B, N, D] of the language model.

        Args:
            model: of this architecture.
            inputs_BND: embeddings.
            mask_NN: who sees whom, of bool.
            positions: as `positions` makes them.
            first: position of the image's first token.
            planes: what `project` gave behind the embeddings, [B, V, D] each.
        """
        assert not planes, first  # noqa: S101 - architectures that make planes decode them
        hidden_BND: Tensor = model.model.language_model(
            inputs_embeds=inputs_BND,
            attention_mask=mask_NN.expand(len(inputs_BND), 1, -1, -1),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return hidden_BND


def shrink_outputs(layers: Any) -> None:
    """Make what a language model's layers add smaller by the root of their number.

    Together with a deviation of width ** -0.5. The usual 0.02 suits widths of thousands: at width 128 it lets the first
    layers drown the words and leaves attention flat, and lookups take many times longer to appear.
    """
    with torch.no_grad():
        for layer in layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.mul_((2 * len(layers)) ** -0.5)
