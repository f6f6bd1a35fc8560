"""Which classes of transformers can be pruned, and by which adapter."""

from collections.abc import Mapping
from typing import Any

from ocvtp.errors import BadInput
from ocvtp.vlms.families.gemma3 import Gemma3Family
from ocvtp.vlms.families.internvl import InternVLFamily
from ocvtp.vlms.families.llava import LlavaFamily
from ocvtp.vlms.families.llava_next import LlavaNextFamily
from ocvtp.vlms.families.onevision import OneVisionFamily
from ocvtp.vlms.families.qwen2_5_vl import Qwen25VLFamily
from ocvtp.vlms.families.qwen3_vl import Qwen3VLFamily
from ocvtp.vlms.families.smolvlm import SmolVLMFamily
from ocvtp.vlms.family import Family

FAMILIES: Mapping[str, type[Family]] = {
    "LlavaForConditionalGeneration": LlavaFamily,
    "LlavaNextForConditionalGeneration": LlavaNextFamily,
    "Qwen2_5_VLForConditionalGeneration": Qwen25VLFamily,
    "Qwen3VLForConditionalGeneration": Qwen3VLFamily,
    "InternVLForConditionalGeneration": InternVLFamily,
    "LlavaOnevisionForConditionalGeneration": OneVisionFamily,
    "Gemma3ForConditionalGeneration": Gemma3Family,
    "SmolVLMForConditionalGeneration": SmolVLMFamily,
}
"""Classes of transformers that can be pruned."""


def family_class(architecture: str, name: str) -> type[Family]:
    """The adapter of a class; `BadInput` says which are supported. `name` is that of the VLM, for people."""
    if architecture not in FAMILIES:
        raise BadInput(
            f"{name} is a {architecture}, which cannot be pruned; supported are {', '.join(FAMILIES)}. "
            "docs/your-own-vlm.md says how to add a class: one file and one entry of ocvtp.vlms.families.FAMILIES"
        )
    return FAMILIES[architecture]


def family_of(model: Any) -> Family:
    """The adapter of a loaded model; `BadInput` says which classes are supported."""
    name = next((c.__name__ for c in type(model).__mro__ if c.__name__ in FAMILIES), type(model).__name__)
    base = getattr(model, "get_base_model", None)
    if name not in FAMILIES and base is not None and type(base()).__name__ in FAMILIES:
        raise BadInput(
            f"this model is a {name} around a {type(base()).__name__}: prune what its get_base_model() returns; its "
            "adapters stay on, and generate of either is pruned"
        )
    return family_class(name, "this model")(model)
