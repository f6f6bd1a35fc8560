"""Benchmarks that are answered in a word: POPE, GQA, MME, TextVQA, VQAv2 and VizWiz."""

from collections import Counter

import numpy as np

from ocvtp.data.album import Album, Row
from ocvtp.data.questions import (
    Kind,
    all_combinations,
    ask,
    choose,
    combinations,
    is_there,
    near_misses,
    other_than,
    plural,
    unique_names,
    wrong_count,
)
from ocvtp.data.scenes import COLORS, DIGITS, Scene

POPE_CATEGORIES = ("random", "popular", "adversarial")
MME_CATEGORIES = ("existence", "count", "color", "OCR")
ANNOTATORS = 10
UNANSWERABLE = "unanswerable"


def pope(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """A yes and a no; the absent pair is drawn as in POPE: at random, from the frequent, or from near misses."""
    scene = album.scene(index)
    category = POPE_CATEGORIES[index % 3]
    present = combinations(scene)
    pools = {
        "random": [pair for pair in all_combinations() if pair not in present],
        "popular": [pair for pair in album.popular if pair not in present][:5],
        "adversarial": near_misses(scene),
    }
    asked = [(choose(rng, sorted(present)), "yes"), (choose(rng, pools[category]), "no")]
    return [
        {
            "id": f"{index}-{answer}",
            "question_id": f"{index}-{answer}",
            "question": is_there(*pair, "the image"),
            "answer": answer,
            "image_source": album.stem(index),
            "image": album.image(index),
            "category": category,
        }
        for pair, answer in asked
    ]


def gqa(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """A colour or a shape, in a word."""
    scene = album.scene(index)
    kinds: tuple[Kind, ...] = ("color", "shape") if index % 2 else ("shape", "color")
    question = next((q for q in (ask(scene, kind, rng) for kind in kinds) if q is not None), None)
    if question is None:
        return []
    return [
        {
            "id": str(index),
            "imageId": album.stem(index),
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": f"The answer is {question.answer}.",
            "image": album.image(index),
        }
    ]


def mme(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """One pair of questions, the first to be answered yes and the second no."""
    scene = album.scene(index)
    category = MME_CATEGORIES[index % 4]
    pair = {"existence": _pair_existence, "count": _pair_count, "color": _pair_color, "OCR": _pair_digit}[category](
        scene, rng
    )
    return [
        {
            "question_id": album.image(index)["path"],
            "image": album.image(index),
            "question": f"{text} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for text, answer in zip(pair, ("Yes", "No"), strict=False)
    ]


def _pair_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    pairs = (choose(rng, sorted(combinations(scene))), choose(rng, near_misses(scene)))
    return tuple(is_there(*pair, "this image") for pair in pairs)


def _pair_count(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    shape, number = choose(rng, sorted(Counter(thing.category for thing in scene.shapes).items()))
    counts = (number, wrong_count(rng, number))
    return tuple(f"Is there a total of {n} {plural(shape)} in this image?" for n in counts)


def _pair_color(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    names = unique_names(scene, "color")
    if not names:
        return ()
    name, thing = choose(rng, names)
    return tuple(f"Is the {name} {color}?" for color in (thing.color, other_than(rng, COLORS, thing.color)))


def _pair_digit(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    if scene.digit is None:
        return ()
    return tuple(f"Is the number in the image {d}?" for d in (scene.digit, other_than(rng, DIGITS, scene.digit)))


def textvqa(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """The number in the image; none where there is none."""
    scene = album.scene(index)
    if scene.digit is None:
        return []
    text = choose(rng, ("what number is written in the image?", "what is the number?"))
    return [
        {
            "image_id": album.stem(index),
            "question_id": index,
            "question": text,
            "question_tokens": text.rstrip("?").split(),
            "image": album.image(index),
            "image_width": scene.width,
            "image_height": scene.height,
            "answers": [scene.digit] * 10,
            "image_classes": sorted({thing.category for thing in scene.shapes}),
            "set_name": "val",
            "ocr_tokens": [scene.digit],
        }
    ]


def vqav2(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """Any kind of question; `answers` are those of ten annotators, who agree."""
    scene = album.scene(index)
    kinds: tuple[Kind, ...] = ("existence", "color", "count", "shape", "digit")
    turned = kinds[index % 5 :] + kinds[: index % 5]
    question = next(q for q in (ask(scene, kind, rng) for kind in turned) if q is not None)
    yes_or_no = question.answer in ("yes", "no")
    return [
        {
            "question_type": " ".join(question.text.lower().split()[:2]),
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": number + 1}
                for number in range(ANNOTATORS)
            ],
            "image_id": index,
            "answer_type": "yes/no" if yes_or_no else "number" if question.answer.isdigit() else "other",
            "question_id": 1000 * index,
            "question": question.text,
            "image": album.image(index),
        }
    ]


def vizwiz(album: Album, index: int, rng: np.random.Generator) -> list[Row]:
    """A colour, or the number in the image, which where there is none cannot be told."""
    scene = album.scene(index)
    names = unique_names(scene, "color")
    if names and index % 2:
        name, thing = choose(rng, names)
        text, answer = f"what color is the {name}?", thing.color
    else:
        text, answer = "what is the number?", scene.digit or UNANSWERABLE
    kind = UNANSWERABLE if answer == UNANSWERABLE else "number" if answer.isdigit() else "other"
    return [
        {
            "question_id": f"VizWiz_val_{index:08d}",
            "image": album.image(index),
            "question": text,
            "answers": [answer] * ANNOTATORS,
            "category": kind,
        }
    ]
