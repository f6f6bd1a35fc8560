"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): our models take the place of its own.

A model whose config has no entry `ocvtp` is served as vLLM serves it. One that has it is pruned or, if it is of a
family or this is a version of vLLM that is not known here, refused: never served as if nothing had been asked for.
"""

from typing import Any

from ocvtp.errors import NotAvailable
from ocvtp.serving.section import SECTION
from ocvtp.vlms.families import FAMILIES

FIRST, BEFORE = "0.32", "0.33"
"""Versions of vLLM whose inside is known here: from the one on, before the other."""
MODELS = {
    "LlavaForConditionalGeneration": "ocvtp.serving.vllm_llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "ocvtp.serving.vllm_llava:PrunedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "ocvtp.serving.vllm_qwen:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "ocvtp.serving.vllm_qwen:PrunedQwen3VL",
}
"""What is pruned, by architecture, as vLLM's register wants it."""
_own: dict[str, Any] = {}
"""vLLM's entries for the models that refuse."""


def register() -> None:
    """Put our models into vLLM's register. May be called again."""
    import vllm

    models = vllm.ModelRegistry.models
    for architecture in FAMILIES:
        if architecture in MODELS and known(vllm.__version__):
            vllm.ModelRegistry.register_model(architecture, MODELS[architecture])
        elif architecture in models and architecture not in _own:
            _own[architecture] = models[architecture]
            vllm.ModelRegistry.register_model(architecture, f"{__name__}:{architecture}")


def known(version: str) -> bool:
    """Whether a version of vLLM is one of those."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())

    return numbers(FIRST) <= numbers(version) < numbers(BEFORE)


def check(architecture: str, config: Any, version: str) -> None:
    """`NotAvailable` if a config asks for pruning where there is none."""
    if getattr(config, SECTION, None) is None:
        return
    if architecture in MODELS:
        raise NotAvailable(
            f"this is vLLM {version}, but ocvtp prunes in vLLM >= {FIRST}, < {BEFORE}: install such a one, or leave "
            f"{SECTION} out of the model's config"
        )
    raise NotAvailable(
        f"ocvtp does not prune {architecture} in vLLM, but {', '.join(MODELS)} alone: leave {SECTION} out of the "
        "model's config, or use `ocvtp.prune` with transformers"
    )


def __getattr__(architecture: str) -> Any:
    """The own model that vLLM has of an architecture, which refuses to be pruned."""
    if architecture not in _own:
        raise AttributeError(f"module {__name__!r} has no attribute {architecture!r}")
    import vllm

    own: Any = _own[architecture].load_model_cls()

    def begin(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        check(architecture, vllm_config.model_config.hf_config, vllm.__version__)
        own.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(own.__name__, (own,), {"__init__": begin, "__module__": __name__})
