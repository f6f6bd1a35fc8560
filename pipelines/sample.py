"""Stage `sample`: which images train the pruners, and which questions are asked. Writes `data/sample/`.

Images stay in the store; the output lists them with their checksums. Question sets are small and lie in the output.
Training images of benchmarks (`train.on`) are compared with the images that these benchmarks ask about: those that are
there too are left out, and listed.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import Progress

from cluster import Manifest, Task
from ocvtp.data.coco import ImageSample, Rejected, TooManyRejects, select_images
from ocvtp.data.overlaps import DISTANCE
from ocvtp.data.question_sets import BENCHMARKS
from ocvtp.data.training_splits import TRAINED_ON
from ocvtp.errors import BadInput
from pipelines.grid import trained_on
from pipelines.params.model import Demand, Pictures
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.dry_run import Plan
from pipelines.tasks.copies import copies
from pipelines.tasks.overlaps import OVERLAPS, SEEN, overlaps, seen_official, seen_scenes
from pipelines.tasks.questions import questions
from pipelines.tasks.scenes import scenes
from pipelines.tasks.training import benchmark_scenes, official_images

log = logging.getLogger(__name__)
CHUNK = 512
"""Images of a task."""


@dataclass(frozen=True)
class Own:
    """A benchmark's own training images.

    Attributes:
        chunks: tasks that make them.
        seen: the task that looks at the images that are asked about.
        compared: of each chunk, the task that compares it with these.
        rejects: images that cannot be used.
    """

    chunks: list[Task]
    seen: Task
    compared: list[Task]
    rejects: tuple[Rejected, ...] = ()


def work(run: Stage) -> None:
    """Sample, and write the output."""
    selection, chunks, asked = _tasks(run)
    own = _own(run, asked)
    run.run([*chunks, *asked, *(task for one in own.values() for task in one.chunks)]).raise_if_failed()
    if own:
        run.run(list({one.seen.key: one.seen for one in own.values()}.values())).raise_if_failed()
        run.run([task for one in own.values() for task in one.compared]).raise_if_failed()
    rejects = () if selection is None else selection.rejects
    with outputs.folder(run.root / outputs.SAMPLE) as folder:
        images = [image for task in chunks for image in _images(run, task)]
        outputs.write_json(folder / outputs.IMAGES, images)
        outputs.write_json(folder / outputs.TRAINING, {name: _training(run, name, one) for name, one in own.items()})
        outputs.write_text(folder / "rejects.jsonl", _lines(rejects))
        benchmarks = {name: about for task in asked for name, about in _copied(run, task, folder).items()}
        sample = run.params.sample
        about = {"source": sample.source, "seed": sample.seed, "images": len(images), "rejects": len(rejects)}
        style = {"style": sample.style.model_dump()} if sample.source == "scenes" else {}
        outputs.write_json(folder / "sample.json", {**about, **style, "benchmarks": benchmarks})


def plan(run: Stage) -> Plan:
    """What it would run. Of a data set it looks at the images, as `work` does."""
    _, chunks, asked = _tasks(run)
    tasks = [*chunks, *asked]
    for one in _own(run, asked).values():
        tasks += [*one.chunks, *([] if one.seen.key in {task.key for task in tasks} else [one.seen]), *one.compared]
    return Plan(tasks)


# --- Tasks -----------------------------------------------------------------------------------------------------------


def _tasks(run: Stage) -> tuple[ImageSample | None, list[Task], list[Task]]:
    """What was drawn of a data set, tasks that make images, and tasks that make questions."""
    sample = run.params.sample
    if sample.source == "scenes":
        return None, list(_scenes(run)), list(_questions(run))
    pictures = Pictures(annotations=sample.annotations or "", image_folder=sample.image_folder or "")
    selection = _select(run, pictures)
    return selection, list(_copies(run, selection, pictures)), list(_questions(run))


def _scenes(run: Stage) -> Iterator[Task]:
    sample = run.params.sample
    for first in range(0, sample.images, CHUNK):
        count = min(CHUNK, sample.images - first)
        spec = {"seed": sample.seed, "first": first, "count": count, "style": sample.style.model_dump()}
        yield run.task("scenes", f"scenes {first}", scenes, spec, _demand(run))


def _copies(run: Stage, selection: ImageSample, pictures: Pictures) -> Iterator[Task]:
    inputs = {"folder": str(Path(pictures.image_folder).resolve())}
    for first in range(0, len(selection.records), CHUNK):
        records = selection.records[first : first + CHUNK]
        images = [{"id": record.id, "file": record.file, "sha256": record.sha256} for record in records]
        yield run.task("images", f"images {first}", copies, {"images": images}, _demand(run), inputs)


def _questions(run: Stage) -> Iterator[Task]:
    sample = run.params.sample
    if sample.questions:
        spec = {"questions": sample.questions, "seed": sample.seed, "style": sample.style.model_dump()}
        yield run.task("questions", f"{sample.questions} questions a benchmark", questions, spec, _demand(run))


def _own(run: Stage, asked: Sequence[Task]) -> dict[str, Own]:
    """The training images of each benchmark on which pruners are trained."""
    return {name: _own_of(run, name, asked) for name in trained_on(run.params)}


def _own_of(run: Stage, name: str, asked: Sequence[Task]) -> Own:
    """`asked` makes the questions, if they are about scenes."""
    sample, rejects = run.params.sample, tuple[Rejected, ...]()
    if sample.source == "scenes":
        chunks = list(_own_scenes(run, name))
        seen = run.task("seen", "images of questions", seen_scenes, {"questions": asked[0].key}, _demand(run),
                        {"questions": run.in_store(asked[0].out)})  # fmt: skip
    else:
        about = TRAINED_ON[name]
        official: dict[str, Any] = {"benchmark": name, "hub": about.hub}
        spec = {**official, "split": list(about.evaluation)}
        seen = run.task("seen", f"images of {name}'s questions", seen_official, spec, _demand(run))
        if name in sample.training:
            selection = _select(run, sample.training[name], name)
            chunks, rejects = list(_copies(run, selection, sample.training[name])), selection.rejects
        else:
            drawn = {"images": sample.images, "seed": sample.seed, "max_reject_rate": sample.max_reject_rate}
            spec = {**official, "split": list(about.training or ()), **drawn}
            chunks = [run.task("training", f"{name}'s training images", official_images, spec, _demand(run))]
    return Own(chunks, seen, [_compared(run, name, chunk, seen) for chunk in chunks], rejects)


def _own_scenes(run: Stage, name: str) -> Iterator[Task]:
    sample = run.params.sample
    for first in range(0, sample.images, CHUNK):
        count = min(CHUNK, sample.images - first)
        spec = {
            "benchmark": name, "seed": sample.seed, "first": first, "count": count, "style": sample.style.model_dump(),
        }  # fmt: skip
        yield run.task("training", f"{name}'s scenes {first}", benchmark_scenes, spec, _demand(run))


def _compared(run: Stage, name: str, chunk: Task, seen: Task) -> Task:
    spec = {"images": chunk.key, "seen": seen.key}
    inputs = {"images": run.in_store(chunk.out), "seen": run.in_store(seen.out)}
    return run.task("overlaps", f"{name}: {chunk.name} among its questions", overlaps, spec, _demand(run), inputs)


def _demand(run: Stage) -> Demand:
    return run.params.cluster.resources.sample


# --- A data set in COCO's format -------------------------------------------------------------------------------------


def _select(run: Stage, pictures: Pictures, benchmark: str | None = None) -> ImageSample:
    """Draw images and decode each; too many damaged ones are listed in a file and end the stage.

    Of a benchmark's training split all, where there are fewer.
    """
    sample = run.params.sample
    with Progress(console=Console(stderr=True), transient=True) as progress:
        of = "" if benchmark is None else f" of {benchmark}"
        bar = progress.add_task(f"sample: looking at images{of}", total=sample.images)
        try:
            return select_images(
                pictures.annotations,
                pictures.image_folder,
                sample.images,
                sample.seed,
                at_most=benchmark is not None,
                max_reject_rate=sample.max_reject_rate,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        except TooManyRejects as error:
            if run.dry:
                raise BadInput(str(error)) from error
            path = run.store.logs / "rejects.jsonl"
            outputs.write_text(path, _lines(error.rejects))
            raise BadInput(f"{error}; all {len(error.rejects)} are listed in {path}") from error


def _lines(rejects: tuple[Rejected, ...]) -> str:
    return "".join(json.dumps(line) + "\n" for line in map(_line, rejects))


def _line(reject: Rejected) -> dict[str, str]:
    return {"id": reject.id, "file": reject.file, "reason": reject.reason}


# --- Output ----------------------------------------------------------------------------------------------------------


def _images(run: Stage, task: Task) -> Iterator[dict[str, str]]:
    """The images of a task in the order in which they were drawn."""
    files = {file.path: file.sha256 for file in Manifest.read(task.out).files}
    if "images" in task.spec:
        named = [(image["id"], f"images/{image['file']}") for image in task.spec["images"]]
    else:
        named = [(Path(path).stem, path) for path in sorted(files) if path.startswith("images/")]
    for name, path in named:
        yield {"id": name, "path": run.in_store(task.out / path), "sha256": files[path]}


def _training(run: Stage, name: str, own: Own) -> dict[str, Any]:
    """A benchmark's own training images without those that it asks about, which are listed apart."""
    kept, left_out, total = list[dict[str, str]](), list[dict[str, Any]](), 0
    for chunk, compared in zip(own.chunks, own.compared, strict=True):
        found = json.loads((compared.out / OVERLAPS).read_bytes())
        twice = {one["image"] for one in found}
        images = list(_images(run, chunk))
        kept += [image for image in images if image["path"].removeprefix(f"{run.in_store(chunk.out)}/") not in twice]
        left_out += found
        total += len(images)
    same = sum(one["by"] == "sha256" for one in left_out)
    log.info(
        "%s: of %d training images %d are left out, which it asks about (%d the same file, %d by pHash within %d bits)",
        name, total, len(left_out), same, len(left_out) - same, DISTANCE,
    )  # fmt: skip
    if not kept:
        raise BadInput(f"train.on: of {name}'s {total} training images none is left: it asks about all of them")
    return {
        "images": kept,
        "drawn": total,
        "asked_about": len(json.loads((own.seen.out / SEEN).read_bytes())),
        "left_out": {"sha256": same, "phash": len(left_out) - same, "distance": DISTANCE, "images": left_out},
        "rejects": [_line(reject) for reject in own.rejects],
        "results": [run.in_store(task.out) for task in (*own.chunks, own.seen, *own.compared)],
    }


def _copied(run: Stage, task: Task, folder: Path) -> dict[str, Any]:
    """Copy the question sets; returns of each benchmark where the store has it, its checksum and size."""
    import pyarrow.parquet as pq

    manifest = outputs.copy_published(task.out, folder / "benchmarks")
    sums = {file.path: file.sha256 for file in manifest.files}
    return {
        name: {
            "path": run.in_store(task.out / f"{name}.parquet"),
            "sha256": sums[f"{name}.parquet"],
            "questions": pq.read_metadata(folder / "benchmarks" / f"{name}.parquet").num_rows,
        }
        for name in BENCHMARKS
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return command.main("sample", __doc__ or "", work, plan, arguments)


if __name__ == "__main__":
    command.script("pipelines.sample")
