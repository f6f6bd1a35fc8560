"""Stage `extract`: tokens of the sampled images, by VLM and layer. Writes `data/tokens/<vlm>/layer_<l>.json`.

Tokens of a benchmark's own training images (`train.on`) are listed beside them, as `layer_<l>-on_<benchmark>.json`.

One pass of a tower makes the tokens of all layers that are missing; each layer is then a result of its own, so that
another layer costs only itself. Tokens stay in the store; the output lists their shards with checksums.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster import ClusterError, CorruptResult, Task, drop, is_published, set_aside
from cluster.driver.plan import fault_of
from cluster.store import verdicts
from cluster.store.publish import About
from ocvtp.tokens.manifest import Shard, ShardManifest, layer_listing
from ocvtp.vlms import CatalogEntry, resolve
from pipelines.grid import token_sets, tokens_listing
from pipelines.params.model import SAMPLED
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.costs import costs, image_bytes
from pipelines.stage.dry_run import Plan
from pipelines.stage.parts import adopt, remember_linked
from pipelines.tasks.tokens import tokens

log = logging.getLogger(__name__)
LAYER = "layer_"
"""A pass has a folder for each layer, named so."""
LARGE = 10**8
"""Bytes of tokens from which on a dry run says how much room they take."""


@dataclass(frozen=True)
class Part:
    """Some images and one VLM: a task for each layer, of which only the place is used, and one for all of them."""

    layers: dict[int, Task]
    whole: Task

    @property
    def missing(self) -> list[int]:
        """Layers that are not published."""
        return [layer for layer, task in self.layers.items() if not is_published(task.out)]


def work(run: Stage) -> None:
    """Extract what is missing, and write the output."""
    parts = _all_parts(run)
    everything = [part for some in parts.values() for part in some]
    run.set_damaged_aside(task.out for part in everything for task in part.layers.values())
    _adopt(run, [(part, part.whole) for part in everything if is_published(part.whole.out)])
    passes = [(part, _pass(run, part, part.missing)) for part in everything if part.missing]
    report = run.run([task for _, task in passes])
    _adopt(run, passes)
    report.raise_if_failed()
    with outputs.folder(run.root / outputs.TOKENS) as folder:
        for (vlm, on), some in parts.items():
            for layer in some[0].layers:
                shards = [_shard(part.layers[layer].out) for part in some]
                outputs.write_json(folder / tokens_listing(vlm, on, layer), layer_listing(shards, run.store.root))


def plan(run: Stage) -> Plan:
    """What it would extract, and what it would publish from passes that are there."""
    tasks, ready, passes, room = list[Task](), set[str](), list[str](), 0
    for (vlm, _), part in ((place, part) for place, some in _all_parts(run).items() for part in some):
        tasks += part.layers.values()
        missing = [layer for layer, task in part.layers.items() if not fault_of(task.out)[1]]
        task = part.whole if fault_of(part.whole.out)[1] else _pass(run, part, missing)
        if missing and fault_of(task.out)[1]:
            ready.update(part.layers[layer].key for layer in missing)
        elif missing:
            passes.append(f"  {task.name}")
            room += len(missing) * len(part.whole.spec["images"]) * image_bytes(resolve(vlm), run.params.extract)
    last = [f"{len(passes)} passes, each over the images from the first one named:"] if passes else []
    last += [*passes, f"{len(ready)} shards are published from passes that are there"] if ready else passes
    last += [f"their tokens take {room / 1e9:.3g} GB of the store"] if room >= LARGE else []
    return Plan(tasks, frozenset(ready), _of_layer, last)


def _of_layer(about: About) -> dict[str, Any]:
    """The spec of a layer, which was published from a pass of several."""
    return {**about.spec, "layers": [int(about.part.removeprefix(LAYER))]} if about.part else about.spec


def _all_parts(run: Stage) -> dict[tuple[str, str], list[Part]]:
    """By VLM, and images as `train.on` names them."""
    wanted: dict[tuple[str, str], list[int]] = {}
    for vlm in run.params.vlm:
        for on, layer in token_sets(run.params, resolve(vlm)):
            wanted.setdefault((vlm, on), []).append(layer)
    return {(vlm, on): _parts(run, resolve(vlm), on, layers) for (vlm, on), layers in wanted.items()}


def _parts(run: Stage, vlm: CatalogEntry, on: str, layers: Sequence[int]) -> list[Part]:
    size, images = run.params.extract.shard_images, run.sampled_images(on)
    label = vlm.name if on == SAMPLED else f"{vlm.name} on {on}"
    return [
        _part(run, vlm, f"{label} {first}", images[first : first + size], layers)
        for first in range(0, len(images), size)
    ]


def _part(run: Stage, vlm: CatalogEntry, label: str, images: Sequence[dict[str, str]], wanted: Sequence[int]) -> Part:
    extract = run.params.extract
    common = {
        "vlm": vlm.name,
        "model": vlm.identity,
        "images": [{"id": image["id"], "sha256": image["sha256"]} for image in images],
        "dtype": extract.dtype,
        "compute_dtype": extract.compute_dtype,
        "preprocessing": extract.preprocessing,
        "batch_size": extract.batch_size,
    }
    inputs = {"images": [image["path"] for image in images]}
    demand = run.params.cluster.resources.extract

    def make(kind: str, layers: list[int]) -> Task:
        name = f"{label}, layer {', '.join(map(str, layers))}"
        return run.task(kind, name, tokens, {**common, "layers": layers}, demand, inputs)

    layers = {layer: make("tokens", [layer]) for layer in wanted}
    return Part(layers, make("passes", sorted(layers)))


def _pass(run: Stage, part: Part, missing: Sequence[int]) -> Task:
    """The task that makes the missing layers."""
    layers = sorted(missing)
    if layers == part.whole.spec["layers"]:
        return part.whole
    name = f"{part.whole.name.split(',')[0]}, layer {', '.join(map(str, layers))}"
    demand = run.params.cluster.resources.extract
    return run.task("passes", name, tokens, {**part.whole.spec, "layers": layers}, demand, part.whole.inputs)


def _adopt(run: Stage, passes: Sequence[tuple[Part, Task]]) -> None:
    """Publish each layer of a pass as a result of its own, then drop the pass: the files are the same."""
    read = {}
    for part, task in passes:
        if not is_published(task.out):
            continue
        for layer in task.spec["layers"]:
            source, out = task.out / f"{LAYER}{layer}", part.layers[layer].out
            if is_published(out):
                continue  # adopted before, by a run that was cut off or that is at work beside this one
            try:
                before = verdicts.marks(source)
                adopt(source, out)  # has read every byte
                read[out] = before
            except (ClusterError, OSError) as error:
                if is_published(out):  # another run adopted and dropped the pass meanwhile
                    continue
                if not isinstance(error, CorruptResult):
                    raise
                log.warning("%s: it is made again", set_aside(task.out) or error)
                break
        else:
            drop(task.out)
    remember_linked(read)


def _shard(folder: Path) -> Shard:
    return folder, ShardManifest.read(folder / "tokens.arrow.json")


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return command.main("extract", __doc__ or "", work, plan, arguments, partial(costs, training=False))


if __name__ == "__main__":
    command.script("pipelines.extract")
