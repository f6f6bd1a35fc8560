"""Here each test that asks for a VLM runs with all families: random weights of each, and tiny-qwen as it is shipped."""

from typing import Any

import pytest

FAMILIES = (
    "llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "tiny_qwen", "internvl", "llava_onevision", "gemma3", "smolvlm",
)  # fmt: skip


@pytest.fixture(scope="session", params=FAMILIES)
def vlm(request: pytest.FixtureRequest, make_vlm: Any) -> Any:
    """Each family in turn."""
    return make_vlm(request.param, 0)
