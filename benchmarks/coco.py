"""COCO at full size: sampling from an annotation file of train2017's size, and what 40,000 images then take.

    python benchmarks/coco.py                   # about five minutes on two cores, 1.2 GB of disk while it runs
    python benchmarks/coco.py --images 40000    # so many images are really decoded and copied
    python benchmarks/coco.py --quick           # a small file, to see that it runs

The file is generated: 118,287 images and 860,001 annotations with polygons of COCO's lengths. Pictures are 640 x 480
pixels; the same few stand under the names of all that are drawn. Each part runs in a process of its own; its memory is
the most that this and its workers had at once, looked at twenty times a second. Needs psutil beside the pipeline.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import psutil
import yaml
from machine import add_output, heading, machine, say
from PIL import Image

from ocvtp.data.coco import CocoImages, select_images
from ocvtp.data.scenes import Style, make_scene

IMAGES, ANNOTATIONS = 118_287, 860_001
"""Of instances_train2017.json, which has 449 MB."""
COORDINATES = (14, 78)
"""Least and most numbers of a polygon here: 46 in the mean, as in COCO."""
PLANNED = 40_000
"""Images of the paper's pruners."""
PICTURES = 16
SIZE = (640, 480)


def write_annotations(path: Path, images: int, annotations: int) -> None:
    """An instances file as COCO writes it, with `annotations` spread over `images`."""
    draw = random.Random(0)  # noqa: S311 - no secret
    polygons = []
    for _ in range(997):
        count = 2 * draw.randrange(COORDINATES[0] // 2, COORDINATES[1] // 2)
        polygons.append(",".join(f"{draw.uniform(0, 640):.2f}" for _ in range(count)))
    ids = [7 + 5 * index - index % 3 for index in range(images)]
    with path.open("w") as file:
        file.write('{"info":{"description":"generated"},"licenses":[{"id":1,"name":"x"}],"images":[')
        for index, image in enumerate(ids):
            file.write(
                f'{"," if index else ""}{{"license":{1 + index % 8},"file_name":"{image:012d}.jpg","coco_url":'
                f'"http://images.cocodataset.org/train2017/{image:012d}.jpg","height":{SIZE[1]},"width":{SIZE[0]},'
                f'"date_captured":"2013-11-14 11:18:45","flickr_url":'
                f'"http://farm9.staticflickr.com/8186/{image:010d}_cbb_z.jpg","id":{image}}}'
            )
        file.write('],"annotations":[')
        for index in range(annotations):
            file.write(
                f'{"," if index else ""}{{"segmentation":[[{polygons[index % len(polygons)]}]],"area":'
                f'{702.1 + index % 1000},"iscrowd":0,"image_id":{ids[index * 7919 % images]},"bbox":[473.07,395.93,'
                f'38.65,28.67],"category_id":{1 + index % 90},"id":{156 + 3 * index}}}'
            )
        file.write('],"categories":[{"supercategory":"person","id":1,"name":"person"}]}')


def write_pictures(folder: Path, names: list[str]) -> int:
    """Pictures of COCO's size under these names, as links to a few files; returns their mean size in bytes."""
    folder.mkdir()
    files = []
    for index in range(min(PICTURES, len(names))):
        scene = make_scene(0, "train", index, Style(background="natural", sides=(480, 480), clutter=20))
        path = folder.with_name(f"picture-{index}.jpg")
        Image.fromarray(scene.pixels_HW3).resize(SIZE).save(path, "JPEG", quality=90)
        files.append(path)
    for index, name in enumerate(names):
        os.link(files[index % len(files)], folder / name)
    return sum(path.stat().st_size for path in files) // len(files)


# --- Parts, each in a process of its own -----------------------------------------------------------------------------


def part_load(place: Path, _: int) -> dict[str, Any]:
    found = CocoImages.load(place / "instances.json")
    return {"images": len(found), "first": [image.file for image in found.order(0)[:40_000]]}


def part_select(place: Path, images: int) -> dict[str, Any]:
    found = select_images(place / "instances.json", place / "train2017", images, 0)
    return {"images": len(found.records), "rejects": len(found.rejects)}


def part_plan(place: Path, images: int) -> dict[str, Any]:
    """The dry run of stage extract for a VLM with the shapes of LLaVA-1.5-7B, whose weights are not looked at."""
    from safetensors.torch import save_file
    from transformers import LlavaConfig

    from pipelines import extract

    vlm, root = place / "llava-shapes", place / "plan"
    config = LlavaConfig()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(vlm)
    save_file({}, vlm / "model.safetensors")
    sample = root / "data/sample"
    sample.mkdir(parents=True)
    listed = [{"id": f"{n:012d}", "path": f"images/x/images/{n}.jpg", "sha256": f"{n:064x}"} for n in range(images)]
    (sample / "images.json").write_text(json.dumps(listed))
    (sample / "training.json").write_text("{}")
    about = {"source": "coco", "images": images, "questions": 0, "annotations": "x.json", "image_folder": "x"}
    params = {"vlm": str(vlm), "layer": 9, "sample": about, "evaluate": {"data": "official"}, "benchmark": ["pope"],
              "method": ["vanilla", "oc-vtp"], "keep": 64}  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    os.environ["OCVTP_ROOT"] = str(root)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert extract.main(["--params", str(root / "params.yaml"), "--dry-run"]) == 0
    (room,) = [line for line in said.getvalue().splitlines() if "their tokens take" in line]
    return {"images": images, "room": room.removeprefix("their tokens take "), "said": said.getvalue().splitlines()[:2]}


def part_stage(place: Path, images: int) -> dict[str, Any]:
    from pipelines import sample

    about = {"source": "coco", "images": images, "questions": 0, "annotations": str(place / "instances.json"),
             "image_folder": str(place / "train2017")}  # fmt: skip
    params = {"sample": about, "evaluate": {"data": "official"}, "benchmark": ["pope"], "mlflow": {"enabled": False}}
    (place / "params.yaml").write_text(yaml.safe_dump(params))
    os.environ["OCVTP_ROOT"] = str(place / "work")
    (place / "work").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        assert sample.main(["--params", str(place / "params.yaml")]) == 0
    return {"images": len(json.loads((place / "work/data/sample/images.json").read_bytes()))}


PARTS = {"load": part_load, "select": part_select, "stage": part_stage, "plan": part_plan}


def in_process(name: str, place: Path, images: int) -> dict[str, Any]:
    """Result, seconds and peak memory of a part."""
    command = [sys.executable, __file__, "--part", name, "--place", str(place), "--images", str(images)]
    peak = 0
    with subprocess.Popen(command) as part:
        while part.poll() is None:
            peak = max(peak, _resident(part.pid))
            time.sleep(0.05)
    if part.returncode:
        raise SystemExit(f"part {name} failed with exit code {part.returncode}")
    found: dict[str, Any] = json.loads((place / f"{name}.json").read_bytes())
    return {**found, "peak_bytes": peak}


def _resident(pid: int) -> int:
    """Bytes of a process and of those that it started, what they share counted for each."""
    found = 0
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(pid)
        for one in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found += one.memory_info().rss
    return found


def run_part(name: str, place: Path, images: int) -> None:
    logging.disable(logging.INFO)
    start, before = time.perf_counter(), time.process_time()
    found = PARTS[name](place, images)
    seconds, own = time.perf_counter() - start, time.process_time() - before
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own + children.ru_utime + children.ru_stime
    (place / f"{name}.json").write_text(json.dumps({**found, "seconds": seconds, "cpu_seconds": cpu}))


def measure(images: int, listed: int, annotations: int, planned: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_annotations(place / "instances.json", listed, annotations)
        load = in_process("load", place, images)
        names = load.pop("first")[:images]
        size = write_pictures(place / "train2017", names)
        found = {
            "file_bytes": (place / "instances.json").stat().st_size, "listed": listed, "annotations": annotations,
            "drawn": images, "picture_bytes": size, "load": load,
        }  # fmt: skip
        for name, count in (("select", images), ("stage", images), ("plan", planned)):
            found[name] = in_process(name, place, count)
            assert found[name]["images"] == count
        return found


def table(found: dict[str, Any]) -> str:
    lines = [heading(found["machine"]), ""]
    size, each = found["file_bytes"] / 1e6, found["picture_bytes"] / 1e3
    lines.append(f"{found['listed']:,} images, {found['annotations']:,} annotations, {size:.0f} MB")
    lines.append(f"{found['drawn']:,} drawn, {each:.0f} kB each")
    for name, what in (
        ("load", "read, check and order the file"),
        ("select", "the same, and decode the images drawn"),
        ("stage", "stage sample: the same, and copy them to the store"),
        ("plan", f"dry run of stage extract for {found['plan']['images']:,} images"),
    ):
        row = found[name]
        lines.append(
            f"{what:<52} {row['seconds']:7.1f} s  {row['cpu_seconds']:7.1f} s of CPU  {row['peak_bytes'] / 1e9:5.2f} GB"
        )
    lines.append(f"tokens of a layer of {found['plan']['images']:,} images (LLaVA-1.5): {found['plan']['room']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--images", type=int, default=2048, help="to draw, decode and copy (default: 2048)")
    parser.add_argument("--quick", action="store_true", help="a small file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.place, arguments.images)
        return
    sizes = (64, 500, 2000, 1000) if arguments.quick else (arguments.images, IMAGES, ANNOTATIONS, PLANNED)
    say({**measure(*sizes), "machine": machine()}, table, arguments)


if __name__ == "__main__":
    main()
