"""The stages of tiny-llava, as real VLMs are made: each learns one thing, and later ones stand on earlier ones."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.tiny import language, tower
from pipelines.tiny.loop import Schedule, fit
from pipelines.tiny.model import GRID, make_model, make_tokenizer
from pipelines.tiny.pool import make_pool

STAGES = ("tower", "language", "projector", "vlm")
PATCHES = GRID * GRID
_log = logging.getLogger(__name__)
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """All that determines the weights."""

    seed: int = 0
    scenes: int = 24_000
    validation_scenes: int = 1_000
    batch: int = 64
    questions: int = 8
    tower: Schedule = field(default_factory=lambda: Schedule(1_400, 1.5e-3, warmup=100))
    language: Schedule = field(default_factory=lambda: Schedule(1_600, 2e-3, warmup=100))
    projector: Schedule = field(default_factory=lambda: Schedule(200, 2e-3, warmup=20))
    vlm: Schedule = field(default_factory=lambda: Schedule(1_000, 1e-3, warmup=50))


class Maker:
    """The model in the making, with what all stages need."""

    def __init__(self, recipe: Recipe, work: Path, device: str) -> None:
        self.recipe, self.work, self.device = recipe, work, device
        work.mkdir(parents=True, exist_ok=True)
        self.pool = make_pool(recipe.seed, "vlm", recipe.scenes)
        self.unseen = make_pool(recipe.seed, "vlm-validation", recipe.validation_scenes)
        torch.manual_seed(recipe.seed)
        self.model = make_model().to(device)
        vision = self.model.config.vision_config
        self.heads = tower.Heads(vision.hidden_size, self.pool.tags_ST.shape[1]).to(device)
        self.asker = language.Asker(make_tokenizer(), recipe.questions)

    def tower(self) -> Curve:
        """(a) The tower alone, on labels for patches and tags for CLS."""
        vision = self.model.model.vision_tower
        losses = tower.tower_losses(
            vision, self.heads, self.pool, batch=self.recipe.batch, seed=self.recipe.seed, device=self.device
        )
        return fit(
            "tower",
            nn.ModuleDict({"tower": vision, "heads": self.heads}),
            losses,
            self.recipe.tower,
            self.work,
            device=self.device,
            evaluate=lambda: tower.tower_accuracy(vision, self.heads, self.unseen, self.device),
        )

    def language(self) -> Curve:
        """(b) The language model alone, on scenes told in words; first few words, then many."""
        words, embed = language.TextScenes(self.asker.tokenizer), self.model.get_input_embeddings()
        third = self.recipe.language.steps // 3

        def kept_at(step: int, rng: np.random.Generator) -> int:
            most, all_share = ((24, 0.0), (64, 0.0), (PATCHES, 0.1))[min(2, step // third)]
            return language.draw_kept(PATCHES, rng, most=most, all_share=all_share)

        return self._questions(
            "language",
            nn.ModuleDict({"lm": self.model.model.language_model, "head": self.model.lm_head}),
            lambda pool: lambda indices, chosen_BV: words(embed, pool, indices, chosen_BV),
            kept_at,
            self.recipe.language,
        )

    def projector(self) -> Curve:
        """(c) The projector alone: it learns to say in the language model's words what the tower sees."""
        self.model.model.language_model.requires_grad_(False)
        self.model.lm_head.requires_grad_(False)
        parts = nn.ModuleDict({"projector": self.model.model.multi_modal_projector})
        return self._questions("projector", parts, self._images(), self._any_share, self.recipe.projector)

    def vlm(self) -> Curve:
        """(d) Projector and language model together; the tower stays as it is."""
        self.model.model.language_model.requires_grad_(True)
        self.model.lm_head.requires_grad_(True)
        parts = nn.ModuleDict(
            {
                "projector": self.model.model.multi_modal_projector,
                "lm": self.model.model.language_model,
                "head": self.model.lm_head,
            }
        )
        return self._questions("vlm", parts, self._images(), self._any_share, self.recipe.vlm)

    def _any_share(self, _: int, rng: np.random.Generator) -> int:
        return language.draw_kept(PATCHES, rng, most=PATCHES, all_share=0.3)

    def _images(self) -> Callable[[object], Callable[[NDArray[np.int64], Tensor], Tensor]]:
        """Projected tokens of the frozen tower; its features are computed once for all scenes."""
        if not hasattr(self, "_features"):
            vision = self.model.model.vision_tower
            self._features = {id(p): tower.all_features(vision, p, self.device) for p in (self.pool, self.unseen)}

        def encoder(pool: object) -> Callable[[NDArray[np.int64], Tensor], Tensor]:
            features_SPC = self._features[id(pool)]

            def encode(indices: NDArray[np.int64], chosen_BV: Tensor) -> Tensor:
                tokens_BPC = features_SPC[indices].float()
                chosen_BVC = tokens_BPC.gather(1, chosen_BV[..., None].expand(-1, -1, tokens_BPC.shape[2]))
                projected: Tensor = self.model.model.multi_modal_projector(chosen_BVC.to(self.device))
                return projected

            return encode

        return encoder

    def _questions(
        self,
        name: str,
        parts: nn.ModuleDict,
        encoder: Callable[[object], Callable[[NDArray[np.int64], Tensor], Tensor]],
        kept_at: Callable[[int, np.random.Generator], int],
        schedule: Schedule,
    ) -> Curve:
        losses = language.step_losses(
            self.model,
            self.asker,
            self.pool,
            encoder(self.pool),
            kept_at,
            batch=self.recipe.batch,
            seed=(self.recipe.seed, 2 + STAGES.index(name)),
        )

        def evaluate() -> Mapping[str, float]:
            found: dict[str, float] = {}
            for kept in (PATCHES, 48, 16):
                encode = encoder(self.unseen)
                found |= language.answer_accuracy(self.model, self.asker, self.unseen, encode, kept, self.device)
            return found

        return fit(name, parts, losses, schedule, self.work, device=self.device, evaluate=evaluate)
