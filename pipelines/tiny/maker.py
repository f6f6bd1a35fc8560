"""The stages of a tiny VLM, as real VLMs are made: each learns one thing, and later ones stand on earlier ones."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.tiny import language, tower
from pipelines.tiny.architecture import Architecture
from pipelines.tiny.language import Encode
from pipelines.tiny.loop import fit
from pipelines.tiny.pool import Pools, label, make_scenes_by_size
from pipelines.tiny.recipe import STAGES, Recipe, Schedule

SHARES = (1, 1 / 3, 1 / 9)
"""Of tokens kept, for which accuracy is noted on the way."""
_FIRST_FEW = ((1 / 6, 0.0), (4 / 9, 0.0), (1.0, 0.1))
"""Most tokens that are kept, and how often all, in each third of stage `language`."""
Curve = list[dict[str, float]]


class Maker:
    """The model in the making, with what all stages need.

    Attributes:
        patches, unseen_patches: scenes with a label for each patch of the tower.
        pools, unseen: the same with a label for each token of the language model.
    """

    def __init__(self, architecture: Architecture, recipe: Recipe, work: Path, device: str) -> None:
        self.architecture, self.recipe, self.work, self.device = architecture, recipe, work, device
        work.mkdir(parents=True, exist_ok=True)
        style, patch = architecture.style, architecture.patch
        scenes = make_scenes_by_size(recipe.seed, "vlm", recipe.scenes, style)
        unseen = make_scenes_by_size(recipe.seed, "vlm-validation", recipe.validation_scenes, style)
        self.patches, self.unseen_patches = (tuple(label(s, patch) for s in each) for each in (scenes, unseen))
        self.pools, self.unseen = self.patches, self.unseen_patches
        if architecture.merge > 1:
            width = patch * architecture.merge
            self.pools, self.unseen = (tuple(label(s, width) for s in each) for each in (scenes, unseen))
        torch.manual_seed(recipe.seed)
        self.model = architecture.make_model().to(device)
        with torch.no_grad():
            patches_BPC, pooled = architecture.read(self.model, self.patches[0].pixels([0]).to(device))
        tags = self.patches[0].tags_ST.shape[1]
        self.heads = tower.Heads(patches_BPC.shape[2], tags, pooled).to(device)
        self.asker = language.Asker(architecture, recipe.questions)

    def tower(self) -> Curve:
        """(a) The tower alone, on labels for patches and tags for the whole picture."""
        common = (self.architecture, self.model, self.heads)
        losses = tower.tower_losses(
            *common, self.patches, batch=self.recipe.batch, seed=self.recipe.seed, device=self.device
        )
        return fit(
            "tower",
            nn.ModuleDict({"tower": self.architecture.tower(self.model), "heads": self.heads}),
            losses,
            self.recipe.tower,
            self.work,
            device=self.device,
            evaluate=lambda: tower.tower_accuracy(*common, self.unseen_patches, self.device),
        )

    def language(self) -> Curve:
        """(b) The language model alone, on scenes told in words; first few words, then many."""
        words, embed = language.TextScenes(self.asker.tokenizer), self.model.get_input_embeddings()
        third = self.recipe.language.steps // 3

        def kept_at(step: int, tokens: int, rng: np.random.Generator) -> int:
            most, all_share = _FIRST_FEW[min(2, step // third)]
            return language.draw_kept(tokens, rng, most=most, all_share=all_share)

        return self._questions(
            "language",
            self.architecture.language(self.model),
            lambda pools: lambda number, indices, chosen_BV: words(embed, pools[number], indices, chosen_BV),
            kept_at,
            self.recipe.language,
        )

    def projector(self) -> Curve:
        """(c) The projector alone: it learns to say in the language model's words what the tower sees."""
        self.architecture.language(self.model).requires_grad_(False)
        parts = nn.ModuleDict({"projector": self.architecture.projector(self.model)})
        return self._questions("projector", parts, self._images(), _any_share, self.recipe.projector)

    def vlm(self) -> Curve:
        """(d) Projector and language model together; the tower stays as it is."""
        written = self.architecture.language(self.model).requires_grad_(True)
        parts = nn.ModuleDict({"projector": self.architecture.projector(self.model), **dict(written.items())})
        return self._questions("vlm", parts, self._images(), _any_share, self.recipe.vlm)

    def _images(self) -> Callable[[Pools], Encode]:
        """Projected tokens of the frozen tower; its features are computed once for all scenes."""
        if not hasattr(self, "_features"):
            self._features = {
                id(pools): tower.all_features(self.architecture, self.model, pools, self.device)
                for pools in (self.pools, self.unseen)
            }
        return lambda pools: encoder(self.architecture, self.model, self._features[id(pools)], self.device)

    def _questions(
        self,
        name: str,
        parts: nn.ModuleDict,
        encode: Callable[[Pools], Encode],
        kept_at: Callable[[int, int, np.random.Generator], int],
        schedule: Schedule,
    ) -> Curve:
        common = (self.architecture, self.model, self.asker)
        losses = language.step_losses(
            *common,
            self.pools,
            encode(self.pools),
            kept_at,
            batch=self.recipe.batch,
            seed=(self.recipe.seed, 2 + STAGES.index(name)),
        )

        def evaluate() -> Mapping[str, float]:
            found: dict[str, float] = {}
            for share in SHARES:
                found |= language.answer_accuracy(*common, self.unseen, encode(self.unseen), share, self.device)
            return found

        return fit(name, parts, losses, schedule, self.work, device=self.device, evaluate=evaluate)


def encoder(architecture: Architecture, model: object, features: list[Tensor], device: str) -> Encode:
    """Projects those of an image's features that are kept, given `tower.all_features`."""

    def encode(number: int, indices: NDArray[np.int64], chosen_BV: Tensor) -> Tensor:
        tokens_BTF = features[number][indices]
        chosen_BVF = tokens_BTF.gather(1, chosen_BV[..., None].expand(-1, -1, tokens_BTF.shape[2]))
        return architecture.project(model, chosen_BVF.to(device).float())

    return encode


def _any_share(_: int, tokens: int, rng: np.random.Generator) -> int:
    return language.draw_kept(tokens, rng, most=1.0, all_share=0.3)
