"""Questions about one scene, each with its one right answer.

Nothing here knows of any pruning method: which objects are asked about depends on the scene and the seed alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from ocvtp.data.scenes import COLORS, DIGITS, SHAPES, Scene, SceneObject

Kind = Literal["existence", "color", "shape", "count", "digit"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POST_PROMPT = "Answer the question using a single word or phrase."
"""What lmms-eval appends to the questions of all four benchmarks, after a line break."""
MAX_COUNT = 6
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question about one scene with its one right answer; `category` is the benchmark's own."""

    kind: Kind
    text: str
    answer: str
    category: str = ""


# --- Questions about one scene ---------------------------------------------------------------------------------------


def ask(scene: Scene, kind: Kind, rng: np.random.Generator) -> Question | None:
    """A random question of a kind, or None where the scene allows none (a digit that is not there)."""
    return _ASKERS[kind](scene, rng)


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    place = choose(rng, ("the image", "this image"))
    present = combinations(scene)
    if rng.random() < 0.5:
        color, shape = choose(rng, sorted(present))
        return Question("existence", is_there(color, shape, place), "yes")
    absent = near_misses(scene) if rng.random() < 0.5 else [c for c in all_combinations() if c not in present]
    color, shape = choose(rng, absent)
    return Question("existence", is_there(color, shape, place), "no")


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    names = unique_names(scene, "color")
    if not names:
        return None
    name, thing = choose(rng, names)
    if rng.random() < 0.6:
        return Question("color", f"What color is the {name}?", thing.color)
    asked = thing.color if rng.random() < 0.5 else other_than(rng, COLORS, thing.color)
    return Question("color", f"Is the {name} {asked}?", _yes(asked == thing.color))


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    names = unique_names(scene, "category")
    if not names:
        return None
    name, thing = choose(rng, names)
    return Question("shape", f"What shape is the {name} object?", thing.category)


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    by_shape = Counter(thing.category for thing in scene.shapes)
    by_color = Counter(thing.color for thing in scene.shapes)
    which = rng.random()
    if which < 0.2:
        things, number = "objects", len(scene.shapes)
    elif which < 0.6:
        shape = choose(rng, sorted(by_shape) if rng.random() < 0.8 else SHAPES)
        things, number = plural(shape), by_shape[shape]
    else:
        color = choose(rng, sorted(by_color) if rng.random() < 0.8 else list(COLORS))
        things, number = f"{color} objects", by_color[color]
    if rng.random() < 0.7:
        return Question("count", f"How many {things} are there?", str(number))
    asked = number if rng.random() < 0.5 else wrong_count(rng, number)
    return Question("count", f"Is there a total of {asked} {things} in this image?", _yes(asked == number))


def _digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    digit = scene.digit
    if digit is None:
        return None
    which = rng.random()
    if which < 0.4:
        return Question("digit", "What number is written in the image?", digit)
    if which < 0.7:
        return Question("digit", "What is the number?", digit)
    asked = digit if rng.random() < 0.5 else other_than(rng, DIGITS, digit)
    return Question("digit", f"Is the number in the image {asked}?", _yes(asked == digit))


_ASKERS: dict[Kind, Callable[[Scene, np.random.Generator], Question | None]] = {
    "existence": _existence,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "digit": _digit,
}


def all_combinations() -> list[tuple[str, str]]:
    """Every (colour, shape)."""
    return [(color, shape) for color in COLORS for shape in SHAPES]


def near_misses(scene: Scene) -> list[tuple[str, str]]:
    """Absent (colour, shape) pairs of which both parts are there, or, where there is none, one part."""
    present = combinations(scene)
    colors, shapes = ({pair[i] for pair in present} for i in (0, 1))
    absent = [pair for pair in all_combinations() if pair not in present]
    both = [pair for pair in absent if pair[0] in colors and pair[1] in shapes]
    return both or [pair for pair in absent if pair[0] in colors or pair[1] in shapes]


def plural(shape: str) -> str:
    """The shape in the plural."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def combinations(scene: Scene) -> set[tuple[str, str]]:
    """The (colour, shape) pairs that are there."""
    return {(thing.color, thing.category) for thing in scene.shapes}


def unique_names(scene: Scene, asked: Literal["color", "category"]) -> list[tuple[str, SceneObject]]:
    """Ways to name one object without saying the attribute that is asked for."""
    said: Literal["color", "category"] = "category" if asked == "color" else "color"
    plain = Counter(getattr(thing, said) for thing in scene.shapes)
    sized = Counter((thing.size, getattr(thing, said)) for thing in scene.shapes)
    names = [(getattr(t, said), t) for t in scene.shapes if plain[getattr(t, said)] == 1]
    names += [
        (f"{t.size} {getattr(t, said)}", t)
        for t in scene.shapes
        if plain[getattr(t, said)] > 1 and sized[t.size, getattr(t, said)] == 1
    ]
    return names


def is_there(color: str, shape: str, place: str) -> str:
    """Whether something is there, as a question."""
    article = "an" if color[0] in "aeiou" else "a"
    return f"Is there {article} {color} {shape} in {place}?"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of some options."""
    return options[int(rng.integers(len(options)))]


def other_than(rng: np.random.Generator, options: Iterable[str], but: str) -> str:
    """One of some options, but not this one."""
    return choose(rng, [option for option in options if option != but])


def wrong_count(rng: np.random.Generator, number: int) -> int:
    """A number beside the right one."""
    return choose(rng, [n for n in (number - 1, number + 1) if 0 <= n <= MAX_COUNT])
