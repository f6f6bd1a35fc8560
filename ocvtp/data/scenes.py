"""Synthetic scenes in COCO format: small pictures of which everything is known.

A scene is 96 x 96 pixels, or of any size that its style allows: two to six coloured shapes, about half of them small
(8 to 11 pixels wide, so one to two patches of a tower with 8-pixel patches in area), often a digit drawn as text, on an
uneven, noisy background.
Every scene is a pure function of (seed, split, index, style), so splits never share a scene and a scene does not
depend on how many others are made.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ocvtp.data.masks import Mask, encode_mask
from ocvtp.errors import BadInput

SIZE = 96
"""Width and height of a scene in pixels, unless its style has others."""
STEP = 16
"""Pixels by which sides differ where scenes have different sizes."""
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 185),
    "orange": (245, 135, 25),
    "cyan": (60, 205, 220),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIGITS = tuple("0123456789")
CATEGORIES = (*SHAPES, "digit")
"""COCO category ids are the positions in this tuple plus one."""

Split = Literal[
    "train", "benchmark", "vlm", "vlm-validation",
    "gqa-train", "scienceqa-train", "textvqa-train", "vqav2-train", "vizwiz-train",
]  # fmt: skip
"""`train` is for pruners, `benchmark` for questions, `vlm` and `vlm-validation` for making tiny VLMs; the others for
pruners that are trained on a benchmark's own images."""
SizeName = Literal["small", "medium", "large"]
_WIDTHS: dict[SizeName, tuple[int, int]] = {"small": (8, 11), "medium": (14, 22), "large": (26, 36)}
_LARGER = {"medium": 0.6, "large": 0.4}  # of the shapes that are not small
_DIGIT_SHARE = 0.6
_OVERSAMPLING = 4
MIN_SIDE = 4 * STEP
"""Pixels below which large objects would leave no room for others."""

BackgroundName = Literal["soft", "textured", "natural"]


@dataclass(frozen=True)
class Style:
    """What scenes look like beside what is asked about them.

    Objects do not move with background or clutter: the same scene in another style has the same answers.

    Attributes:
        small_share: share of shapes that are small.
        background: `soft` (grey, with soft spots), `textured` (stripes of one direction and pitch over it), or
            `natural` (noise of the spectrum 1 / f in each colour, as photographs have).
        clutter: patches of dull colours and ragged outlines that are no objects and that no question asks about.
        sides: the shortest and the longest side in pixels; width and height are drawn apart, in steps of 16. Objects
            have as many pixels in scenes of any size.
    """

    small_share: float = 0.45
    background: BackgroundName = "soft"
    clutter: int = 0
    sides: tuple[int, int] = (SIZE, SIZE)

    def __post_init__(self) -> None:
        if not 0 <= self.small_share <= 1:
            raise BadInput(f"small_share is {self.small_share}: a share, 0 to 1, is needed")
        if self.background not in get_args(BackgroundName):
            raise BadInput(f"background is {self.background!r}: one of {', '.join(get_args(BackgroundName))} is needed")
        if self.clutter < 0:
            raise BadInput(f"clutter is {self.clutter}: it counts patches")
        object.__setattr__(self, "sides", tuple(self.sides))  # JSON knows lists only
        if len(self.sides) != 2 or not MIN_SIDE <= self.sides[0] <= self.sides[1] or any(s % STEP for s in self.sides):
            raise BadInput(
                f"sides are {list(self.sides)}: the shortest and the longest, each a multiple of {STEP} from "
                f"{MIN_SIDE} on, are needed"
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of small, medium and large shapes."""
        return self.small_share, *((1 - self.small_share) * _LARGER[name] for name in ("medium", "large"))  # type: ignore[return-value]


PLAIN = Style()


@dataclass(frozen=True)
class SceneSet:
    """All splits of one seed and style."""

    seed: int
    style: Style = PLAIN

    @classmethod
    def of_sample(cls, about: Mapping[str, Any]) -> "SceneSet | None":
        """Which scenes `sample.json` of stage `sample` is about; None if the images are something else."""
        return cls(about["seed"], Style(**about["style"])) if about["source"] == "scenes" else None

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        return {"seed": self.seed, "style": {**asdict(self.style), "sides": list(self.style.sides)}}


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        category: one of `CATEGORIES`.
        color: a name from `COLORS`; `""` for a digit, which is black or white.
        text: the digit as text; `""` for a shape.
        size: small, medium or large.
        mask_HW: the pixels that it covers by at least half.
    """

    category: str
    color: str
    text: str
    size: SizeName
    mask_HW: Mask

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x, y, width and height in pixels: the tightest box around the mask."""
        ys, xs = np.nonzero(self.mask_HW)
        return int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.mask_HW.sum())


@dataclass(frozen=True)
class Scene:
    """A picture, RGB [H, W, 3] of uint8, and all that is in it. `index` is its place in its split."""

    index: int
    pixels_HW3: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    @property
    def height(self) -> int:
        """Pixels."""
        return len(self.pixels_HW3)

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.pixels_HW3.shape[1])

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        """The objects that are coloured shapes."""
        return tuple(o for o in self.objects if o.category != "digit")

    @property
    def digit(self) -> str | None:
        """The digit in the scene, if there is one."""
        return next((o.text for o in self.objects if o.category == "digit"), None)


def make_scene(seed: int, split: Split, index: int, style: Style = PLAIN) -> Scene:
    """The scene number `index` of a split."""
    numbers = [seed, get_args(Split).index(split), index]
    rng, style_rng = np.random.default_rng(numbers), np.random.default_rng([*numbers, 1])
    shape = _extent(np.random.default_rng([*numbers, 2]), style.sides)
    canvas_HW3 = _background(rng, shape) + _texture(style_rng, style.background, shape)
    taken_HW = np.zeros(shape, bool)
    objects: list[SceneObject] = []
    if rng.random() < _DIGIT_SHARE:
        _place(rng, canvas_HW3, taken_HW, objects, "digit", "medium")
    for _ in range(int(rng.integers(2, 7))):
        size = get_args(SizeName)[int(rng.choice(3, p=style.shares))]
        _place(rng, canvas_HW3, taken_HW, objects, str(rng.choice(SHAPES)), size)
    for _ in range(style.clutter):
        _litter(style_rng, canvas_HW3, taken_HW)
    canvas_HW3 += rng.normal(0, 5, canvas_HW3.shape)
    return Scene(index, np.clip(canvas_HW3, 0, 255).astype(np.uint8), tuple(objects))


def make_scenes(seed: int, split: Split, count: int, style: Style = PLAIN) -> Iterator[Scene]:
    """The first `count` scenes of a split."""
    return (make_scene(seed, split, index, style) for index in range(count))


def _extent(rng: np.random.Generator, sides: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a scene."""
    height, width = STEP * rng.integers(sides[0] // STEP, sides[1] // STEP, 2, endpoint=True)
    return int(height), int(width)


def _background(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Grey, tilted from one side to another, with a few soft spots."""
    y_HW, x_HW = np.mgrid[0 : shape[0], 0 : shape[1]]
    y_HW, x_HW = y_HW / shape[0], x_HW / shape[1]
    angle = rng.uniform(0, 2 * np.pi)
    light_HW = rng.uniform(70, 170) + rng.uniform(10, 50) * (np.cos(angle) * x_HW + np.sin(angle) * y_HW)
    for _ in range(3):
        (cy, cx), radius = rng.uniform(0, 1, 2), rng.uniform(0.08, 0.3)
        light_HW += rng.uniform(-25, 25) * np.exp(-((y_HW - cy) ** 2 + (x_HW - cx) ** 2) / (2 * radius**2))
    tint_3 = rng.uniform(-10, 10, 3)
    return np.asarray(light_HW[..., None] + tint_3, np.float64)


def _texture(rng: np.random.Generator, name: BackgroundName, shape: tuple[int, int]) -> NDArray[np.float64]:
    """What a style adds to the background, [H, W, 1 or 3]."""
    y_HW, x_HW = np.mgrid[0 : shape[0], 0 : shape[1]]
    if name == "soft":
        return np.zeros((1, 1, 1))
    if name == "textured":
        angle, pitch = rng.uniform(0, np.pi), rng.uniform(4, 14)
        along_HW = np.cos(angle) * x_HW + np.sin(angle) * y_HW
        return np.asarray(rng.uniform(15, 40) * np.sin(2 * np.pi * along_HW / pitch + rng.uniform(0, 6))[..., None])
    radius_HW = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"))
    radius_HW[0, 0] = np.inf  # the mean stays
    white_HW3 = np.fft.fft2(rng.normal(size=(*shape, 3)), axes=(0, 1))
    noise_HW3 = np.fft.ifft2(white_HW3 / radius_HW[..., None], axes=(0, 1)).real
    grey_HW1 = noise_HW3.mean(2, keepdims=True)
    mixed_HW3 = 0.75 * grey_HW1 / grey_HW1.std() + 0.25 * noise_HW3 / noise_HW3.std()
    return np.asarray(rng.uniform(20, 35) * mixed_HW3)


def _litter(rng: np.random.Generator, canvas_HW3: NDArray[np.float64], taken_HW: Mask) -> None:
    """Draw a ragged patch of a dull colour where nothing else is; a scene that has become too full goes without it."""
    width = int(rng.integers(6, 19))
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radii = rng.uniform(0.4, 1, 9) * (width * _OVERSAMPLING - 1) / 2
    centre = (width * _OVERSAMPLING - 1) / 2
    image = Image.new("L", (width * _OVERSAMPLING,) * 2)
    corners = np.stack([centre + radii * np.cos(angles), centre + radii * np.sin(angles)], 1)
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    alpha_hw1 = _downsample(image)[..., None]
    ink_3 = rng.uniform(30, 190) + rng.uniform(-18, 18, 3)
    for _ in range(30):
        y, x = (int(rng.integers(0, side - width + 1)) for side in taken_HW.shape)
        if not taken_HW[max(0, y - 2) : y + width + 2, max(0, x - 2) : x + width + 2].any():
            taken_HW[y : y + width, x : x + width] = True
            window_hw3 = canvas_HW3[y : y + width, x : x + width]
            window_hw3 += alpha_hw1 * (ink_3 - window_hw3)
            return


def _place(
    rng: np.random.Generator,
    canvas_HW3: NDArray[np.float64],
    taken_HW: Mask,
    objects: list[SceneObject],
    category: str,
    size: SizeName,
) -> None:
    """Draw one object where nothing else is; a scene that has become too full goes without it."""
    low, high = _WIDTHS[size]
    width = int(rng.integers(low, high + 1))
    text = str(rng.choice(DIGITS)) if category == "digit" else ""
    color = "" if category == "digit" else str(rng.choice(list(COLORS)))
    alpha_hw = _glyph(text, width) if text else _shape(category, width)
    height, breadth = alpha_hw.shape
    for _ in range(30):
        y, x = (int(rng.integers(0, n - k + 1)) for n, k in zip(taken_HW.shape, alpha_hw.shape, strict=True))
        if taken_HW[max(0, y - 2) : y + height + 2, max(0, x - 2) : x + breadth + 2].any():
            continue
        taken_HW[y : y + height, x : x + breadth] = True
        window_hw3 = canvas_HW3[y : y + height, x : x + breadth]
        if color:
            ink_3 = np.asarray(COLORS[color]) + rng.uniform(-14, 14, 3)
        else:
            ink_3 = np.full(3, 250.0 if window_hw3.mean() < 128 else 5.0)
        window_hw3 += alpha_hw[..., None] * (ink_3 - window_hw3)
        mask_HW = np.zeros(taken_HW.shape, bool)
        mask_HW[y : y + height, x : x + breadth] = alpha_hw >= 0.5
        objects.append(SceneObject(category, color, text, size, mask_HW))
        return


def _shape(name: str, width: int) -> NDArray[np.float64]:
    """Coverage [width, width] in 0..1 of a shape that fills its square."""
    n = width * _OVERSAMPLING
    image = Image.new("L", (n, n))
    draw = ImageDraw.Draw(image)
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if name == "ring":
            rim = n * 0.27
            draw.ellipse((rim, rim, n - 1 - rim, n - 1 - rim), fill=0)
    elif name == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif name == "triangle":
        draw.polygon([(0, n - 1), (n - 1, n - 1), ((n - 1) / 2, 0)], fill=255)
    else:
        third = n / 3
        draw.rectangle((third, 0, n - 1 - third, n - 1), fill=255)
        draw.rectangle((0, third, n - 1, n - 1 - third), fill=255)
    return _downsample(image)


def _glyph(text: str, height: int) -> NDArray[np.float64]:
    """Coverage of a digit drawn as text, `height` pixels high."""
    font = ImageFont.load_default(size=height * _OVERSAMPLING * 1.35)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    width = max(1, round(image.width * height / image.height))
    return _downsample(image.resize((width * _OVERSAMPLING, height * _OVERSAMPLING)))


def _downsample(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.reduce(_OVERSAMPLING), np.float64) / 255


# --- COCO -----------------------------------------------------------------------------------------------------------


def write_scenes(
    folder: Path,
    count: int,
    seed: int,
    split: Split,
    *,
    first: int = 0,
    annotations: str = "instances.json",
    style: Style = PLAIN,
) -> Path:
    """Write scenes `first` to `first + count - 1` of a split as `folder/images/*.jpg` and `folder/<annotations>`.

    Returns the path of the json, which is in COCO's instances format: boxes, areas and masks (uncompressed
    run-length codes) are exact; `attributes` gives colour, size and text of each object.
    """
    if count < 1:
        raise BadInput(f"count of scenes is {count}: at least one is needed")
    scenes = (make_scene(seed, split, index, style) for index in range(first, first + count))
    return save_scenes(folder, ((scene, jpeg(scene)) for scene in scenes), seed, split, annotations=annotations)


def save_scenes(
    folder: Path, scenes: Iterable[tuple[Scene, bytes]], seed: int, split: Split, *, annotations: str
) -> Path:
    """As `write_scenes`, of scenes that are drawn already, each with its JPEG."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    coco: dict[str, Any] = {
        "info": {"description": "ocvtp scenes", "seed": seed, "split": split},
        "licenses": [],
        "categories": [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CATEGORIES)],
        "images": [],
        "annotations": [],
    }
    for scene, picture in scenes:
        name = file_name(split, scene.index)
        (images / name).write_bytes(picture)
        coco["images"].append({
            "id": scene.index, "file_name": name, "width": scene.width, "height": scene.height,
        })  # fmt: skip
        for thing in scene.objects:
            coco["annotations"].append(_annotation(len(coco["annotations"]) + 1, scene.index, thing))
    path = folder / annotations
    path.write_text(json.dumps(coco, separators=(",", ":")))
    return path


def file_name(split: Split, index: int) -> str:
    """What the picture of a scene is called."""
    return f"{split}-{index:06d}.jpg"


def jpeg(scene: Scene) -> bytes:
    """The picture as JPEG, little compressed and without colour subsampling: small objects keep their colour."""
    buffer = io.BytesIO()
    Image.fromarray(scene.pixels_HW3).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def digest(scene: Scene) -> str:
    """A fingerprint of the pixels, to tell scenes apart."""
    return hashlib.sha256(scene.pixels_HW3.tobytes()).hexdigest()


def _annotation(identity: int, image: int, thing: SceneObject) -> dict[str, Any]:
    return {
        "id": identity,
        "image_id": image,
        "category_id": CATEGORIES.index(thing.category) + 1,
        "bbox": list(thing.box),
        "area": thing.area,
        "iscrowd": 0,
        "segmentation": encode_mask(thing.mask_HW),
        "attributes": {"color": thing.color, "size": thing.size, "text": thing.text},
    }
