"""Here each test that asks for a VLM runs with all families: random weights of each, and tiny-qwen as it is shipped."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

Picture = Callable[..., Image.Image]
FAMILIES = (
    "llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "tiny_qwen", "internvl", "llava_onevision", "gemma3", "smolvlm",
)  # fmt: skip


@pytest.fixture(scope="session", params=FAMILIES)
def vlm(request: pytest.FixtureRequest, make_vlm: Any) -> Any:
    """Each family in turn."""
    return make_vlm(request.param, 0)


@pytest.fixture(scope="module")
def images(picture_of: Picture) -> list[list[Image.Image]]:
    """Eight prompts: none, one, two and three images, of several sizes."""
    return [
        [picture_of(0)],
        [picture_of(1, 80, 40), picture_of(2)],
        [],
        [picture_of(3, 30, 90)],
        [picture_of(4, 130, 120)],
        [picture_of(5), picture_of(6, 90, 90), picture_of(7)],
        [picture_of(8, 200, 100)],
        [],
    ]


@pytest.fixture
def batch(vlm: Any, images: Any) -> Any:
    """These prompts as the model takes them."""
    return vlm.prompt(images)


@pytest.fixture
def clean(vlm: Any) -> Iterator[None]:
    """The model is afterwards as it was."""
    yield
    assert not {"generate", "forward", "_ocvtp_handle"} & set(vlm.model.__dict__)
