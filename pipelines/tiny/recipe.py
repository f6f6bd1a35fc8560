"""All that determines the weights of a tiny VLM beside its architecture."""

import math
from dataclasses import dataclass

STAGES = ("tower", "language", "projector", "vlm")


@dataclass(frozen=True)
class Schedule:
    """Steps, peak learning rate and warm-up of one stage; the rate falls along a cosine to a hundredth."""

    steps: int
    learning_rate: float
    warmup: int = 50
    weight_decay: float = 0.01

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Recipe:
    """Scenes, batches and schedules; `questions` are packed in one sequence."""

    scenes: int
    tower: Schedule
    language: Schedule
    projector: Schedule
    vlm: Schedule
    seed: int = 0
    validation_scenes: int = 1_000
    batch: int = 64
    questions: int = 8
