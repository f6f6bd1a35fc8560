"""Which classes of transformers can be pruned, and by which adapter."""

from collections.abc import Mapping
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.vlms.family import Family
from ocvtp.vlms.llava import LlavaFamily
from ocvtp.vlms.llava_next import LlavaNextFamily
from ocvtp.vlms.qwen2_5_vl import Qwen25VLFamily
from ocvtp.vlms.qwen3_vl import Qwen3VLFamily

FAMILIES: Mapping[str, type[Family]] = {
    "LlavaForConditionalGeneration": LlavaFamily,
    "LlavaNextForConditionalGeneration": LlavaNextFamily,
    "Qwen2_5_VLForConditionalGeneration": Qwen25VLFamily,
    "Qwen3VLForConditionalGeneration": Qwen3VLFamily,
}
"""Classes of transformers that can be pruned."""


def family_class(architecture: str, name: str) -> type[Family]:
    """The adapter of a class; `BadInput` says which are supported. `name` is that of the VLM, for people."""
    if architecture not in FAMILIES:
        raise BadInput(f"{name} is a {architecture}, which cannot be pruned; supported are {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def family_of(model: Any) -> Family:
    """The adapter of a loaded model; `BadInput` says which classes are supported."""
    name = next((c.__name__ for c in type(model).__mro__ if c.__name__ in FAMILIES), type(model).__name__)
    return family_class(name, "this model")(model)
