"""A model of one family, prompts for it, and a look whether it is afterwards as it was."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

Picture = Callable[..., Image.Image]


@pytest.fixture
def batch(llava: Any, picture_of: Picture) -> Any:
    """Eight ragged prompts: none, one and two images, of several sizes."""
    images = [
        [picture_of(0)],
        [picture_of(1, 80, 40), picture_of(2)],
        [],
        [picture_of(3, 30, 90)],
        [picture_of(4)],
        [picture_of(5), picture_of(6), picture_of(7)],
        [picture_of(8, 200, 100)],
        [],
    ]
    return images, llava.prompt(images)


@pytest.fixture
def clean(llava: Any) -> Iterator[None]:
    """The model is afterwards as it was."""
    yield
    assert not {"generate", "forward", "_ocvtp_handle"} & set(llava.model.__dict__)
