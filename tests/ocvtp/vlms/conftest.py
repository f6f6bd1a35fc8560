"""Here each test that asks for a VLM runs with all families."""

from typing import Any

import pytest

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3", "smolvlm")


@pytest.fixture(scope="session", params=FAMILIES)
def vlm(request: pytest.FixtureRequest, make_vlm: Any) -> Any:
    """Each family in turn."""
    return make_vlm(request.param, 0)
