"""Questions: true of their scenes, in the official columns, fair to every method."""

import ast
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ocvtp.data.question_sets import write_benchmarks
from ocvtp.data.questions import KINDS, ask, near_misses, plural
from ocvtp.data.scenes import COLORS, SHAPES, Scene, digest, make_scene, make_scenes
from ocvtp.errors import BadInput
from ocvtp.evaluation.benchmarks import benchmark

IN_WORDS = ("gqa", "mme", "pope", "textvqa", "vqav2", "vizwiz")
BY_LETTER = ("mmbench", "scienceqa", "mmmu", "seedbench")


def truth(scene: Scene, text: str) -> str | None:
    """The answer by reading the question's words: independent of how questions are made. None: not answerable."""
    words = text.lower().replace("?", "").replace("please answer yes or no.", "").split()
    plurals = {plural(shape): shape for shape in SHAPES}
    color = next((w for w in words if w in COLORS), None)
    shape = next((plurals.get(w, w) for w in words if w in SHAPES or w in plurals), None)
    size = next((w for w in words if w in ("small", "medium", "large")), None)
    number = next((w for w in words if w.isdigit()), None)
    things = [o for o in scene.shapes if (not shape or o.category == shape) and (not size or o.size == size)]
    if "number" in words:
        return scene.digit if number is None else {True: "yes", False: "no"}[scene.digit == number]
    if words[:2] == ["how", "many"]:
        return str(sum(color in (None, o.color) for o in things))
    if number is not None:
        return "yes" if sum(color in (None, o.color) for o in things) == int(number) else "no"
    if words[:2] == ["is", "there"]:
        return "yes" if any(o.color == color for o in things) else "no"
    if words[:2] == ["is", "the"]:
        return None if len(things) != 1 else {True: "yes", False: "no"}[things[0].color == color]
    if words[:2] == ["what", "color"]:
        return None if len(things) != 1 else things[0].color
    named = [o for o in things if o.color == color]
    return None if len(named) != 1 else named[0].category


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true(kind: str) -> None:
    rng = np.random.default_rng(0)
    answers: Counter[str] = Counter()
    for scene in make_scenes(2, "train", 200):
        question = ask(scene, kind, rng)  # type: ignore[arg-type]
        if question is None:
            assert kind != "existence"
            assert kind != "count"
            continue
        assert truth(scene, question.text) == question.answer, question
        answers[question.answer] += 1
    assert max(answers.values()) < 0.65 * sum(answers.values()), "no constant answer may do well"


def test_near_misses_are_absent_but_made_of_what_is_there() -> None:
    for scene in make_scenes(0, "train", 50):
        present = {(o.color, o.category) for o in scene.shapes}
        for color, shape in near_misses(scene):
            assert (color, shape) not in present
            assert color in {c for c, _ in present} or shape in {s for _, s in present}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    assert write_benchmarks(folder, 60, seed=3) == dict.fromkeys(IN_WORDS + BY_LETTER, 60)
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def test_columns_and_image_features(benchmarks: Path) -> None:
    wanted = {
        "pope": {"question_id", "question", "answer", "image", "category"},
        "gqa": {"id", "imageId", "question", "answer", "fullAnswer", "image"},
        "mme": {"question_id", "question", "answer", "category", "image"},
        "textvqa": {"question_id", "question", "answers", "image", "ocr_tokens"},
        **{name: set(benchmark(name).columns) for name in ("vqav2", "vizwiz", *BY_LETTER)},
    }
    for name, columns in wanted.items():
        schema = pq.read_schema(benchmarks / f"{name}.parquet")
        assert columns <= set(schema.names)
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert set(features) == set(schema.names)
        image = {"_type": "Image"}
        images = {one: features[one] for one in features if one == "image" or one.removeprefix("image_").isdigit()}
        assert images
        assert all(found == ({"feature": image, "_type": "List"} if name == "seedbench" else image)
                   for found in images.values())  # fmt: skip


def number(image: dict) -> int:
    return int(Path(image["path"]).stem.split("-")[1])


def test_benchmark_answers_are_true_of_the_pictures(benchmarks: Path) -> None:
    for name in IN_WORDS:
        for row in rows(benchmarks, name):
            scene = make_scene(3, "benchmark", number(row["image"]))
            answer = row["answer"] if "answer" in row else row["answers"][0]
            answer = answer["answer"] if isinstance(answer, dict) else answer
            assert (truth(scene, row["question"]) or "unanswerable") == answer.lower()
            drawn = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int)
            assert np.abs(drawn - scene.pixels_HW3).mean() < 6


def options(name: str, row: dict) -> list[str]:
    if name == "scienceqa":
        return row["choices"]
    if name == "mmmu":
        return ast.literal_eval(row["options"])
    return [row[letter if name == "mmbench" else f"choice_{letter.lower()}"] for letter in "ABCD"]


def test_of_the_options_one_is_right(benchmarks: Path) -> None:
    several = 0
    for name in BY_LETTER:
        for row in rows(benchmarks, name):
            images = row.get("image") or [row[f"image_{k}"] for k in range(1, 8) if row[f"image_{k}"]]
            scenes = [
                make_scene(3, "benchmark", number(one)) for one in (images if isinstance(images, list) else [images])
            ]
            text = row["question"].replace("<image 1>", "").replace("<image 2>", "").strip()
            if len(scenes) == 1:
                right = truth(scenes[0], text)
            else:
                several += 1
                single = text.replace(" in both images", "").replace("In how many images is there", "Is there")
                each = [truth(scene, single) for scene in scenes]
                right = str(
                    sum({"yes": 1, "no": 0}.get(one, one) if one in ("yes", "no") else int(one) for one in each)
                )
            chosen = options(name, row)
            assert len(set(chosen)) == len(chosen)
            if name == "mmmu" and row["question_type"] == "open":
                assert (row["answer"], chosen) == (right, [])
            else:
                place = row["answer"] if isinstance(row["answer"], int) else "ABCD".index(row["answer"])
                assert chosen[place] == right, (name, text, chosen, row["answer"])
    assert several > 20


def test_multiple_choice_is_what_the_benchmarks_make_of_it(benchmarks: Path) -> None:
    circles = Counter(row["index"] % 1_000_000 for row in rows(benchmarks, "mmbench"))
    assert set(circles.values()) == {4}
    letters = Counter(row["answer"] for row in rows(benchmarks, "mmbench"))
    assert len(set(letters.values())) == 1, "each letter is right as often, since options are turned round"
    assert {len(row["choices"]) for row in rows(benchmarks, "scienceqa")} == {2, 3, 4}
    assert {bool(row["hint"]) for row in rows(benchmarks, "scienceqa")} == {True, False}
    assert Counter(row["data_type"] for row in rows(benchmarks, "seedbench"))["video"] == 7
    assert {row["question_type"] for row in rows(benchmarks, "mmmu")} == {"multiple-choice", "open"}
    assert "unanswerable" in {row["answers"][0] for row in rows(benchmarks, "vizwiz")}


def test_pairs_are_balanced(benchmarks: Path) -> None:
    mme, pope = rows(benchmarks, "mme"), rows(benchmarks, "pope")
    by_image: dict[str, list[str]] = {}
    for row in mme:
        by_image.setdefault(row["question_id"], []).append(row["answer"])
    assert all(sorted(answers) == ["No", "Yes"] for answers in by_image.values())
    assert Counter(row["answer"] for row in pope) == {"yes": 30, "no": 30}
    assert {row["category"] for row in pope} == {"random", "popular", "adversarial"}
    assert {row["category"] for row in mme} == {"existence", "count", "color", "OCR"}
    assert all(len(row["answers"]) == 10 for row in rows(benchmarks, "textvqa"))


def test_training_and_benchmark_images_never_overlap(benchmarks: Path) -> None:
    trained = {digest(scene) for split in ("train", "vlm") for scene in make_scenes(3, split, 300)}
    pictures = [np.asarray(Image.open(path)) for path in sorted((benchmarks / "images").iterdir())]
    assert len(pictures) >= 60
    asked = {digest(make_scene(3, "benchmark", index)) for index in range(len(pictures))}
    assert not asked & trained


def test_the_same_seed_makes_the_same_bytes(benchmarks: Path, tmp_path: Path) -> None:
    write_benchmarks(tmp_path, 60, seed=3)
    for name in IN_WORDS + BY_LETTER:
        assert (tmp_path / f"{name}.parquet").read_bytes() == (benchmarks / f"{name}.parquet").read_bytes()


def test_too_few_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 2"):
        write_benchmarks(tmp_path, 1, 0)
