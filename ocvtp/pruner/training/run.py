"""Trains a pruner. A run that was cut off and goes on ends in the same weights, bit for bit.

Letters: B images, N tokens, K slots.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ocvtp.errors import BadInput, Incompatible, OcvtpError
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.loss import WITHOUT_DECODER
from ocvtp.pruner.model import OCPruner
from ocvtp.pruner.provenance import TrainedFor
from ocvtp.pruner.seeding import derive, generator
from ocvtp.pruner.training import answers, coverage_loss, records, state
from ocvtp.pruner.training.answers import Teacher
from ocvtp.pruner.training.coverage_loss import Segmentations
from ocvtp.pruner.training.data import Batch, Order, TokenSource, WithMore, with_room
from ocvtp.pruner.training.optimiser import learning_rate, make_optimizer
from ocvtp.pruner.training.ranks import Ranks, StepLoss
from ocvtp.pruner.training.train_config import TrainConfig
from ocvtp.pruner.training.validate import HANDED_ON, REBUILDING, Row, evaluate, validate

__all__ = ["NotFinite", "Progress", "TokenSource", "TrainConfig", "compile_parts", "train"]

Progress = Callable[[int, int, str], None]
"""Called with the steps done, all steps, and a few words."""
_log = logging.getLogger(__name__)
_VERSION: Final = 2
"""Of the arithmetic: part of a checkpoint's spec."""


class NotFinite(OcvtpError):
    """Too many steps had a loss or a gradient that is not finite."""


def train(
    pruner_config: PrunerConfig,
    train_config: TrainConfig,
    dataset: TokenSource,
    folder: Path,
    *,
    resume: Path,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    trained_for: TrainedFor | None = None,
    teacher: Teacher | None = None,
    handed_on: TokenSource | None = None,
    objects: Segmentations | None = None,
) -> dict[str, Any]:
    """Train, and write the result into `folder`.

    It holds then `config.json` and `model.safetensors` (the weights of the best validation), `last.safetensors`,
    `curves.csv`, `metrics.json` and, if steps were left out, `bad_batches.jsonl`.

    Under `torchrun` (see `python -m ocvtp.pruner --help`) several processes share each batch, and the first of them
    validates and writes.

    Args:
        pruner_config: of the pruner; it needs a decoder, but with the losses `span`, `answers` and `masks`, which make
            it one without.
        train_config: how.
        dataset: the tokens.
        folder: where the result goes.
        resume: where checkpoints are written, and from where the training goes on if there are some.
        progress: told after each step.
        device: where to compute.
        trained_for: what the tokens are of; loss, slots and seed are filled in.
        teacher: the VLM that teaches, for loss `answers`; it is asked about images by `dataset.image_ids`.
        handed_on: the same images in the layer that goes to the LLM: for validation (how well what is kept of that
            layer stands for all of it), and for `residual_of="handed_on"`.
        objects: of the images, for loss `masks`, by `dataset.image_ids`.

    Returns:
        What is in `metrics.json`.

    Raises:
        BadInput: a config without a decoder; more slots than tokens; loss `answers` without a teacher, or one without
            prompts for the images; loss `masks` without `objects`, or with images that it does not know; either of
            them with another loss.
        Incompatible: tokens of another width than the pruner's; `handed_on` of other images; checkpoints of another
            training; a teacher of another VLM than the tokens.
        Corrupt: no checkpoint in `resume` is whole.
        NotFinite: more than `max_bad_steps` steps had a loss or gradient that is not finite. The checkpoint before them
            stays, `bad_batches.jsonl` names the images.
    """
    run = _Run(
        pruner_config, train_config, dataset, torch.device(device), trained_for or TrainedFor(), teacher, handed_on,
        objects,
    )  # fmt: skip
    run.resume(resume)
    if not run.state.stopped:
        run.steps(resume, folder, progress)
    if run.ranks.first:
        records.publish(folder, run.best(), run.kept.state_dict(), run.state, run.metrics())
    run.ranks.agreed("written")
    metrics: dict[str, Any] = json.loads((folder / records.METRICS).read_bytes())
    return metrics


def compile_parts(pruner: OCPruner) -> None:
    """`torch.compile` what a step spends its time in, in place: projection, slot attention and decoder."""
    parts: list[nn.Module] = [pruner.project, pruner.slot_attention]
    if pruner.decoder is not None:
        parts.append(getattr(pruner.decoder, "transformer", pruner.decoder))
    for module in parts:
        module.compile()


class _Run:
    """One training."""

    def __init__(
        self,
        pruner_config: PrunerConfig,
        config: TrainConfig,
        dataset: TokenSource,
        device: torch.device,
        trained_for: TrainedFor,
        teacher: Teacher | None,
        handed_on: TokenSource | None,
        objects: Segmentations | None,
    ) -> None:
        if config.loss in WITHOUT_DECODER:
            pruner_config = replace(pruner_config, decoder=None)
        elif pruner_config.decoder is None:
            raise BadInput(
                "a pruner without decoder is trained with loss=span, answers or masks only: or decoder=random_ar, mlp "
                "or ar"
            )
        self.config, self.device = config, device
        self.most = max(*config.slots, *config.validation_slots)
        self.dataset: TokenSource = with_room(dataset, self.most)
        handed_on = None if handed_on is None else with_room(handed_on, self.most)
        self.ranks = Ranks.current()
        images, self.held_out = self.dataset.split(config.validation_share, config.seed)
        self._check_tokens(pruner_config, images, handed_on)
        self.teacher = self._taught_by(teacher, pruner_config, trained_for)
        self.objects = self._segmented(objects)
        self.judged = WithMore(self.dataset, self.objects, handed_on)
        """What validation sees: the layer that goes to the LLM in any case, if it is there."""
        seen = handed_on if pruner_config.residual_of == "handed_on" else None
        self.dataset = WithMore(self.dataset, self.objects, seen)
        self.ranks.check(config, len(images))
        self.order = Order(images, config.batch_size, drop_last=config.drop_last, seed=config.seed)
        self.total = config.steps or (config.epochs or 0) * self.order.steps_per_epoch
        trained_for = replace(trained_for, loss=config.loss, slots=config.slots, seed=config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("ocvtp init", config.seed))
            self.pruner = OCPruner(pruner_config, trained_for).to(device)
        self.optimizer = make_optimizer(self.pruner, config)
        average = copy.deepcopy(self.pruner) if config.ema else None
        self.tensors = state.Tensors(self.pruner, self.optimizer, average, {})
        self.state = state.State(self._spec(images))
        self.row = Row()
        if config.compile:
            compile_parts(self.pruner)
        self.loss = self.ranks.wrapped(StepLoss(self.pruner, config, self.teacher))

    @property
    def kept(self) -> OCPruner:
        """The weights that are validated and published: the running mean, if there is one."""
        return self.pruner if self.tensors.average is None else self.tensors.average  # type: ignore[return-value]

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, if there is one."""
        self.state = state.load(folder, self.state.spec, self.tensors) or self.state

    def steps(self, resume: Path, folder: Path, progress: Progress | None) -> None:
        """All steps that are left."""
        self.pruner.train()
        if self.state.step == 0 and self.config.validate_on == "held_out":
            self._validate(None)
            self._log(learning_rate(self.config, 0, self.total, self.order.steps_per_epoch))
        for batch in self.order.batches(self.dataset, self.state.step, self.total, self.device, self.ranks.part):
            rate = learning_rate(self.config, self.state.step, self.total, self.order.steps_per_epoch)
            self._step(batch, rate, folder)
            self.state.step += 1
            done = self.state.step == self.total
            if done or self.state.step % self._eval_every == 0:
                self._validate(batch)
            if done or self.row or self.state.step % self.config.log_every == 0:
                self._log(rate)
            if done or self.state.stopped or self.state.step % self.config.checkpoint_every == 0:
                self.state.stopped = self.state.stopped or ("finished" if done else "")
                if self.ranks.first:
                    state.save(resume, self.state, self.tensors)
            if progress is not None:
                self._tell(progress, resume)
            if self.state.stopped:
                return

    def _tell(self, progress: Progress, resume: Path) -> None:
        """Say how far it is. Who stops the training there, as Ctrl-C does, finds this very step in the checkpoint."""
        last = self.state.last_loss
        try:
            progress(self.state.step, self.total, "" if last is None else f"loss {last:.4f}")
        except KeyboardInterrupt:
            if self.ranks.first:
                state.save(resume, self.state, self.tensors)
            raise

    def best(self) -> OCPruner:
        """The weights of the best validation."""
        best = OCPruner(self.pruner.config, self.pruner.trained_for)
        best.load_state_dict(self.tensors.best)
        return best.eval()

    def metrics(self) -> dict[str, Any]:
        """What is worth comparing between trainings."""
        last = {key: value for row in self.state.rows for key, value in row.items()}
        best = next((row for row in self.state.rows if row["step"] == self.state.best_step), {})
        return {
            "val_loss": best.get("val_loss"),
            "val_mse": best.get("val_mse"),
            "best_step": self.state.best_step,
            "steps": self.state.step,
            "stopped": self.state.stopped,
            "last_val_loss": last.get("val_loss"),
            "train_loss": self.state.last_loss,
            **{key: best.get(key) for key in REBUILDING},
            **({key: best.get(key) for key in HANDED_ON} if self.judged.handed_on else {}),
            **({"kl": best.get("kl")} if self.teacher else {}),
            **({"cover": best.get("cover")} if self.objects else {}),
            "bad_steps": self.state.bad_steps,
            "images": len(self.order.images),
            "validation_images": len(self.held_out),
            "parameters": sum(p.numel() for p in self.pruner.parameters()),
            "fingerprint": self.best().fingerprint,
        }

    def _step(self, batch: Batch, rate: float, folder: Path) -> None:
        """Forward, backward and, if all is finite, the update."""
        config = self.config
        draws = generator("ocvtp step", config.seed, self.state.step)
        slots = config.slots[int(torch.randint(len(config.slots), (), generator=draws))]
        size = len(self.order.indices(self.state.step))
        noise_bKD, plan = self.ranks.draws(self.pruner, batch, size, slots, draws)
        # A process with fewer images than others counts for less.
        weight = len(batch.indices) * self.ranks.world / size
        parts = () if self.ranks.first else (self.ranks.rank,)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive("ocvtp dropout", config.seed, self.state.step, *parts))
            draw = derive("ocvtp prompts", config.seed, self.state.step)
            loss = self.loss(batch, slots, noise_bKD, plan, draw) * weight
            torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.pruner.parameters(), config.grad_clip)
        value, length = self.ranks.mean(torch.stack((loss.detach(), norm.detach()))).tolist()  # one wait for the device
        if math.isfinite(value) and math.isfinite(length):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self._average()
            self.state.loss_sum += value
            self.state.loss_count += 1
            self.grad_norm = length
        else:
            self._bad(value, length, folder)
        self.optimizer.zero_grad(set_to_none=True)

    def _bad(self, loss: float, norm: float, folder: Path) -> None:
        """A step that is left out."""
        names, indices = getattr(self.dataset, "image_ids", None), self.order.indices(self.state.step)
        images = indices if names is None else [names[index] for index in indices]
        self.state.bad_steps += 1
        self.state.bad.append({"step": self.state.step, "loss": str(loss), "grad_norm": str(norm), "images": images})
        _log.warning("step %d left out: loss %s, gradient norm %s", self.state.step, loss, norm)
        if self.state.bad_steps > self.config.max_bad_steps:
            if self.ranks.first:
                records.write_bad(folder, self.state)
            raise NotFinite(
                f"{self.state.bad_steps} steps had a loss or gradient that is not finite, {self.config.max_bad_steps} "
                f"are tolerated; the last at step {self.state.step}: images in {folder / records.BAD}"
            )

    def _validate(self, batch: Batch | None) -> None:
        """Measure, remember the best, and stop if it does not get better: the first process does, for all."""
        if self.ranks.first:
            self._judge(batch)
        self.state.stopped = self.ranks.agreed(self.state.stopped)

    def _judge(self, batch: Batch | None) -> None:
        if self.config.validate_on == "held_out" or batch is None:
            row = validate(self.kept, self.config, self.judged, self.held_out, self.device, self.teacher)
        else:
            # As the authors' code: as often as there are batches of held-out images, each time with fresh noise.
            times = max(1, -(-len(self.held_out) // self.config.batch_size))
            slots = self.config.validation_slots
            row = evaluate(self.kept, self.config, [batch] * times, slots, self.teacher, draws=[self.state.step])
        self.row |= row
        current, config = self.state, self.config
        span = "handed_on_span_error" if self.pruner.config.residual_of == "handed_on" else "span_error"
        value = row[span if config.best_by == "span" else config.best_by]
        # What is not finite is never the best; the first validation stands in until there is one.
        equal = config.validate_on != "held_out" and value == current.best  # the authors take the later of equals
        if current.best is None or value < current.best or equal:
            current.best, current.best_step = (value if math.isfinite(value) else math.inf), current.step
            current.worse = 0
            self.tensors.best = {name: t.detach().cpu().clone() for name, t in self.kept.state_dict().items()}
        else:
            current.worse += 1
            if config.patience is not None and current.worse >= config.patience:
                current.stopped = "no better validation"

    def _log(self, rate: float) -> None:
        """Close a row of the curves."""
        current = self.state
        row = Row(step=current.step, lr=rate)
        if current.loss_count:
            current.last_loss = current.loss_sum / current.loss_count
            row |= {"loss": current.last_loss, "grad_norm": self.grad_norm}
            current.loss_sum, current.loss_count = 0.0, 0
        current.rows.append(row | self.row)
        self.row = Row()

    @torch.no_grad()
    def _average(self) -> None:
        if self.tensors.average is not None and self.config.ema:
            pairs = zip(self.tensors.average.parameters(), self.pruner.parameters(), strict=True)
            means, weights = (list(side) for side in zip(*pairs, strict=True))
            torch._foreach_lerp_(means, weights, 1 - self.config.ema)

    @property
    def _eval_every(self) -> int:
        return self.config.eval_every or self.order.steps_per_epoch

    def _check_tokens(self, pruner_config: PrunerConfig, images: list[int], handed_on: TokenSource | None) -> None:
        tokens_BNC, _, _ = self.dataset.batch(images[:1])
        count, width = tokens_BNC.shape[1:]
        if handed_on is not None:
            ids = [getattr(source, "image_ids", len(source)) for source in (self.dataset, handed_on)]
            if ids[0] != ids[1]:
                raise Incompatible("handed_on has other images than the tokens to train on, or in another order")
        elif pruner_config.residual_of == "handed_on":
            raise BadInput("residual_of is handed_on, but the tokens of the layer that goes to the LLM are not there: "
                           "give them as handed_on")  # fmt: skip
        if width != pruner_config.token_dim:
            raise Incompatible(f"the tokens are {width} wide, the pruner's token_dim is {pruner_config.token_dim}")
        if self.most > count:
            raise BadInput(
                f"slots has {self.most}, but an image has {count} tokens: at most one slot a token is possible"
            )

    def _taught_by(
        self, teacher: Teacher | None, pruner_config: PrunerConfig, trained_for: TrainedFor
    ) -> Teacher | None:
        """The teacher, once it is known to be needed and to fit."""
        if self.config.loss != "answers":
            if teacher is not None:
                raise BadInput(f"a VLM that teaches is of use with loss=answers only, loss is {self.config.loss}")
            return None
        return answers.check(teacher, pruner_config, trained_for, self._image_ids())

    def _segmented(self, objects: Segmentations | None) -> Segmentations | None:
        """The objects of the images, once they are known to be needed and to be there."""
        if self.config.loss != "masks":
            if objects is not None:
                raise BadInput(f"segmented objects are of use with loss=masks only, loss is {self.config.loss}")
            return None
        if objects is None:
            raise BadInput(f"{coverage_loss.NEEDS}: none are given")
        objects.check(self._image_ids())
        return objects

    def _image_ids(self) -> list[str]:
        names = getattr(self.dataset, "image_ids", None)
        if names is None:
            raise BadInput(f"loss is {self.config.loss}, but the tokens do not say of which images they are: "
                           "image_ids is missing")  # fmt: skip
        return list(names)

    def _spec(self, images: list[int]) -> str:
        """Digest of all that determines the training, but for the tokens themselves."""
        parts = {
            "version": _VERSION,
            "pruner": self.pruner.config.to_dict(),
            "train": self.config.to_dict() | {"checkpoint_every": None},
            "trained_for": self.pruner.trained_for.to_dict(),
            "images": images,
            "held_out": self.held_out,
            **({"teacher": self.teacher.identity} if self.teacher else {}),
            **({"objects": self.objects.identity} if self.objects else {}),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
