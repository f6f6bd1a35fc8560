"""Images of a COCO annotation file: read with suspicion, drawn with a seed, checked one by one.

The choice depends on the seed and the image ids alone: neither on the order in the file nor on any folder listing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocvtp.data.decoding import BadImage, UnsafePath, check_image, check_name, read_image_file, safe_join
from ocvtp.errors import BadInput

_SHOWN = 5
"""Problems of an annotation file that a message spells out; the others are counted."""


@dataclass(frozen=True, order=True)
class CocoImage:
    """One entry of `images`: its id as text, and its file relative to the image folder."""

    id: str
    file: str


@dataclass(frozen=True)
class Accepted:
    """A sound image: `sha256` is that of its file."""

    id: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be used, and why."""

    id: str
    file: str
    reason: str


@dataclass(frozen=True)
class ImageSample:
    """Sound images in the order in which they were drawn, and the rejected ones among them."""

    records: tuple[Accepted, ...]
    rejects: tuple[Rejected, ...]


class TooManyRejects(BadInput):
    """More images were rejected than allowed. `rejects` lists them."""

    def __init__(self, message: str, rejects: tuple[Rejected, ...]) -> None:
        super().__init__(message)
        self.rejects = rejects


@dataclass(frozen=True)
class CocoImages:
    """The images of an annotation file. `source` is the file, for messages."""

    source: Path
    images: tuple[CocoImage, ...]

    @classmethod
    def load(cls, path: Path | str) -> "CocoImages":
        """Read and check an annotation file (`instances_*.json`, `captions_*.json`, `image_info_*.json`).

        Raises:
            BadInput: not there, not JSON, not COCO, missing keys, wrong types, ids or files that occur twice, file
                names that leave the image folder, annotations of images that are not there. One message names the
                file, the places in it, and how many problems there are.
        """
        path = Path(path)
        data = _read_json(path)
        problems = _Problems(path)
        images = tuple(_images(data, problems))
        _check_annotations(data, {image.id for image in images}, problems)
        problems.raise_if_any()
        return cls(path, images)

    def __len__(self) -> int:
        return len(self.images)

    def order(self, seed: int) -> list[CocoImage]:
        """All images in the seed's order."""
        return sorted(self.images, key=lambda image: (draw(seed, image.id), image.id))

    def sample(self, n: int, seed: int) -> list[CocoImage]:
        """The first `n` images in the seed's order; a smaller sample is the beginning of a larger one.

        Raises:
            BadInput: `n` is not positive or there are fewer images.
        """
        if n < 1:
            raise BadInput(f"{n} images asked for: at least one is needed")
        if n > len(self.images):
            raise BadInput(f"{self.source} lists {len(self.images)} images, fewer than the {n} asked for")
        return self.order(seed)[:n]


def check_images(images: Iterable[CocoImage], folder: Path | str, *, workers: int = 1) -> Iterator[Accepted | Rejected]:
    """Decode each image completely and yield the verdict, in the order given.

    Args:
        images: what to check.
        folder: where their files lie.
        workers: threads; PIL decodes outside of Python's lock.

    Raises:
        UnsafePath: a file name leads out of the folder; that file is not opened.
    """
    if workers < 2:
        yield from (_check(image, folder) for image in images)
        return
    with ThreadPoolExecutor(workers) as executor:
        yield from executor.map(lambda image: _check(image, folder), images)


def select_images(
    annotations: Path | str,
    folder: Path | str,
    n: int,
    seed: int,
    *,
    at_most: bool = False,
    max_reject_rate: float = 0.001,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSample:
    """Draw `n` sound images; each rejected one is replaced by the next in the seed's order.

    Args:
        annotations: COCO annotation file.
        folder: where its images lie.
        n: how many images.
        seed: of the draw.
        at_most: take all there are where there are fewer.
        max_reject_rate: the largest tolerable share of rejected ones among all that were looked at.
        workers: threads that decode; by default one a core, at most 8.
        progress: called with (sound images found, n).

    Raises:
        TooManyRejects: above `max_reject_rate`; carries the rejects, all that are among the first `n` drawn.
        BadInput: the annotation file is wrong, has too few images, or the folder is missing.
        UnsafePath: a drawn file name leads out of the folder; checked before any image is opened.
    """
    if not 0 <= max_reject_rate < 1:
        raise BadInput(f"max_reject_rate is {max_reject_rate}: a share from 0 to below 1 is needed")
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"image folder {folder} is not a folder")
    coco = CocoImages.load(annotations)
    if at_most:
        n = min(n, len(coco))
    coco.sample(n, seed)  # are there enough?
    order = coco.order(seed)
    for image in order[:n]:
        safe_join(folder, image.file)
    workers = workers or min(8, os.cpu_count() or 1)
    records: list[Accepted] = []
    rejects: list[Rejected] = []
    looked = 0
    while len(records) < n:
        batch = order[looked : looked + n - len(records)]
        if not batch and at_most:
            break
        if not batch:
            raise TooManyRejects(
                f"{coco.source}: {len(records)} of its {len(order)} images in {folder} are sound, fewer than the"
                f" {n} asked for; first reject: {_describe(rejects)}",
                tuple(rejects),
            )
        looked += len(batch)
        for verdict in check_images(batch, folder, workers=workers):
            if isinstance(verdict, Accepted):
                records.append(verdict)
            else:
                rejects.append(verdict)
            if progress is not None:
                progress(len(records), n)
        # n sound ones and these rejects is the least that will have been looked at in the end.
        if len(rejects) > max_reject_rate * (n + len(rejects)):
            raise TooManyRejects(
                f"{len(rejects)} of the first {looked} images drawn from {coco.source} in {folder} cannot be used,"
                f" above max_reject_rate {max_reject_rate}; first: {_describe(rejects)}",
                tuple(rejects),
            )
    return ImageSample(tuple(records), tuple(rejects))


def _describe(rejects: list[Rejected]) -> str:
    return f"image {rejects[0].id} ({rejects[0].file}): {rejects[0].reason}"


def _check(image: CocoImage, folder: Path | str) -> Accepted | Rejected:
    path = safe_join(folder, image.file)
    try:
        data = read_image_file(path)
        check_image(data, name=image.file)
    except BadImage as error:
        return Rejected(image.id, image.file, error.reason)
    return Accepted(image.id, image.file, hashlib.sha256(data).hexdigest())


def draw(seed: int, image_id: str) -> bytes:
    """By which images are sorted to be drawn."""
    return hashlib.sha256(f"ocvtp sample {seed} {image_id}".encode()).digest()


# --- the annotation file --------------------------------------------------------------------------------------------


class _Problems:
    """What is wrong in one file, for one message."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.first = path, 0, list[str]()

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where} {what}")

    def raise_if_any(self) -> None:
        if self.count:
            rest = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
            noun = "problem" if self.count == 1 else "problems"
            raise BadInput(f"{self.path} has {self.count} {noun}: {'; '.join(self.first)}{rest}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes(), object_hook=_without_outline)
    except FileNotFoundError as error:
        raise BadInput(f"annotation file {path} is not there") from error
    except OSError as error:
        raise BadInput(f"annotation file {path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path} is not JSON, or was cut off: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path} is not COCO: it holds {_kind(data)}, an object with 'images' is needed")
    if "images" not in data:
        keys = ", ".join(sorted(data)[:8]) or "none"
        raise BadInput(f"{path} is not COCO: it has no 'images' (its keys: {keys})")
    return data


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """An object of the file less what makes nine tenths of it and is not looked at."""
    entry.pop("segmentation", None)
    return entry


def _images(data: dict[str, Any], problems: _Problems) -> Iterator[CocoImage]:
    entries = data["images"]
    if not isinstance(entries, list) or not entries:
        problems.add("images", f"is {_kind(entries)}: a list of at least one image is needed")
        return
    ids: dict[str, int] = {}
    files: dict[str, int] = {}
    for index, entry in enumerate(entries):
        where = f"images[{index}]"
        identity, file = _field(entry, "id", where, problems), _field(entry, "file_name", where, problems)
        for seen, value, key in ((ids, identity, "id"), (files, file, "file_name")):
            if value is not None and seen.setdefault(value, index) != index:
                problems.add(f"{where}.{key}", f"is {value!r}, as is that of images[{seen[value]}]")
        if file is not None:
            try:
                check_name(file)
            except UnsafePath as error:
                problems.add(f"{where}.file_name", f"is unsafe: {error}")
        if identity is not None and file is not None:
            yield CocoImage(identity, file)


def _field(entry: object, key: str, where: str, problems: _Problems) -> str | None:
    """The value as text; numbers are legal ids, file names are always text."""
    if not isinstance(entry, dict):
        if key == "id":  # once an entry is enough
            problems.add(where, f"is {_kind(entry)}: an object with id and file_name is needed")
        return None
    if key not in entry:
        problems.add(f"{where}.{key}", "is missing")
        return None
    value = entry[key]
    if isinstance(value, str) and value:
        try:
            value.encode()
        except UnicodeEncodeError:
            problems.add(f"{where}.{key}", f"is {value!r}: half a character")
            return None
        return value
    if key == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    wanted = "a whole number or text" if key == "id" else "text"
    problems.add(f"{where}.{key}", f"is {_kind(value)}: {wanted} is needed")
    return None


def _check_annotations(data: dict[str, Any], images: set[str], problems: _Problems) -> None:
    """Lists without annotations (`image_info_*.json`) are fine: images are all that is drawn here."""
    entries = data.get("annotations", [])
    if not isinstance(entries, list):
        problems.add("annotations", f"is {_kind(entries)}: a list is needed")
        return
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        where = f"annotations[{index}]"
        if not isinstance(entry, dict):
            problems.add(where, f"is {_kind(entry)}: an object is needed")
        elif "image_id" not in entry:
            problems.add(f"{where}.image_id", "is missing")
        elif str(entry["image_id"]) not in images:
            problems.add(f"{where}.image_id", f"is {entry['image_id']!r}: there is no such image")
        elif "id" in entry and seen.setdefault(str(entry["id"]), index) != index:
            problems.add(f"{where}.id", f"is {entry['id']!r}, as is that of annotations[{seen[str(entry['id'])]}]")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" if value else "empty text"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"
