"""Benchmarks that are answered by the letter of an option: MMBench, ScienceQA, MMMU and SEED-Bench."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ocvtp.data.album import Album, Row
from ocvtp.data.questions import MAX_COUNT, choose, combinations, plural, unique_names
from ocvtp.data.scenes import COLORS, DIGITS, SHAPES, Scene

LETTERS = "ABCD"
CIRCLE = 1_000_000
"""MMBench asks each question once more for each option, under an index larger by multiples of this."""
FRAMES = 4
COUNTS = tuple(str(number) for number in range(MAX_COUNT + 1))
HINT = "The picture shows coloured shapes, and sometimes a number."


@dataclass(frozen=True)
class _Asked:
    """A question of a kind with its right answer, and everything that could be one."""

    kind: str
    text: str
    answer: str
    possible: tuple[str, ...]

    def options(self, rng: np.random.Generator, count: int = len(LETTERS)) -> list[str]:
        """The right answer among wrong ones."""
        wrong = [one for one in self.possible if one != self.answer]
        chosen = [wrong[i] for i in rng.choice(len(wrong), min(count - 1, len(wrong)), replace=False)]
        options = [self.answer, *chosen]
        return [options[i] for i in rng.permutation(len(options))]


def mmbench(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """One question four times, its options turned round: it counts as right if all four are."""
    asked = _about(album.scene(index), index, rng)
    options = asked.options(rng)
    category, ability = {
        "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
        "shape": ("attribute_recognition", "finegrained_perception (instance-level)"),
        "digit": ("ocr", "finegrained_perception (instance-level)"),
        "count": ("object_localization", "finegrained_perception (instance-level)"),
    }[asked.kind]
    rows = []
    for turn in range(len(LETTERS)):
        turned = options[turn:] + options[:turn]
        rows.append({
            "index": index + turn * CIRCLE,
            "question": asked.text,
            "hint": HINT if index % 3 == 0 else "nan",
            "answer": LETTERS[turned.index(asked.answer)],
            **dict(zip(LETTERS, turned, strict=True)),
            "category": category,
            "image": album.image(index),
            "source": "scenes",
            "L2-category": ability,
            "comment": "nan",
            "split": "dev",
        })  # fmt: skip
    return rows


def scienceqa(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """Two to four options; every other question with a hint."""
    asked = _about(album.scene(index), index + 1, rng)
    options = asked.options(rng, 2 + index % 3)
    return [
        {
            "image": album.image(index),
            "question": asked.text,
            "choices": options,
            "answer": options.index(asked.answer),
            "hint": HINT if index % 2 else "",
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science",
            "topic": "physics",
            "category": asked.kind,
            "skill": asked.kind,
            "lecture": "",
            "solution": "",
        }
    ]


def mmmu(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """Of three questions one about two images, one with options about one, one that is open."""
    kind, others = index % 3, {f"image_{number}": None for number in range(3, 8)}
    images: Row = {"image_1": album.image(index), "image_2": None}
    if kind == 1:
        first, second = album.scene(index), album.scene(index - 1)
        shape = choose(rng, sorted({thing.category for thing in first.shapes}))
        both = sum(thing.category == shape for scene in (first, second) for thing in scene.shapes)
        asked = _Asked(
            "count", f"How many {plural(shape)} are there in both images?", str(both),
            tuple(map(str, range(2 * MAX_COUNT + 1))),
        )  # fmt: skip
        images["image_2"] = album.image(index - 1)
    else:
        asked = _about(album.scene(index), index // 3, rng)
    options = asked.options(rng) if kind < 2 else []
    return [
        {
            "id": f"validation_Art_{index}",
            "question": f"{'<image 1> <image 2>' if kind == 1 else '<image 1>'} {asked.text}",
            "options": str(options),
            "explanation": "",
            **images,
            **others,
            "img_type": "['Icons and Symbols']",
            "answer": LETTERS[options.index(asked.answer)] if options else asked.answer,
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if options else "open",
            "subfield": "Drawing",
        }
    ]


def seedbench(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """A question about one image, of every eighth about the frames of a video: this scene and those before it."""
    video = index % 8 == FRAMES
    frames = range(index - FRAMES + 1, index + 1) if video else range(index, index + 1)
    asked = _over([album.scene(one) for one in frames], rng) if video else _about(album.scene(index), index + 2, rng)
    options = asked.options(rng)
    return [
        {
            "answer": LETTERS[options.index(asked.answer)],
            **{f"choice_{letter.lower()}": option for letter, option in zip(LETTERS, options, strict=True)},
            "data_id": album.stem(index),
            "data_type": "video" if video else "image",
            "question": asked.text,
            "question_id": str(index),
            "question_type_id": 10 if video else 1,
            "image": [album.image(one) for one in frames],
            "segment": "",
        }
    ]


def _about(scene: Scene, turn: int, rng: np.random.Generator) -> _Asked:
    """A question about one scene, of a kind whose turn it is or of the next one that the scene allows."""
    kinds = ("color", "shape", "digit", "count")
    found = (_MAKERS[kinds[(turn + step) % 4]](scene, rng) for step in range(4))
    return next(asked for asked in found if asked is not None)


def _over(scenes: Sequence[Scene], rng: np.random.Generator) -> _Asked:
    """In how many of several scenes something is."""
    color, shape = choose(rng, sorted(combinations(scenes[-1])))
    number = sum((color, shape) in combinations(scene) for scene in scenes)
    possible = tuple(str(n) for n in range(len(scenes) + 1))
    return _Asked("frames", f"In how many images is there a {color} {shape}?", str(number), possible)


def _color(scene: Scene, rng: np.random.Generator) -> _Asked | None:
    names = unique_names(scene, "color")
    if not names:
        return None
    name, thing = choose(rng, names)
    return _Asked("color", f"What color is the {name}?", thing.color, tuple(COLORS))


def _shape(scene: Scene, rng: np.random.Generator) -> _Asked | None:
    names = unique_names(scene, "category")
    if not names:
        return None
    name, thing = choose(rng, names)
    return _Asked("shape", f"What shape is the {name} object?", thing.category, tuple(SHAPES))


def _digit(scene: Scene, rng: np.random.Generator) -> _Asked | None:
    if scene.digit is None:
        return None
    return _Asked("digit", "What number is written in the image?", scene.digit, tuple(DIGITS))


def _count(scene: Scene, rng: np.random.Generator) -> _Asked:
    shape, number = choose(rng, sorted(Counter(thing.category for thing in scene.shapes).items()))
    return _Asked("count", f"How many {plural(shape)} are there?", str(number), COUNTS)


_MAKERS = {"color": _color, "shape": _shape, "digit": _digit, "count": _count}
