"""Answers of a real VLM in batches, against what transformers says to one question at a time."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.evaluation.answered import Answer
from ocvtp.evaluation.generate import Answerer, Prepared, PreparedMemory, finish
from ocvtp.vlms.loading import VLM, load


@pytest.fixture(scope="module")
def vlm(vlm_folder: Path) -> VLM:
    return load(str(vlm_folder))


def picture(number: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def ask(text: str, *images: Image.Image, key: str = "url") -> list[dict[str, Any]]:
    parts = [{"type": "image", key: image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


QUESTIONS = [
    ask("Is there a red circle in the image?", picture(0)),
    ask("What color is the square?", picture(1)),
    ask("What color is the small triangle to the left of the large blue cross?", picture(2)),
    ask("How many objects are there?"),
    ask("What is the number?", picture(3)),
    ask("Is there a red circle in the image?", picture(4)),
    ask("digit?", picture(5)),
]


def in_batches(answerer: Answerer, size: int) -> list[Answer]:
    parts = [QUESTIONS[start : start + size] for start in range(0, len(QUESTIONS), size)]
    return [answer for part in parts for answer in answerer.answer(part, {"max_new_tokens": 8})]


def test_answers_are_those_of_transformers(vlm: VLM) -> None:
    answers = in_batches(Answerer(vlm), 3)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        conversation = [{"role": "user", "content": [
            {"type": "image", "image": part["url"]} if part["type"] == "image" else part
            for part in question[0]["content"]
        ]}]  # fmt: skip
        inputs = vlm.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert answer.text == vlm.processor.decode(new, skip_special_tokens=True).strip()
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.new_tokens == len(new)
    assert len({answer.text for answer in answers}) > 3
    assert [answer.kept for answer in answers] == [[144]] * 3 + [[]] + [[144]] * 3


@pytest.mark.parametrize("method", [None, "random", "oc-vtp-untrained"])
def test_answers_do_not_depend_on_the_batch(method: str | None, vlm: VLM) -> None:
    def all_answers(size: int) -> list[Answer]:
        if method is None:
            return in_batches(Answerer(vlm), size)
        with ocvtp.prune(vlm.model, method=method, keep=16, seed=3) as handle:
            return in_batches(Answerer(vlm, handle), size)

    alone, together = all_answers(1), all_answers(8)
    assert alone == together
    if method is not None:
        assert [[len(kept) for kept in answer.kept] for answer in alone] == [[16]] * 3 + [[]] + [[16]] * 3
        assert len({str(answer.kept) for answer in alone}) == 7  # every image its own choice
        assert [answer.text for answer in alone] != [answer.text for answer in in_batches(Answerer(vlm), 8)]


def test_each_image_of_a_question_has_its_kept_tokens(vlm: VLM) -> None:
    two = ask("Which?", picture(0), picture(1))
    one = ask("Which?", picture(1))
    with ocvtp.prune(vlm.model, method="random", keep=16, seed=3) as handle:
        first, second = Answerer(vlm, handle).answer([two, one])
    assert [len(kept) for kept in first.kept] == [16, 16]
    assert first.kept[1] == second.kept[0]
    assert Answerer(vlm).answer([two])[0].kept == [144, 144]


def test_an_image_that_is_no_square_is_padded_not_cropped(vlm: VLM) -> None:
    wide = picture(0, (96, 48))
    mean = tuple(int(255 * value) for value in vlm.processor.image_processor.image_mean)
    padded = Image.new("RGB", (96, 96), mean)
    padded.paste(wide, (0, 24))
    answerer = Answerer(vlm)
    assert answerer.answer([ask("What?", wide)]) == answerer.answer([ask("What?", padded)])


def test_options_of_a_task_are_kept(vlm: VLM) -> None:
    answerer = Answerer(vlm, max_new_tokens=5)
    assert answerer.answer([QUESTIONS[0]])[0].new_tokens == 5
    longer = answerer.answer([QUESTIONS[0]], {"max_new_tokens": 9, "temperature": 0, "image_aspect_ratio": "original"})
    assert longer[0].new_tokens == 9
    words = longer[0].text.split()
    stop = next(word for word in words if word != words[0])
    cut = answerer.answer([QUESTIONS[0]], {"max_new_tokens": 9, "until": [stop, "\n\n"]})[0].text
    assert cut == longer[0].text.split(stop)[0].strip()
    assert answerer.prompt_template == "USER: <image>\n{question} ASSISTANT:"


def test_text_alone_and_images_under_either_key(vlm: VLM) -> None:
    answerer = Answerer(vlm)
    plain = [{"role": "user", "content": "How many objects are there?"}]
    assert answerer.answer([plain]) == answerer.answer([QUESTIONS[3]])
    same = ask("What color is the square?", picture(1), key="image")
    assert answerer.answer([same]) == answerer.answer([QUESTIONS[1]])
    with pytest.raises(BadInput, match="an image of a question is a str"):
        answerer.answer([ask("What?", "picture.png")])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="a part of type 'video'"):
        answerer.answer([[{"role": "user", "content": [{"type": "video", "url": "v"}]}]])


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("  yes\x00\x07 \x9f", None, "yes"),
        ("\ud800yes", None, "yes"),
        ("yes\n\nUSER: no", ["\n\n"], "yes"),
        ("a ASSISTANT: b STOP c", ["STOP", "ASSISTANT:"], "a"),
        ("a b", "b", "a"),
        ("line\none\ttab", ["", "x"], "line\none\ttab"),
    ],
)
def test_the_end_of_an_answer(text: str, until: Any, expected: str) -> None:
    assert finish(text, until) == expected


def test_a_batch_is_prepared_once_for_all_methods_as_long_as_there_is_room() -> None:
    made: list[int] = []

    def batch(number: int) -> Prepared:
        made.append(number)
        return Prepared({"pixel_values": torch.zeros(25)}, [1], ["0"])

    memory = PreparedMemory(limit=200)
    for number in (0, 1, 0, 2, 0):  # 2 pushes 1 out
        memory.get(number, partial(batch, number))
    assert made == [0, 1, 2]
    memory.get(1, partial(batch, 1))
    assert made == [0, 1, 2, 1]


def test_what_was_prepared_for_one_method_is_as_good_for_the_next(vlm: VLM) -> None:
    batch = Answerer(vlm).prepare(QUESTIONS[:3])
    with ocvtp.prune(vlm.model, method="random", keep=16) as handle:
        pruned = Answerer(vlm, handle).answer_prepared(batch)
        assert pruned == Answerer(vlm, handle).answer_prepared(batch) == Answerer(vlm, handle).answer(QUESTIONS[:3])
    assert Answerer(vlm).answer_prepared(batch) == Answerer(vlm).answer(QUESTIONS[:3])
