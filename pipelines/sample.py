"""Stage `sample`: which images train the pruners, and which questions are asked. Writes `data/sample/`.

Images stay in the store; the output lists them with their checksums. Question sets are small and lie in the output.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import Progress

from cluster import Manifest, Task
from ocvtp.data.coco import ImageSample, Rejected, TooManyRejects, select_images
from ocvtp.data.question_sets import BENCHMARKS
from ocvtp.errors import BadInput
from pipelines.params.model import Demand
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.dry_run import Plan
from pipelines.tasks.copies import copies
from pipelines.tasks.questions import questions
from pipelines.tasks.scenes import scenes

CHUNK = 512
"""Images of a task."""


def work(run: Stage) -> None:
    """Sample, and write the output."""
    selection, chunks, asked = _tasks(run)
    run.run([*chunks, *asked]).raise_if_failed()
    rejects = () if selection is None else selection.rejects
    with outputs.folder(run.root / outputs.SAMPLE) as folder:
        images = [image for task in chunks for image in _images(run, task)]
        outputs.write_json(folder / "images.json", images)
        outputs.write_text(folder / "rejects.jsonl", _lines(rejects))
        benchmarks = {name: about for task in asked for name, about in _copied(run, task, folder).items()}
        sample = run.params.sample
        about = {"source": sample.source, "seed": sample.seed, "images": len(images), "rejects": len(rejects)}
        style = {"style": sample.style.model_dump()} if sample.source == "scenes" else {}
        outputs.write_json(folder / "sample.json", {**about, **style, "benchmarks": benchmarks})


def plan(run: Stage) -> Plan:
    """What it would run. Of a data set it looks at the images, as `work` does."""
    _, chunks, asked = _tasks(run)
    return Plan([*chunks, *asked])


# --- Tasks -----------------------------------------------------------------------------------------------------------


def _tasks(run: Stage) -> tuple[ImageSample | None, list[Task], list[Task]]:
    """What was drawn of a data set, tasks that make images, and tasks that make questions."""
    selection = _select(run) if run.params.sample.source == "coco" else None
    return selection, list(_scenes(run) if selection is None else _copies(run, selection)), list(_questions(run))


def _scenes(run: Stage) -> Iterator[Task]:
    sample = run.params.sample
    for first in range(0, sample.images, CHUNK):
        count = min(CHUNK, sample.images - first)
        spec = {"seed": sample.seed, "first": first, "count": count, "style": sample.style.model_dump()}
        yield run.task("scenes", f"scenes {first}", scenes, spec, _demand(run))


def _copies(run: Stage, selection: ImageSample) -> Iterator[Task]:
    inputs = {"folder": str(Path(run.params.sample.image_folder or "").resolve())}
    for first in range(0, len(selection.records), CHUNK):
        records = selection.records[first : first + CHUNK]
        images = [{"id": record.id, "file": record.file, "sha256": record.sha256} for record in records]
        yield run.task("images", f"images {first}", copies, {"images": images}, _demand(run), inputs)


def _questions(run: Stage) -> Iterator[Task]:
    sample = run.params.sample
    if sample.questions:
        spec = {"questions": sample.questions, "seed": sample.seed, "style": sample.style.model_dump()}
        yield run.task("questions", f"{sample.questions} questions a benchmark", questions, spec, _demand(run))


def _demand(run: Stage) -> Demand:
    return run.params.cluster.resources.sample


# --- A data set in COCO's format -------------------------------------------------------------------------------------


def _select(run: Stage) -> ImageSample:
    """Draw images and decode each; too many damaged ones are listed in a file and end the stage."""
    sample = run.params.sample
    annotations, folder = Path(sample.annotations or ""), Path(sample.image_folder or "")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("sample: looking at images", total=sample.images)
        try:
            return select_images(
                annotations,
                folder,
                sample.images,
                sample.seed,
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
    return "".join(json.dumps({"id": r.id, "file": r.file, "reason": r.reason}) + "\n" for r in rejects)


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
