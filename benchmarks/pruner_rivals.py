"""Parts of `pruner.py`: losses at equal time of training, and choices with and without a pruner at equal budgets."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.answers import teacher_of
from ocvtp.data.scenes import SceneSet, write_scenes
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.loss import LOSSES, WITHOUT_DECODER
from ocvtp.pruner.seeding import derive, generator
from ocvtp.pruner.training.data import Order, WithMore, fetch
from ocvtp.pruner.training.optimiser import make_optimizer
from ocvtp.pruner.training.ranks import Ranks, StepLoss
from ocvtp.pruner.training.run import TrainConfig
from ocvtp.pruner.training.validate import validate
from ocvtp.selection import CHOICES, span_error
from ocvtp.tokens.extract import ImageRecord, extract_tokens
from ocvtp.tokens.loader import TokenDataset
from ocvtp.tokens.object_masks import ObjectMasks
from ocvtp.vlms import load

SLOTS = (4, 8, 16)
BUDGETS = {(144, 96): (48, 32, 16), (576, 1024): (192, 128, 64), (2880, 1024): (640, 320, 160)}
"""The paper's, by tokens and width: tiny-llava's, LLaVA-1.5's and LLaVA-NeXT's."""
LAYER, HANDED_ON = 9, -2


class Training:
    """One loss on tiny-llava's tokens; its steps take turns with those of others."""

    def __init__(self, loss: str, dataset: TokenDataset, teacher: Any, device: torch.device) -> None:
        # Without truncation, where gradients have no decoder to come through.
        options = {"truncation": "none", "decoder": None} if loss in WITHOUT_DECODER else {}
        self.config = TrainConfig(loss=loss, slots=SLOTS, steps=100_000, warmup_steps=20)
        torch.manual_seed(0)
        self.pruner = OCPruner(PrunerConfig(dataset.meta.width, grid=dataset.meta.grid, **options)).to(device).train()
        self.teacher = teacher if loss == "answers" else None
        self.optimizer = make_optimizer(self.pruner, self.config)
        self.step_loss = StepLoss(self.pruner, self.config, self.teacher)
        meta = dataset.meta
        objects = ObjectMasks.of_scenes(SceneSet(0), meta.preprocessing, meta.grid) if loss == "masks" else None
        self.dataset, self.device = WithMore(dataset, objects), device
        images, self.held_out = dataset.split(0.2, 0)
        self.order = Order(images, self.config.batch_size, drop_last=True, seed=0)
        self.steps, self.seconds = 0, 0.0

    def step(self) -> None:
        started = time.perf_counter()
        batch = fetch(self.dataset, self.order.indices(self.steps), self.device)
        draws = generator("benchmark", self.steps)
        slots = SLOTS[int(torch.randint(len(SLOTS), (), generator=draws))]
        noise_BKD, plan = Ranks().draws(self.pruner, batch, len(batch.indices), slots, draws)
        loss = self.step_loss(batch, slots, noise_BKD, plan, derive("benchmark", self.steps))
        loss.backward()
        nn.utils.clip_grad_norm_(self.pruner.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, (self.steps + 1) / self.config.warmup_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        self.seconds += time.perf_counter() - started
        self.steps += 1

    def quality(self, teacher: Any, handed_on: TokenDataset) -> dict[str, Any]:
        """On images held out: KL, and span errors by tokens kept, of the layer read and of the one handed on."""
        kl = validate(self.pruner, TrainConfig(loss="answers", slots=SLOTS, steps=1), self.dataset, self.held_out,
                      self.device, teacher)  # fmt: skip
        batch, further = (fetch(each, self.held_out, self.device) for each in (self.dataset, handed_on))
        self.pruner.eval()
        kept = {keep: self.pruner.select(batch.tokens_BNC, keep) for keep in SLOTS}
        self.pruner.train()
        return {
            "kl": kl["kl"],
            "span_error": {k: float(span_error(batch.tokens_BNC, i).mean()) for k, i in kept.items()},
            "handed_on_span_error": {k: float(span_error(further.tokens_BNC, i).mean()) for k, i in kept.items()},
        }


def losses(images: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """Each loss, and none, after as many seconds of its own steps; steps take turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder, images, 0, "train")
        records = [ImageRecord(path.stem, path) for path in sorted((folder / "images").iterdir())]
        vlm = load("tiny-llava", device=device)
        shards = extract_tokens(vlm, records, [LAYER, HANDED_ON], folder / "tokens")
        dataset, handed_on = (TokenDataset([shards[layer]]) for layer in (LAYER, HANDED_ON))
        teacher = teacher_of(vlm, TrainConfig(loss="answers", slots=SLOTS), records, scenes=SceneSet(0))
        rivals = {loss: Training(loss, dataset, teacher, device) for loss in LOSSES}
        untrained = rivals["span"].quality(teacher, handed_on)  # which the teacher has then seen all of
        while (name_ := min(rivals, key=lambda one: rivals[one].seconds)) and rivals[name_].seconds < seconds:
            rivals[name_].step()
        return {
            "images": images,
            "layer": LAYER,
            "seconds": seconds,
            "untrained": untrained,
            "losses": {
                loss: {
                    "steps": rival.steps,
                    "samples_per_second": rival.steps * rival.config.batch_size / rival.seconds,
                    **rival.quality(teacher, handed_on),
                }
                for loss, rival in rivals.items()
            },
        }


# --- Choices ---------------------------------------------------------------------------------------------------------


def choices(
    images_of: Callable[[Any], Tensor], sizes: Sequence[Any], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Milliseconds an image and span error of each choice, in fp32, one image at a time.

    Args:
        images_of: tokens of some images, of a size.
        sizes: each with `tokens` and `width`.
        rounds: timed calls of each, taking turns; their median counts.
        device: where.
    """
    rows = []
    for size in sizes:
        count, width = size.tokens, size.width
        tokens_BNC = images_of(size).to(device)
        torch.manual_seed(0)
        pruner = OCPruner(PrunerConfig(width, decoder=None)).eval().to(device)
        for keep in BUDGETS.get((count, width), (max(1, count // 9),)):
            rivals: dict[str, Callable[[Tensor], Tensor]] = {
                "select": lambda one_1NC, keep=keep, pruner=pruner: pruner.select(one_1NC, keep, check_values=False),
                **{name: lambda one_1NC, keep=keep, choose=choose: choose(one_1NC, keep, check_values=False)
                   for name, choose in CHOICES.items()},
            }  # fmt: skip
            times: dict[str, list[float]] = {name: [] for name in rivals}
            kept: dict[str, list[Tensor]] = {name: [] for name in rivals}
            for number in range(rounds + 1):  # the first is not timed
                for name, choose in rivals.items():
                    one_1NC = tokens_BNC[number % len(tokens_BNC)][None]
                    started = time.perf_counter()
                    found_1S = choose(one_1NC)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    times[name].append(time.perf_counter() - started)
                    if number < len(tokens_BNC):
                        kept[name].append(found_1S)
            for name in rivals:
                error = statistics.mean(
                    float(span_error(tokens_BNC[i][None], found_1S)) for i, found_1S in enumerate(kept[name])
                )
                rows.append({"tokens": count, "width": width, "keep": keep, "choice": name,
                             "ms": 1000 * statistics.median(times[name][1:]), "span_error": error})  # fmt: skip
    return rows


def lines(found: dict[str, Any]) -> list[str]:
    """Tables of what is there."""
    made: list[str] = []
    if "losses" in found:
        told = found["losses"]
        made += [
            "",
            f"Losses on {told['images']} scenes of tiny-llava, layer {told['layer']}, {told['seconds']:.0f} s of steps "
            "each; span error with 16, 8 and 4 of 144 tokens kept, of that layer and of the one handed on.",
            "",
            "| loss | steps | samples/s | span error | handed on | KL |",
            "|:--|--:|--:|--:|--:|--:|",
        ]
        rows = {"untrained": {"steps": 0, "samples_per_second": None, **told["untrained"]}, **told["losses"]}
        for name, row in rows.items():
            rate = "" if row["samples_per_second"] is None else f"{row['samples_per_second']:.0f}"
            errors = (" / ".join(f"{row[key][keep]:.3f}" for keep in sorted(row[key], key=int, reverse=True))
                      for key in ("span_error", "handed_on_span_error"))  # fmt: skip
            made.append(f"| {name} | {row['steps']} | {rate} | {' | '.join(errors)} | {row['kl']:.3f} |")
    if "choices" in found:
        names = list(dict.fromkeys(row["choice"] for row in found["choices"]))
        made += ["", "| ms an image (span error), fp32, one by one | " + " | ".join(names) + " |",
                 "|:--|" + "--:|" * len(names)]  # fmt: skip
        for key in dict.fromkeys((row["tokens"], row["width"], row["keep"]) for row in found["choices"]):
            cells = [f"{row['ms']:.2f} ({row['span_error']:.3f})" for row in found["choices"]
                     if (row["tokens"], row["width"], row["keep"]) == key]  # fmt: skip
            made.append(f"| {key[0]} x {key[1]}, keep {key[2]} | {' | '.join(cells)} |")
    return made
