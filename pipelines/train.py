"""Stage `train`: one pruner for each VLM, images, layer, loss, slots and seed. Writes `models/<vlm>/<pruner>/`.

`models/pruners.json` says where the store has each pruner, and its checksums.
"""

import hashlib
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster import Task
from ocvtp.answers.asking import check_all, prompts_of
from ocvtp.data.scenes import SceneSet
from ocvtp.errors import BadInput
from ocvtp.json_files import read_json
from ocvtp.pruner.training.train_config import QUESTIONS, TrainConfig
from ocvtp.tokens.manifest import ShardMeta, read_layer_listing
from ocvtp.tokens.object_masks import check_one_grid
from ocvtp.vlms import resolve
from pipelines import tracking
from pipelines.grid import PrunerCell, handed_on_layer, pruner_cells, token_sets, tokens_listing
from pipelines.params.model import SAMPLED
from pipelines.spool import Dataset, Record, curves
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.costs import costs
from pipelines.stage.dry_run import Plan
from pipelines.tasks.pruners import pruner
from pipelines.tasks.segmented import segmented
from pipelines.tasks.taught import taught

LEFT_IN_STORE = "last.safetensors"
"""The weights of the last step: rarely looked at, and as large as the best ones."""


def work(run: Stage) -> None:
    """Train what is missing, and write the output."""
    tasks = _tasks(run)
    run.run(list(tasks.values())).raise_if_failed()
    with outputs.folder(run.root / outputs.MODELS) as folder:
        index = {
            cell.folder: {**_output(run, task, folder / cell.folder), "changes": dict(cell.changes)}
            for cell, task in tasks.items()
        }
        outputs.write_json(folder / Path(outputs.PRUNERS).name, index)
    tracking.track(run, [_record(run, cell, task) for cell, task in tasks.items()])


def plan(run: Stage) -> Plan:
    """What it would train."""
    return Plan(list(_tasks(run).values()))


def _tasks(run: Stage) -> dict[PrunerCell, Task]:
    listings = {
        (vlm, on, layer): _tokens(run, vlm, on, layer)
        for vlm in run.params.vlm
        for on, layer in token_sets(run.params, resolve(vlm))
    }
    return {cell: _task(run, cell, listings) for cell in pruner_cells(run.params)}


def _tokens(run: Stage, vlm: str, on: str, layer: int) -> dict[str, Any]:
    """The listing of a layer, once all its shards are known to be whole."""
    path = run.input(f"{outputs.TOKENS}/{tokens_listing(vlm, on, layer)}", "extract")
    read_layer_listing(path, run.store.root)  # says what is wrong with it
    listing: dict[str, Any] = read_json(path)
    wanted: dict[Path, dict[str, str]] = {}
    for shard in listing["shards"]:
        place = run.store.root / shard["path"]
        wanted.setdefault(place.parent, {})[place.name] = shard["sha256"]
    run.require(wanted, "extract")
    return listing


def _task(run: Stage, cell: PrunerCell, listings: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> Task:
    listing = listings[cell.vlm, cell.on, cell.layer]
    meta = ShardMeta.from_dict(listing["meta"], f"the tokens of {cell.vlm}")
    train = run.params.train.changed(cell.changes)
    config = train.config(cell.loss, cell.slots, cell.seed)
    spec = {
        "tokens": _unplaced(listing),
        "pruner": train.pruner_config(meta.width, meta.grid).to_dict(),
        "train": config.to_dict(),
    }
    inputs = {"shards": [shard["path"] for shard in listing["shards"]]}
    if train.handed_on:
        handed_on = listings[cell.vlm, cell.on, handed_on_layer(run.params, resolve(cell.vlm))]
        spec["handed_on"] = _unplaced(handed_on)
        inputs["handed_on"] = [shard["path"] for shard in handed_on["shards"]]
    call: Any = pruner
    if cell.loss == "answers":
        call = taught
        answers, more = _answers(run, cell, config)
        spec, inputs = {**spec, "answers": answers}, {**inputs, **more}
    elif cell.loss == "masks":
        call = segmented
        objects, more = _objects(run, cell)
        spec, inputs = {**spec, "objects": objects}, {**inputs, **more}
    return run.task("pruners", cell.folder, call, spec, run.params.cluster.resources.train, inputs)


def _unplaced(listing: Mapping[str, Any]) -> dict[str, Any]:
    """What a listing says, but for where shards are."""
    shards = [{key: value for key, value in shard.items() if key != "path"} for shard in listing["shards"]]
    return {**listing, "shards": shards}


def _answers(run: Stage, cell: PrunerCell, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a VLM teaches with: entries of the spec, and where things are."""
    images = run.sampled_images(cell.on)
    scenes = SceneSet.of_sample(read_json(run.input(f"{outputs.SAMPLE}/sample.json", "sample")))
    prompts = config.prompts if isinstance(config.prompts, str) and config.prompts != QUESTIONS else None
    try:
        asked = prompts_of(config, scenes)
        if prompts is not None:
            check_all(asked, [image["id"] for image in images])
    except BadInput as error:
        raise BadInput(f"train.prompts: {error}") from error
    answers = {
        "vlm": cell.vlm,
        "model": resolve(cell.vlm).identity,
        "images": [{"id": image["id"], "sha256": image["sha256"]} for image in images],
        "scenes": None if scenes is None else scenes.to_dict(),
        "prompts": None if prompts is None else hashlib.sha256(Path(prompts).read_bytes()).hexdigest(),
    }
    found = None if prompts is None else str(Path(prompts).resolve())
    return answers, {"images": [image["path"] for image in images], "prompts": found}


def _objects(run: Stage, cell: PrunerCell) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the segmented objects of the training images are: entries of the spec, and the file."""
    try:
        check_one_grid(cell.vlm)
    except BadInput as error:
        raise BadInput(f"loss is masks, but {error}") from error
    scenes = SceneSet.of_sample(read_json(run.input(f"{outputs.SAMPLE}/sample.json", "sample")))
    if scenes is not None:
        return {"scenes": scenes.to_dict()}, {}
    own = run.params.sample.training.get(cell.on)
    given = run.params.sample.annotations if cell.on == SAMPLED else own.annotations if own else None
    if given is None:
        raise BadInput(f"loss is masks, but of {cell.on}'s training images no segmented objects are known: "
                       f"sample.training.{cell.on}.annotations may name a file of COCO with them")  # fmt: skip
    path = Path(given).resolve()
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    images = [image["id"] for image in run.sampled_images(cell.on)]
    return {"scenes": None, "coco": sha256, "images": images}, {"segmentations": str(path)}


def _output(run: Stage, task: Task, folder: Path) -> dict[str, Any]:
    """Copy a pruner; returns what the index says of it."""
    manifest = outputs.copy_published(task.out, folder, leave=(LEFT_IN_STORE,))
    files = {file.path: file.sha256 for file in manifest.files if file.path != LEFT_IN_STORE}
    return {"path": run.in_store(task.out), "files": files}


def _record(run: Stage, cell: PrunerCell, task: Task) -> Record:
    """Of one training, for MLflow."""
    folder = run.root / outputs.MODELS / cell.folder
    metrics = read_json(folder / "metrics.json")
    train = run.params.train.changed(cell.changes)
    options = {f"train.{key}": value for key, value in {**train.given, **train.pruner.given}.items()}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    tokens = task.spec["tokens"]
    name = f"{cell.vlm}, layer {cell.layer}" + ("" if cell.on == SAMPLED else f", on {cell.on}")
    return Record(
        fingerprint=task.key,
        kind="pruner",
        name=cell.folder,
        params={
            "vlm": cell.vlm,
            "layer": cell.layer,
            "loss": cell.loss,
            "slots": list(cell.slots),
            "seed": cell.seed,
            "train.on": cell.on,
            **options,
        },
        metrics=numbers,
        curves=curves(folder / "curves.csv"),
        tags={"pruner": str(metrics.get("fingerprint", ""))},
        datasets=[Dataset.of(name, tokens, "training", tokens["meta"])],
        measured_on=dict.fromkeys(numbers, name),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return command.main("train", __doc__ or "", work, plan, arguments, partial(costs, training=True))


if __name__ == "__main__":
    command.script("pipelines.train")
