"""`ocvtp train`: one pruner on extracted tokens, on one device or, under `torchrun`, on several."""

import argparse
from pathlib import Path
from typing import Any

from ocvtp.commands import common
from ocvtp.errors import BadInput, Corrupt
from ocvtp.json_files import read_json


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "train", run, "train a pruner on extracted tokens",
        "Goes on where it stopped. Several GPUs: torchrun --nproc-per-node 8 -m ocvtp.cli train ...; a batch is then "
        "shared among the processes, and the curves are those of one device.",
    )  # fmt: skip
    parser.add_argument("tokens", type=Path, help="a listing of stage extract: data/tokens/VLM/layer_9.json")
    parser.add_argument("out", type=Path, help="the folder for the pruner")
    parser.add_argument("--handed-on", type=Path, default=None, metavar="LISTING", help="the same of the layer that "
                        "goes to the LLM: validation then tells how well what is kept stands for it")  # fmt: skip
    parser.add_argument("--store", type=Path, default=Path(".ocvtp/store"), help="where the listed shards are "
                        "(default: .ocvtp/store)")  # fmt: skip
    parser.add_argument("--sample", type=Path, default=Path("data/sample"), help="the output of stage sample, for "
                        "loss=answers, and for loss=masks of scenes (default: data/sample)")  # fmt: skip
    parser.add_argument("--objects", type=Path, default=None, metavar="JSON", help="for loss=masks of photographs: "
                        "their segmented objects, such as COCO's instances_train2017.json")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="options of TrainConfig, or of PrunerConfig after `pruner.`: steps=400 loss=mse "
                        "slots=[16,32] pruner.decoder=mlp")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train and write."""
    options, pruner = _options(args.set)
    from ocvtp.pruner.config import PrunerConfig
    from ocvtp.pruner.provenance import TrainedFor
    from ocvtp.pruner.training import ranks
    from ocvtp.pruner.training.train_config import TrainConfig
    from ocvtp.tokens.loader import TokenDataset

    config = _made(TrainConfig, options)
    for listing in filter(None, (args.tokens, args.handed_on)):
        if not listing.is_file():
            raise BadInput(f"{listing} does not exist: `dvc repro extract` writes such listings to data/tokens")
    dataset = TokenDataset.from_listing(args.tokens, args.store)
    handed_on = None if args.handed_on is None else TokenDataset.from_listing(args.handed_on, args.store)
    meta = dataset.meta
    known = {"token_dim": meta.width, "behaviour": config.behaviour, **({"grid": meta.grid} if meta.grid else {})}
    pruner_config = _made(PrunerConfig, {**known, **pruner})
    about = TrainedFor(
        **{
            name: getattr(meta, name)
            for name in ("vlm", "revision", "weights", "layer", "tower_layer", "preprocessing")
        }
    )
    device = ranks.begin()
    try:
        first = ranks.Ranks.current().first
        teacher = _teacher(config, meta, args.sample, args.store, device) if config.loss == "answers" else None
        objects = None
        if config.loss == "masks":
            objects = _objects(dataset, args.objects, args.sample)
        elif args.objects is not None:
            raise BadInput(f"--objects is of use with loss=masks only, loss is {config.loss}")
        more = {"teacher": teacher, "handed_on": handed_on, "objects": objects}
        metrics = _train(pruner_config, config, dataset, args.out, device, about, more, shown=first)
    finally:
        ranks.end()
    if first:
        common.console().print(
            f"{args.out}: best of step {metrics['best_step']} of {metrics['steps']}, {metrics['distinct_picks']:.1f} "
            f"distinct picks, which leave {100 * metrics['span_error']:.1f} % of the variance unexplained",
            soft_wrap=True,
        )
    return 0


def _teacher(config: Any, meta: Any, sample: Path, store: Path, device: Any) -> Any:
    """The VLM whose tokens these are, with the training images and what is asked of them."""
    from ocvtp.answers.teacher import teacher_of
    from ocvtp.data.scenes import SceneSet
    from ocvtp.tokens.extract import ImageRecord
    from ocvtp.vlms import load

    try:
        images = read_json(sample / "images.json")
        records = [ImageRecord(image["id"], store / image["path"], image["sha256"]) for image in images]
        scenes = SceneSet.of_sample(read_json(sample / "sample.json"))
    except (OSError, Corrupt, KeyError, TypeError) as error:
        raise BadInput(f"loss=answers needs the training images, as stage sample lists them in {sample} (--sample): "
                       f"{error}") from error  # fmt: skip
    vlm = load(meta.vlm, device=device, dtype=config.vlm_dtype)
    return teacher_of(vlm, config, records, scenes=scenes, preprocessing=meta.preprocessing)


def _objects(dataset: Any, given: Path | None, sample: Path) -> Any:
    """The segmented objects of the images whose tokens these are."""
    from ocvtp.data.scenes import SceneSet
    from ocvtp.tokens.object_masks import ObjectMasks, check_one_grid

    check_one_grid(dataset.meta.vlm)
    fit, grid = dataset.meta.preprocessing, dataset.meta.grid
    if given is not None:
        return ObjectMasks.of_coco(given, dataset.image_ids, fit, grid)
    try:
        scenes = SceneSet.of_sample(read_json(sample / "sample.json"))
    except (OSError, Corrupt, KeyError, TypeError) as error:
        raise BadInput(
            f"loss=masks needs segmented objects: --objects JSON, or, of scenes, --sample: {error}"
        ) from error
    if scenes is None:
        raise BadInput("loss=masks needs the segmented objects of the images, which are no scenes: --objects JSON")
    return ObjectMasks.of_scenes(scenes, fit, grid)


def _train(
    pruner: Any, config: Any, dataset: Any, out: Path, device: Any, about: Any, more: dict[str, Any], *, shown: bool
) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ocvtp.pruner.training.run import train

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=common.console(), disable=not shown) as bar:
        task = bar.add_task("training", total=None, note="")

        def progress(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        resume = out / "resume"
        return train(
            pruner,
            config,
            dataset,
            out,
            resume=resume,
            progress=progress,
            device=device,
            trained_for=about,
            **more,
        )


def _options(given: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the training, and of the pruner."""
    options: dict[str, Any] = {}
    pruner: dict[str, Any] = {}
    for name, value in common.named_values("--set", given, "steps=400").items():
        (pruner if name.startswith("pruner.") else options)[name.removeprefix("pruner.")] = value
    return options, pruner


def _made(config: type[Any], options: dict[str, Any]) -> Any:
    """A config, whose own checks name what is wrong."""
    return config.from_dict(options)
