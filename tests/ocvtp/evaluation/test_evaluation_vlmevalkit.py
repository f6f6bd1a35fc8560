"""Messages as VLMEvalKit gives them, against the same questions as chat messages."""

from pathlib import Path
from typing import Any

import pytest
from evaluation_data import picture
from PIL import Image

from ocvtp.errors import BadInput
from ocvtp.evaluation.generate import Answerer
from ocvtp.evaluation.setting import EvaluationSetting, ready
from ocvtp.evaluation.vlmevalkit import OcvtpVLM, conversation

QUESTION = "What color is the square?"


@pytest.fixture(scope="module")
def model(vlm_folder: Path) -> OcvtpVLM:
    return OcvtpVLM(str(vlm_folder), "random", 16, seed=1, max_new_tokens=6)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        (folder / f"{number}.png").write_bytes(picture(number, (96, 96))["bytes"])
    return [str(folder / f"{number}.png") for number in range(2)]


def image(path: str) -> dict[str, str]:
    return {"type": "image", "value": path}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "value": said}


def asked(answerer: Answerer, *parts: Any) -> str:
    content = [part if isinstance(part, dict) else {"type": "image", "image": part} for part in parts]
    return answerer.answer([[{"role": "user", "content": content}]])[0].text


def test_answers_are_those_to_the_same_questions(model: OcvtpVLM, vlm_folder: Path, paths: list[str]) -> None:
    first, second = (Image.open(path).convert("RGB") for path in paths)
    said = {"type": "text", "text": QUESTION}
    setting = EvaluationSetting(str(vlm_folder), "random", 16, seed=1, max_new_tokens=6)
    with ready(setting, shared=False) as answerer:
        one, two, words = (asked(answerer, first, said), asked(answerer, first, second, said), asked(answerer, said))
    assert len({one, two, words}) == 3
    assert model.generate([image(paths[0]), text(QUESTION)], dataset="MMBench_DEV_EN") == one
    assert model.generate(message=[paths[0], QUESTION], dataset=None) == one
    assert model.generate([image(paths[0]), image(paths[1]), text(QUESTION)]) == two
    assert [len(kept) for kept in model.answerer.handle.last_kept] == [16, 16]
    assert model.generate(QUESTION) == model.generate(text(QUESTION)) == model.generate([QUESTION]) == words


def test_what_vlmevalkit_asks_of_a_model(model: OcvtpVLM, paths: list[str]) -> None:
    """Of `vlmeval/inference.py` what its loop touches."""
    assert not model.is_api
    assert model.INTERLEAVE
    model.set_dump_image(lambda line: [])
    assert not model.use_custom_prompt("MME")
    assert isinstance(model.generate(message=[image(paths[0]), text(QUESTION)], dataset="MME"), str)


def test_parts_stay_in_their_order_and_turns_apart(paths: list[str]) -> None:
    message = [
        {"type": "text", "value": "Be brief.", "role": "system"}, text("Is"), image(paths[0]), "red, or", paths[1],
    ]  # fmt: skip
    system, user = conversation(message)
    assert (system["role"], system["content"]) == ("system", [{"type": "text", "text": "Be brief."}])
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["text", "image", "text", "image"]
    for words in (f"{'Is it red? ' * 500}a.png", "a\0b.png"):
        assert conversation([words])[0]["content"] == [{"type": "text", "text": words}], "too long for a path, or none"
    assert conversation("no/such.png")[0]["content"] == [{"type": "text", "text": "no/such.png"}]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ([], "a message without any part"),
        ([{"type": "text"}], r"a part of a message is \{'type': 'text'\}"),
        ([3], "a part of a message is 3"),
        ([{"type": "video", "value": "a.mp4"}], "is of type 'video'; text and image can be answered"),
        ([{"type": "image", "value": "nowhere.png"}], r"nowhere\.png"),
        ([{"type": "image", "value": f"{'long' * 100}.png"}], "longlong"),
        ([{"type": "image", "value": __file__}], r"test_evaluation_vlmevalkit\.py"),
    ],
)
def test_what_is_no_message_is_named(message: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        conversation(message)
