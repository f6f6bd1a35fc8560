"""`--costs` of the stages extract and train: the disk space and the time that they take at the size of the params.

Space is counted in closed form. Time is that of a few passes on this device over random numbers of the same shapes,
with random weights, times how many there are: no image, token or published result is needed, and nothing is changed.

Letters: N tokens of an image, C width of a token.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.layout import Grid
from ocvtp.pruner.loss import WITHOUT_DECODER
from ocvtp.pruner.training.train_config import TrainConfig
from ocvtp.tokens.loader import MEMORY_BUDGET
from ocvtp.tokens.manifest import DTYPES
from ocvtp.vlms import CatalogEntry, resolve
from pipelines.grid import PrunerCell, pruner_cells, token_sets
from pipelines.params.model import SAMPLED, Extract, Params
from pipelines.tasks.places import device

SECONDS = 2.0
"""That a measured pass takes, about: over so many images at once, and no more than a batch."""
PASSES = 3
"""Of which the fastest counts."""
SAVED = 2
"""Checkpoints of a training that are kept at once."""
OBJECTS = 7
"""Segmented objects of an image: train2017 of COCO has 860,001 in 118,287 images."""


@dataclass(frozen=True)
class Cost:
    """Of some work.

    Attributes:
        what: it is.
        passes: images that a model sees, each as often as it does.
        disk: bytes of the store; 0 where it takes none, or nobody can say before images are seen.
        speed: images a second here; None where none were measured.
    """

    what: str
    passes: int
    disk: int
    speed: float | None

    @property
    def seconds(self) -> float | None:
        """Here, one task after the other."""
        return None if self.speed is None else self.passes / self.speed


def costs(params: Params, *, training: bool) -> Iterator[str]:
    """The lines of the table: extraction, and `training` too.

    Raises:
        BadInput, NotAvailable: as for the stages themselves, where a VLM is not here or a pruner does not fit.
    """
    where, resources = device(), params.cluster.resources
    yield f"by passes over random numbers of the same shapes, here ({_name(where, params)}); one task after the other:"
    with _threads(resources.extract.cpus):
        found = list(_extraction(params, where))
    if training:
        with _threads(resources.train.cpus):
            found += _training(params, where)
    width = max(len(one.what) for one in found)
    yield f"{'':<{width}}  {'images seen':>11}  {'disk':>8}  {'images/s':>8}  {'time':>8}"
    for one in found:
        disk = _size(one.disk) if one.disk else "-"
        speed = "-" if one.speed is None else f"{one.speed:.3g}"
        yield f"{one.what:<{width}}  {one.passes:>11,}  {disk:>8}  {speed:>8}  {_span(one.seconds):>8}"
    yield from _notes(params, training=training)


def _name(where: str, params: Params) -> str:
    if where != "cpu":
        return torch.cuda.get_device_name()
    extract, train = params.cluster.resources.extract.cpus, params.cluster.resources.train.cpus
    return f"cpu, with the cpus of cluster.resources: {extract} to extract, {train} to train"


@contextmanager
def _threads(cpus: int) -> Iterator[None]:
    """Within, as many threads as a task with so many CPUs has."""
    before = torch.get_num_threads()
    torch.set_num_threads(cpus)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _notes(params: Params, *, training: bool) -> Iterator[str]:
    yield "extraction is the tower alone: images are decoded beside it"
    if any(resolve(name).tokens is None for name in params.vlm):
        yield "-: images have different numbers of tokens"
    if own := dict.fromkeys(on for on, _ in token_sets(params, resolve(params.vlm[0])) if on != SAMPLED):
        images, names = params.sample.images, ", ".join(own)
        counted = f"counted as sample.images, {images:,} each"
        yield f"on {names}: {counted}; stage sample leaves out what a benchmark asks about"
    if not training:
        return
    if any(cell.loss == "masks" for cell in pruner_cells(params)):
        yield f"with loss masks an image has {OBJECTS} objects, as COCO's; to draw their masks, once each, is not in it"
    if any(cell.loss == "answers" for cell in pruner_cells(params)):
        yield "-: with loss answers the language model is asked at each step"
    for vlm in map(resolve, params.vlm):
        size = params.sample.images * image_bytes(vlm, params.extract)
        if size > MEMORY_BUDGET:
            yield f"{vlm.name}: training maps the {_size(size)} of a layer's tokens, it does not hold them in memory"


def image_bytes(vlm: CatalogEntry, extract: Extract) -> int:
    """Of one layer's tokens of an image; 0 where images have different numbers of them."""
    return (vlm.tokens or 0) * vlm.width * DTYPES[extract.dtype].itemsize


# --- Extraction ------------------------------------------------------------------------------------------------------


def _extraction(params: Params, where: str) -> Iterator[Cost]:
    """One pass of a tower makes all layers."""
    images = params.sample.images
    for name in params.vlm:
        vlm, speeds, wanted = resolve(name), dict[tuple[int, ...], float | None](), dict[str, list[int]]()
        for on, layer in token_sets(params, vlm):
            wanted.setdefault(on, []).append(layer)
        for on, layers in wanted.items():
            key = tuple(layers)
            if key not in speeds:
                speeds[key] = _tower_speed(vlm, layers, params.extract, where)
            what = f"extract {vlm.name}, layer {', '.join(map(str, layers))}" + ("" if on == SAMPLED else f", on {on}")
            disk = len(layers) * images * image_bytes(vlm, params.extract)
            yield Cost(what, images, disk, speeds[key])


def _tower_speed(vlm: CatalogEntry, layers: Sequence[int], extract: Extract, where: str) -> float | None:
    """Images a second."""
    if vlm.tokens is None:
        return None
    from transformers import AutoConfig, AutoModel

    from ocvtp.efficiency.shapes import shape_of
    from ocvtp.vlms.hidden_states import resolve_layers
    from ocvtp.vlms.tower import Tower

    config, dtype = AutoConfig.from_pretrained(vlm.folder), DTYPES[extract.compute_dtype]
    shape, indices = shape_of(config).tower, set(resolve_layers(layers, vlm.depth, vlm=vlm.name).values())
    with torch.device(where):
        tower = Tower(AutoModel.from_config(config.vision_config, dtype=dtype).eval())
    tiles = -(-vlm.tokens // (shape.tokens_per_tile or 1))

    def once(images: int) -> None:
        pixels = torch.randn(images * tiles, 3, shape.image_size or 0, shape.image_size or 0, device=where, dtype=dtype)
        with torch.inference_mode():
            states = tower.states(pixels, indices)
        _ = {layer: state.cpu() for layer, state in states.items()}

    return _speed(lambda images: min(_seconds(lambda: once(images)) for _ in range(PASSES)), extract.batch_size)


# --- Training --------------------------------------------------------------------------------------------------------


class RandomTokens:
    """Tokens of noise, as `ocvtp.pruner.training.data.TokenSource` asks for them; the first image is held out."""

    def __init__(self, images: int, tokens: int, width: int, grid: tuple[int, int]) -> None:
        self.images, self.shape, self.grid = images, (tokens, width), grid
        self.draws = torch.Generator().manual_seed(0)
        self.image_ids = [str(number) for number in range(images)]

    def __len__(self) -> int:
        return self.images

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, None, list[tuple[int, int]]]:
        """Tokens [B, N, C] in half precision."""
        tokens_BNC = torch.randn(len(indices), *self.shape, generator=self.draws, dtype=torch.float16)
        return tokens_BNC, None, [self.grid] * len(indices)

    def split(self, validation_share: float, seed: int) -> tuple[list[int], list[int]]:
        """All but the first, and the first."""
        return list(range(1, self.images)), [0]


class RandomObjects:
    """`OBJECTS` an image, each on a tenth of its tokens, as `ocvtp.pruner.training.coverage_loss` asks for them."""

    identity: Mapping[str, Any] = {"random": OBJECTS}

    def __init__(self) -> None:
        self.draws = torch.Generator().manual_seed(0)

    def check(self, images: Sequence[str]) -> None:
        """Of every image all is known."""

    def touched(self, images: Sequence[str], grids: Sequence[Grid], count: int) -> Tensor:
        """Bool [B, S, N]."""
        return torch.rand(len(images), OBJECTS, count, generator=self.draws) < 0.1


def _training(params: Params, where: str) -> Iterator[Cost]:
    """Of pruners that differ in the seed or the layer alone one is measured, for all of them."""
    alike: dict[tuple[str, str], list[PrunerCell]] = {}
    for cell in pruner_cells(params):
        pruner, config = _configs(params, cell)
        alike.setdefault((cell.vlm, repr((pruner, replace(config, seed=0)))), []).append(cell)
    for cells in alike.values():
        yield from _trained(params, cells, where)


def _configs(params: Params, cell: PrunerCell) -> tuple[PrunerConfig, TrainConfig]:
    vlm, train = resolve(cell.vlm), params.train.changed(cell.changes)
    pruner = train.pruner_config(vlm.width, vlm.grid)
    config = train.config(cell.loss, cell.slots, cell.seed)
    return (replace(pruner, decoder=None) if config.loss in WITHOUT_DECODER else pruner), config


def _trained(params: Params, cells: Sequence[PrunerCell], where: str) -> Iterator[Cost]:
    from ocvtp.pruner.training.data import Order

    (pruner, config), vlm = _configs(params, cells[0]), resolve(cells[0].vlm)
    held = round(params.sample.images * config.validation_share)
    held = min(max(held, 1 if config.validation_share else 0), params.sample.images - 1)
    order = Order(range(params.sample.images - held), config.batch_size, drop_last=config.drop_last, seed=0)
    steps = config.steps or (config.epochs or 0) * order.steps_per_epoch
    epochs, rest = divmod(steps, order.steps_per_epoch)
    seen = epochs * min(order.steps_per_epoch * order.batch_size, len(order.images)) + rest * order.batch_size
    judged = -(-steps // (config.eval_every or order.steps_per_epoch))
    if config.validate_on == "held_out":
        judged += 1  # before the first step
    else:  # the last batch as often as there are batches of held-out images
        held = max(1, -(-held // config.batch_size)) * order.batch_size
    speeds = _training_speeds(pruner, config, vlm, where) if config.loss != "answers" else (None, None)
    what, count = f"train {cells[0].folder}" + (f" and {len(cells) - 1} alike" if len(cells) > 1 else ""), len(cells)
    size = 4 * _parameters(pruner)
    saved = SAVED * size * (4 if config.ema is None else 5)  # the weights, two moments, the best ones, their mean
    yield Cost(f"{what}, {steps:,} steps", count * seen, count * 2 * size, speeds[0])
    yield Cost("  its checkpoints, while it runs, at most", 0, saved, None)
    passes = count * judged * held * len(config.validation_slots)
    yield Cost(f"  its {judged} validations, {len(config.validation_slots)} slot counts each", passes, 0, speeds[1])


def _parameters(config: PrunerConfig) -> int:
    from ocvtp.pruner.model import OCPruner

    with torch.device("meta"):
        return sum(weight.numel() for weight in OCPruner(config).parameters())


def _training_speeds(
    pruner: PrunerConfig, config: TrainConfig, vlm: CatalogEntry, where: str
) -> tuple[float | None, float | None]:
    """Images a second of training steps and of validation."""
    if vlm.tokens is None:
        return None, None
    from ocvtp.pruner.model import OCPruner
    from ocvtp.pruner.training.data import WithMore
    from ocvtp.pruner.training.run import train
    from ocvtp.pruner.training.validate import validate

    shape = (vlm.tokens, vlm.width, vlm.grid or _sides(vlm.tokens))
    objects = RandomObjects() if config.loss == "masks" else None
    few: dict[str, Any] = {"steps": PASSES + 2, "eval_every": PASSES + 2, "epochs": None, "patience": None}

    def a_step(images: int) -> float:
        moments = list[float]()
        with tempfile.TemporaryDirectory(prefix="ocvtp-costs-") as folder:
            train(
                pruner, replace(config, batch_size=images, **few), RandomTokens(2 * images + 1, *shape), Path(folder),
                resume=Path(folder) / "resume", device=where, objects=objects,
                progress=lambda *_: moments.append(time.perf_counter()),
            )  # fmt: skip
        return min(after - before for before, after in pairwise(moments[:-1]))  # behind the last there is a validation

    judged = OCPruner(pruner).to(where)

    def a_validation(images: int) -> float:
        source = WithMore(RandomTokens(images, *shape), objects)
        return min(
            _seconds(lambda: validate(judged, config, source, range(images), torch.device(where)))
            for _ in range(PASSES)
        )

    return _speed(a_step, config.batch_size), len(config.validation_slots) * _speed(a_validation, config.batch_size)


def _sides(tokens: int) -> tuple[int, int]:
    """A grid of so many tokens, as square as can be."""
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


# --- Measuring and telling -------------------------------------------------------------------------------------------


def _speed(seconds_of: Callable[[int], float], most: int) -> float:
    """Images a second, of as many at once as take `SECONDS`, from one to `most`.

    Args:
        seconds_of: what a pass over so many images takes.
        most: images of a batch.
    """
    one = seconds_of(1)
    images = max(1, min(most, int(SECONDS / one)))
    return 1 / one if images == 1 else images / seconds_of(images)


def _seconds(once: Callable[[], object]) -> float:
    start = time.perf_counter()
    once()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _size(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    unit, name = next(
        ((unit, name) for unit, name in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * unit), (1, "s")
    )
    return f"{seconds / unit:.3g} {name}"
