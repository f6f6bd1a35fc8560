"""Questions about scenes, and the question sets of four benchmarks made of them.

The benchmarks are POPE, GQA, MME and TextVQA in the columns that lmms-eval's official functions read, so that the
official code asks and scores. Nothing here knows of any pruning method: which objects are asked about depends on the
scene and the seed alone.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ocvtp.data.scenes import (
    COLORS,
    DIGITS,
    PLAIN,
    SHAPES,
    Scene,
    SceneObject,
    Style,
    file_name,
    jpeg,
    make_scene,
    write_scenes,
)
from ocvtp.errors import BadInput

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
    place = _choose(rng, ("the image", "this image"))
    present = _combinations(scene)
    if rng.random() < 0.5:
        color, shape = _choose(rng, sorted(present))
        return Question("existence", _is_there(color, shape, place), "yes")
    absent = near_misses(scene) if rng.random() < 0.5 else [c for c in all_combinations() if c not in present]
    color, shape = _choose(rng, absent)
    return Question("existence", _is_there(color, shape, place), "no")


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    names = _unique_names(scene, "color")
    if not names:
        return None
    name, thing = _choose(rng, names)
    if rng.random() < 0.6:
        return Question("color", f"What color is the {name}?", thing.color)
    asked = thing.color if rng.random() < 0.5 else _other(rng, COLORS, thing.color)
    return Question("color", f"Is the {name} {asked}?", _yes(asked == thing.color))


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    names = _unique_names(scene, "category")
    if not names:
        return None
    name, thing = _choose(rng, names)
    return Question("shape", f"What shape is the {name} object?", thing.category)


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    by_shape = Counter(thing.category for thing in scene.shapes)
    by_color = Counter(thing.color for thing in scene.shapes)
    which = rng.random()
    if which < 0.2:
        things, number = "objects", len(scene.shapes)
    elif which < 0.6:
        shape = _choose(rng, sorted(by_shape) if rng.random() < 0.8 else SHAPES)
        things, number = plural(shape), by_shape[shape]
    else:
        color = _choose(rng, sorted(by_color) if rng.random() < 0.8 else list(COLORS))
        things, number = f"{color} objects", by_color[color]
    if rng.random() < 0.7:
        return Question("count", f"How many {things} are there?", str(number))
    asked = number if rng.random() < 0.5 else _wrong_count(rng, number)
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
    asked = digit if rng.random() < 0.5 else _other(rng, DIGITS, digit)
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
    present = _combinations(scene)
    colors, shapes = ({pair[i] for pair in present} for i in (0, 1))
    absent = [pair for pair in all_combinations() if pair not in present]
    both = [pair for pair in absent if pair[0] in colors and pair[1] in shapes]
    return both or [pair for pair in absent if pair[0] in colors or pair[1] in shapes]


def plural(shape: str) -> str:
    """The shape in the plural."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _combinations(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.color, thing.category) for thing in scene.shapes}


def _unique_names(scene: Scene, asked: Literal["color", "category"]) -> list[tuple[str, SceneObject]]:
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


def _is_there(color: str, shape: str, place: str) -> str:
    article = "an" if color[0] in "aeiou" else "a"
    return f"Is there {article} {color} {shape} in {place}?"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: Iterable[str], but: str) -> str:
    return _choose(rng, [option for option in options if option != but])


def _wrong_count(rng: np.random.Generator, number: int) -> int:
    return _choose(rng, [n for n in (number - 1, number + 1) if 0 <= n <= MAX_COUNT])


# --- Question sets -------------------------------------------------------------------------------------------------

POPE_CATEGORIES = ("random", "popular", "adversarial")
MME_CATEGORIES = ("existence", "count", "color", "OCR")
Row = dict[str, Any]


def write_benchmarks(folder: Path, questions: int, seed: int, style: Style = PLAIN) -> dict[str, int]:
    """Write `gqa`, `mme`, `pope` and `textvqa.parquet` with at least `questions` questions each, and their scenes.

    The scenes are those of the split `benchmark`, from which no pruner and no VLM learns; they are also written as
    `images/*.jpg` and `scenes.json` (COCO). Returns the number of questions of each benchmark.
    """
    if questions < 2:
        raise BadInput(f"{questions} questions a benchmark: at least 2 are needed, since some come in pairs")
    rows: dict[str, list[Row]] = {"gqa": [], "mme": [], "pope": [], "textvqa": []}
    popular = _popular(seed, questions, style)
    index = 0
    while any(len(found) < questions for found in rows.values()):
        scene = make_scene(seed, "benchmark", index, style)
        rng = np.random.default_rng([seed, 1, index])
        for name, found in rows.items():
            if len(found) < questions:
                found.extend(_ROWS[name](scene, rng, popular))
        index += 1
    folder.mkdir(parents=True, exist_ok=True)
    write_scenes(folder, index, seed, "benchmark", annotations="scenes.json", style=style)
    for name, found in rows.items():
        _write_parquet(folder / f"{name}.parquet", found)
    return {name: len(found) for name, found in rows.items()}


def _pope_rows(scene: Scene, rng: np.random.Generator, popular: Sequence[tuple[str, str]]) -> list[Row]:
    """A yes and a no; the absent pair is drawn as in POPE: at random, from the frequent, or from near misses."""
    category = POPE_CATEGORIES[scene.index % 3]
    present = _combinations(scene)
    pools = {
        "random": [pair for pair in all_combinations() if pair not in present],
        "popular": [pair for pair in popular if pair not in present][:5],
        "adversarial": near_misses(scene),
    }
    asked = [(_choose(rng, sorted(present)), "yes"), (_choose(rng, pools[category]), "no")]
    return [
        {
            "id": f"{scene.index}-{answer}",
            "question_id": f"{scene.index}-{answer}",
            "question": _is_there(*pair, "the image"),
            "answer": answer,
            "image_source": _stem(scene),
            "image": _image(scene),
            "category": category,
        }
        for pair, answer in asked
    ]


def _gqa_rows(scene: Scene, rng: np.random.Generator, _: object) -> list[Row]:
    kinds: tuple[Kind, ...] = ("color", "shape") if scene.index % 2 else ("shape", "color")
    question = next((q for q in (ask(scene, kind, rng) for kind in kinds) if q is not None), None)
    if question is None:
        return []
    return [
        {
            "id": str(scene.index),
            "imageId": _stem(scene),
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": f"The answer is {question.answer}.",
            "image": _image(scene),
        }
    ]


def _mme_rows(scene: Scene, rng: np.random.Generator, _: object) -> list[Row]:
    """One pair of questions, the first to be answered yes and the second no."""
    category = MME_CATEGORIES[scene.index % 4]
    pair = {"existence": _pair_existence, "count": _pair_count, "color": _pair_color, "OCR": _pair_digit}[category](
        scene, rng
    )
    return [
        {
            "question_id": file_name("benchmark", scene.index),
            "image": _image(scene),
            "question": f"{text} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for text, answer in zip(pair, ("Yes", "No"), strict=False)
    ]


def _pair_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    pairs = (_choose(rng, sorted(_combinations(scene))), _choose(rng, near_misses(scene)))
    return tuple(_is_there(*pair, "this image") for pair in pairs)


def _pair_count(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    shape, number = _choose(rng, sorted(Counter(thing.category for thing in scene.shapes).items()))
    counts = (number, _wrong_count(rng, number))
    return tuple(f"Is there a total of {n} {plural(shape)} in this image?" for n in counts)


def _pair_color(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    names = _unique_names(scene, "color")
    if not names:
        return ()
    name, thing = _choose(rng, names)
    return tuple(f"Is the {name} {color}?" for color in (thing.color, _other(rng, COLORS, thing.color)))


def _pair_digit(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    if scene.digit is None:
        return ()
    return tuple(f"Is the number in the image {d}?" for d in (scene.digit, _other(rng, DIGITS, scene.digit)))


def _textvqa_rows(scene: Scene, rng: np.random.Generator, _: object) -> list[Row]:
    if scene.digit is None:
        return []
    text = _choose(rng, ("what number is written in the image?", "what is the number?"))
    return [
        {
            "image_id": _stem(scene),
            "question_id": scene.index,
            "question": text,
            "question_tokens": text.rstrip("?").split(),
            "image": _image(scene),
            "image_width": scene.width,
            "image_height": scene.height,
            "answers": [scene.digit] * 10,
            "image_classes": sorted({thing.category for thing in scene.shapes}),
            "set_name": "val",
            "ocr_tokens": [scene.digit],
        }
    ]


_ROWS: dict[str, Callable[[Scene, np.random.Generator, Any], list[Row]]] = {
    "gqa": _gqa_rows,
    "mme": _mme_rows,
    "pope": _pope_rows,
    "textvqa": _textvqa_rows,
}


def _popular(seed: int, scenes: int, style: Style) -> list[tuple[str, str]]:
    """(colour, shape) pairs, the most frequent of the benchmark's scenes first."""
    seen = Counter(dict.fromkeys(all_combinations(), 0))
    for index in range(scenes):
        seen.update(_combinations(make_scene(seed, "benchmark", index, style)))
    return sorted(seen, key=lambda pair: (-seen[pair], pair))


def _stem(scene: Scene) -> str:
    return Path(file_name("benchmark", scene.index)).stem


def _image(scene: Scene) -> Row:
    return {"bytes": jpeg(scene), "path": file_name("benchmark", scene.index)}


def _write_parquet(path: Path, rows: list[Row]) -> None:
    """Parquet with the features that `datasets` reads from the schema's metadata."""
    table = pa.Table.from_pylist(rows)
    features = {field.name: _feature(field) for field in table.schema}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def _feature(field: pa.Field) -> Any:
    if field.name == "image":
        return {"_type": "Image"}
    if pa.types.is_list(field.type):
        return {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
    return {"dtype": str(field.type), "_type": "Value"}
