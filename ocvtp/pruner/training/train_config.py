"""How a pruner is trained. Two behaviours, as in `ocvtp.pruner.config`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from ocvtp.errors import BadInput
from ocvtp.pruner.config import (
    AUTO,
    BEHAVIOURS,
    Behaviour,
    check_choices,
    check_number,
    check_share,
    check_whole,
    from_dict,
    resolve,
)
from ocvtp.pruner.loss import LOSSES, WITHOUT_DECODER

CHOICES: Final[Mapping[str, tuple[Any, ...]]] = {
    "behaviour": BEHAVIOURS,
    "loss": LOSSES,
    "schedule": ("cosine", "cosine_epoch"),
    "precision": ("bf16", "fp32"),
    "validate_on": ("held_out", "last_batch"),
    "best_by": ("val_mse", "val_loss", "span"),
    "answers_gradient": ("sampled", "straight_through"),
    "vlm_dtype": ("float32", "bfloat16", "float16"),
}

LISTS: Final = ("slots", "eval_slots", "prompts")
"""Options that may be lists."""
QUESTIONS: Final = "questions"
"""Value of `prompts`: those that come with the images."""

BY_BEHAVIOUR: Final[Mapping[str, tuple[Any, Any]]] = {
    # option: (default, reference)
    "slots": ((16, 32, 48), (16, 32, 64, 128)),
    "ignore_empty": (True, False),  # one empty slot takes almost all weight from the others
    "steps": (400, None),
    "epochs": (None, 30),
    "batch_size": (32, 12),
    "drop_last": (True, False),
    "decay_all": (False, True),  # decay draws norms, biases, positions and the queries' Gaussian to zero
    "schedule": ("cosine", "cosine_epoch"),  # the authors' first epoch runs at a thousandth of the rate
    "precision": ("bf16", "fp32"),
    "eval_every": (50, None),  # None: once an epoch
    "eval_slots": (None, (64,)),  # None: all of `slots`
    "validate_on": ("held_out", "last_batch"),  # the authors' loop never reads its validation batches
    "patience": (None, 4),
    "best_by": ("val_mse", "val_loss"),  # the weights of AW-MSE move with the attention: its values do not compare
}
"""Where the behaviours differ in training."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that, with the pruner's config and the tokens, determines the trained weights.

    Attributes:
        behaviour: `default` or `reference` (the authors' code), for all that is "auto".
        loss: `aw_mse` or `mse`, of what a decoder rebuilds from slots; or `span`, of what least squares rebuild from
            the picked tokens, without a decoder; or `answers`, of what a frozen VLM answers with the picked tokens,
            against what it answers with all; or `masks`, of the segmented objects of an image that no slot picks.
        loss_power, loss_cap, loss_normalise, ignore_empty: of `aw_mse`.
        answers_gradient: of `answers`: `sampled` draws kept sets around the pruner's and weighs the logarithm of their
            probability by how much worse each answers than the others (a score function, unbiased); `straight_through`
            takes the gradient at the picks, as that of the slots' soft weights over tokens in embeddings.
        answers_samples: kept sets of an image and step of `sampled`, two at least.
        answers_temperature: of `sampled`: how widely they are drawn.
        span_temperature: of `span`, `masks` and `straight_through`: of a slot's attention as weights of tokens in the
            one that it picks.
        prototype_weight: of `span` (`ocvtp.pruner.span.span_loss`).
        span_weight: of `answers`: of the loss `span`, which is added.
        prompts: of `answers`: `questions` (those that come with the training images: of synthetic scenes), a list of
            texts that are put to every image, or a file of JSON lines (`ocvtp.answers.read_prompts`).
        prompts_an_image: of `answers` with `questions`: how many are made about a scene.
        prompts_a_step: of `answers`: how many of an image's prompts a step puts to it.
        vlm_dtype: of `answers`: the type of the VLM that teaches.
        slots: slot counts, one of which is drawn for each step.
        seed: of the initial weights, the order of images, and all that is drawn.
        steps: how many; None for `epochs` passes over the training images.
        epochs: passes, where steps is None; also the length of the schedule `cosine_epoch`.
        batch_size: images a step.
        drop_last: leave out what does not fill a batch at the end of an epoch.
        learning_rate: the peak.
        weight_decay: of AdamW.
        decay_all: it draws on all weights, not on matrices alone.
        schedule: `cosine` warms up over `warmup_steps`, then falls step by step to `final_rate` of the peak;
            `cosine_epoch` changes once an epoch, as the authors' does.
        warmup_steps: of `cosine`.
        warmup_epochs: of `cosine_epoch`.
        final_rate: of `cosine`, as a share of the peak.
        grad_clip: largest L2 norm of the gradient.
        precision: `bf16` computes matrix products in bfloat16 (weights and sums stay in single precision).
        compile: use `torch.compile`: pays on GPUs and in long trainings.
        ema: decay of the running mean of the weights that is validated and kept; None for none.
        validation_share: of the images, held out.
        eval_every: steps between validations; None for once an epoch.
        eval_slots: slot counts to validate with; None for all of `slots`.
        validate_on: `held_out` images, or the `last_batch` of training.
        best_by: which validation is the best: that of the least `val_mse` (plain squared error of the decoder),
            `val_loss`, or `span` (`span_error`, what kept tokens leave unexplained). With loss `span` always `span`
            unless given, and with `answers` and `masks` `val_loss`.
        patience: validations in a row without a better one after which training stops; None for never.
        max_bad_steps: steps with a loss or gradient that is not finite that are left out before training stops.
        checkpoint_every: steps between checkpoints.
        log_every: steps between rows of the curves.
    """

    behaviour: Behaviour = "default"
    loss: str = "aw_mse"
    loss_power: float = 0.5
    loss_cap: float = 10.0
    loss_normalise: bool = True
    span_temperature: float = 1.0
    prototype_weight: float = 0.0
    answers_gradient: str = "sampled"
    answers_samples: int = 4
    answers_temperature: float = 0.3
    span_weight: float = 0.0
    prompts: str | tuple[str, ...] = "questions"
    prompts_an_image: int = 4
    prompts_a_step: int = 2
    vlm_dtype: str = "float32"
    ignore_empty: bool = AUTO
    slots: tuple[int, ...] = AUTO
    seed: int = 0
    steps: int | None = AUTO
    epochs: int | None = AUTO
    batch_size: int = AUTO
    drop_last: bool = AUTO
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    decay_all: bool = AUTO
    schedule: str = AUTO
    warmup_steps: int = 50
    warmup_epochs: int = 4
    final_rate: float = 0.01
    grad_clip: float = 1.0
    precision: str = AUTO
    compile: bool = False
    ema: float | None = None
    validation_share: float = 0.05
    eval_every: int | None = AUTO
    eval_slots: tuple[int, ...] | None = AUTO
    validate_on: str = AUTO
    patience: int | None = AUTO
    best_by: str = AUTO
    max_bad_steps: int = 3
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        check_choices(self, CHOICES, skip_auto=True)
        if self.loss in WITHOUT_DECODER and self.best_by == AUTO:
            object.__setattr__(self, "best_by", "span" if self.loss == "span" else "val_loss")
        resolve(self, BY_BEHAVIOUR)
        for name in LISTS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check()

    @property
    def validation_slots(self) -> tuple[int, ...]:
        """Slot counts to validate with."""
        return self.slots if self.eval_slots is None else self.eval_slots

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        lists = {name: list(getattr(self, name)) for name in LISTS if isinstance(getattr(self, name), tuple)}
        return {**asdict(self), **lists}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`; `BadInput` names keys that are no options."""
        return from_dict(cls, data, "the config of a training")

    def _check(self) -> None:
        check_choices(self, CHOICES)
        for name in ("slots", "eval_slots"):
            counts = getattr(self, name)
            if counts is None:
                continue
            if not isinstance(counts, tuple) or not counts:
                raise BadInput(f"{name} is {counts!r}: a list of slot counts is needed, such as [16, 32, 48]")
            for count in counts:
                check_whole(f"a slot count of {name}", count, 1)
        for name in ("batch_size", "checkpoint_every", "log_every", "prompts_an_image", "prompts_a_step"):
            check_whole(name, getattr(self, name), 1)
        check_whole("answers_samples", self.answers_samples, 2)
        for name in ("seed", "warmup_steps", "warmup_epochs", "max_bad_steps"):
            check_whole(name, getattr(self, name), 0)
        for name in ("steps", "epochs", "eval_every", "patience"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if self.steps is None and self.epochs is None:
            raise BadInput("neither steps nor epochs is given: how long to train?")
        for name in ("learning_rate", "grad_clip", "loss_cap", "span_temperature", "answers_temperature"):
            check_number(name, getattr(self, name), 0, above=True)
        for name in ("weight_decay", "loss_power", "prototype_weight", "span_weight"):
            check_number(name, getattr(self, name), 0)
        for name in ("final_rate", "validation_share", *(() if self.ema is None else ("ema",))):
            check_share(name, getattr(self, name))
        for name in ("ignore_empty", "drop_last", "decay_all", "compile", "loss_normalise"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} is {getattr(self, name)!r}: true or false is needed")
        if self.loss in WITHOUT_DECODER and self.best_by == "val_mse":
            raise BadInput(f"best_by is val_mse, but loss is {self.loss}, which has no decoder: span or val_loss is "
                           "needed")  # fmt: skip
        self._check_prompts()
        if self.validation_share == 1:
            raise BadInput("validation_share is 1: nothing is left to train on")
        if self.validate_on == "held_out" and self.validation_share == 0:
            raise BadInput("validation_share is 0, but validate_on is held_out: hold some images out")

    def _check_prompts(self) -> None:
        given: Any = self.prompts
        if isinstance(given, str) and (given == QUESTIONS or given.endswith(".jsonl")):
            return
        if not isinstance(given, tuple) or not given or not all(isinstance(t, str) and t.strip() for t in given):
            raise BadInput(f"prompts is {given!r}: {QUESTIONS}, a list of texts such as ['Describe the image.'], or a "
                           "file of JSON lines (.jsonl) is needed")  # fmt: skip
