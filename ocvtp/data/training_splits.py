"""Training splits of benchmarks, to train pruners on a benchmark's own images: scenes, and official data sets.

Five of the paper's ten benchmarks have one; MMBench, MME, POPE, MMMU and SEED-Bench are for evaluation alone.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ocvtp.data.album import Album
from ocvtp.data.coco import Rejected, TooManyRejects, draw
from ocvtp.data.decoding import BadImage, check_image
from ocvtp.data.overlaps import Fingerprint
from ocvtp.data.question_sets import MAKERS
from ocvtp.data.scenes import PLAIN, Scene, SceneSet, Split, Style, file_name, make_scene, save_scenes
from ocvtp.errors import BadInput, NotAvailable

ROUND = 1_000_000
"""Where a scene allows no question of its benchmark, the one so many places further takes its place."""


@dataclass(frozen=True)
class Official:
    """Where the hub has a benchmark's images, as lmms-eval uses them.

    Attributes:
        hub: the data set.
        training: config (None if there is only one) and split of the training images; None where lmms-eval's data set
            has none.
        evaluation: likewise, of the images that are asked about.
        key: column that names an image, of which several rows may be about; None: each row has one of its own.
    """

    hub: str
    training: tuple[str | None, str] | None
    evaluation: tuple[str | None, str]
    key: str | None


TRAINED_ON: Mapping[str, Official] = {
    "gqa": Official(
        "lmms-lab-encoder/GQA", ("train_balanced_images", "train"), ("testdev_balanced_images", "testdev"), "id"
    ),
    "scienceqa": Official("lmms-lab-encoder/ScienceQA", ("ScienceQA-IMG", "train"), ("ScienceQA-IMG", "test"), None),
    "textvqa": Official("lmms-lab-encoder/textvqa", (None, "train"), (None, "validation"), "image_id"),
    "vqav2": Official("lmms-lab-encoder/VQAv2", None, (None, "validation"), "image_id"),
    "vizwiz": Official("lmms-lab-encoder/VizWiz-VQA", None, (None, "val"), None),
}
"""The benchmarks with a training split."""


# --- Scenes ----------------------------------------------------------------------------------------------------------


def split_of(benchmark: str) -> Split:
    """The split of scenes that stand for a benchmark's training images."""
    return cast(Split, f"{benchmark}-train")


TRAINING_SPLITS: tuple[Split, ...] = ("train", *map(split_of, TRAINED_ON))
"""Of scenes: those of `sample.images`, and of benchmarks of their own."""


def training_scene(scenes: SceneSet, image: str) -> tuple[Split, Scene] | None:
    """The scene that a training image is, by its id in `images.json`, and its split; None if it is none."""
    split, _, number = image.rpartition("-")
    if split not in TRAINING_SPLITS or not number.isdecimal():
        return None
    index = int(number)
    if Path(file_name(split, index)).stem != image:
        return None
    return split, make_scene(scenes.seed, split, index, scenes.style)


def write_training_scenes(
    folder: Path, benchmark: str, count: int, seed: int, *, first: int = 0, style: Style = PLAIN
) -> None:
    """Write `count` scenes, from number `first` on, as `folder/images/*.jpg` and `folder/instances.json` (COCO).

    They are of a split of their own, and each allows a question of the benchmark (of TextVQA: there is a number in it).
    """
    split = split_of(benchmark)
    album, ask = Album(seed, style, 0, split), MAKERS[benchmark]

    def scene(number: int) -> tuple[Scene, bytes]:
        index = number
        while not ask(album, index, np.random.default_rng([seed, index])):
            index += ROUND
        return album.drawn(index)

    save_scenes(folder, map(scene, range(first, first + count)), seed, split, annotations="instances.json")


# --- Official data sets ----------------------------------------------------------------------------------------------


def write_official_images(
    folder: Path,
    benchmark: str,
    count: int,
    seed: int,
    *,
    max_reject_rate: float = 0.001,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `count` training images of the official data set, or all if there are fewer, as `folder/images/*`.

    The draw depends on the seed and the images' names alone.

    Raises:
        NotAvailable: the data set is neither here nor to be had.
        BadInput: its images are not where they should be.
        TooManyRejects: more images than allowed are damaged.
    """
    about = TRAINED_ON[benchmark]
    if about.training is None:
        raise BadInput(f"{about.hub} has no training split: give sample.training.{benchmark} its images")
    data = _load(about.hub, *about.training)
    rows = _distinct(data, about)
    chosen = sorted(rows, key=lambda name: (draw(seed, name), name))
    wanted, rejects, done = min(count, len(chosen)), list[Rejected](), 0
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if done == wanted:
            break
        content = _bytes(data[rows[name]], about.hub)
        try:
            check_image(content, name=name)
        except BadImage as error:
            rejects.append(Rejected(name, name, error.reason))
            if len(rejects) > max_reject_rate * (wanted + len(rejects)):
                raise TooManyRejects(
                    f"{len(rejects)} images drawn from {about.hub} cannot be used, above max_reject_rate "
                    f"{max_reject_rate}; first: image {name}: {error.reason}",
                    tuple(rejects),
                ) from error
            continue
        (folder / "images" / f"{_file_stem(name)}.img").write_bytes(content)
        done += 1
        if progress is not None:
            progress(done, wanted)


def official_fingerprints(benchmark: str) -> Iterator[Fingerprint]:
    """Of the images that the official questions are about."""
    about = TRAINED_ON[benchmark]
    data = _load(about.hub, *about.evaluation)
    for name, row in _distinct(data, about).items():
        yield Fingerprint.of(name, _bytes(data[row], about.hub))


def _load(hub: str, config: str | None, split: str) -> Any:
    """A data set with its images as they are encoded."""
    try:
        from datasets import Image, load_dataset
        from datasets.exceptions import DatasetGenerationError
    except ImportError as error:
        raise NotAvailable(f"{hub} is read by the package datasets: pip install 'ocvtp[eval]'") from error
    try:
        data = load_dataset(hub, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise NotAvailable(f"the data set {hub} ({config or 'default'}, {split}) is not here and cannot be fetched: "
                           f"{error}") from error  # fmt: skip
    except DatasetGenerationError as error:
        raise BadInput(f"{hub} ({config or 'default'}, {split}) cannot be read: {error.__cause__ or error}") from error
    except ValueError as error:
        raise BadInput(f"{hub} has no {config or 'default'} with a split {split}: {error}") from error
    if "image" not in data.column_names:
        raise BadInput(f"{hub} ({config}, {split}) has no column 'image': it has {', '.join(data.column_names)}")
    return data.cast_column("image", Image(decode=False))


def _distinct(data: Any, about: Official) -> dict[str, int]:
    """The first row of each image, by its name."""
    names: Iterable[Any] = range(len(data)) if about.key is None else data[about.key]
    found: dict[str, int] = {}
    for row, name in enumerate(names):
        found.setdefault(str(name), row)
    return found


def _file_stem(name: str) -> str:
    """The name of an image, or a digest where no file can be called so."""
    return name if re.fullmatch(r"\w[\w.-]{0,99}", name) else hashlib.sha256(name.encode()).hexdigest()[:24]


def _bytes(row: Mapping[str, Any], hub: str) -> bytes:
    content: bytes | None = (row["image"] or {}).get("bytes")
    if not content:
        raise BadInput(f"{hub} has a row without an image")
    return content
