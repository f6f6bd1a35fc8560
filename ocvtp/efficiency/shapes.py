"""The sizes of a VLM that its cost depends on, read from a transformers config.

A tower is CLIP's (square images, a CLS token, two matrices in the MLP) or Qwen2.5-VL's (any grid, attention
inside windows in most layers, three matrices in the MLP). A language model is a Llama or a Qwen2: grouped
keys and values, three matrices in the MLP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ocvtp.errors import BadInput, Incompatible


@dataclass(frozen=True)
class TowerShape:
    """A vision tower. `used_layers` is how many of its `layers` the features need."""

    kind: Literal["clip", "qwen"]
    width: int
    layers: int
    used_layers: int
    mlp: int
    patch: int
    patch_inputs: int
    """Numbers in a patch: channels x height x width (x frames)."""
    image_size: int | None = None
    """Side of a tile in pixels; None where images keep their size."""
    merge: int = 1
    """Patches on a side of a merged token."""
    window: int | None = None
    """Merged tokens on a side of an attention window; None where attention is global everywhere."""
    global_layers: tuple[int, ...] = ()
    """Layers with global attention, where the others have windows."""

    @property
    def tokens_per_tile(self) -> int | None:
        """Patch tokens of a tile; None where images keep their size."""
        return None if self.image_size is None else (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class LlmShape:
    """A language model. `queries` and `keys` are heads times the size of a head."""

    width: int
    layers: int
    mlp: int
    queries: int
    keys: int
    vocabulary: int


@dataclass(frozen=True)
class VlmShape:
    """A tower, a language model and what lies between: `feature_width` is what the projector takes."""

    tower: TowerShape
    llm: LlmShape
    feature_width: int

    @property
    def projects_before_pruning(self) -> bool:
        """True where the projector is part of the tower (Qwen2.5-VL's merger): it sees every token."""
        return self.tower.kind == "qwen"


def shape_of(config: Any) -> VlmShape:
    """The shape of a VLM from its transformers config.

    Args:
        config: the config of a LLaVA, a LLaVA-NeXT or a Qwen2.5-VL (`model.config`).

    Raises:
        Incompatible: another kind of model, tower or language model.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind in ("llava", "llava_next"):
        return _llava(config)
    if kind == "qwen2_5_vl":
        return _qwen(config)
    raise Incompatible(f"cost of a {kind!r} model: only llava, llava_next and qwen2_5_vl are counted")


def known_shape(name: str) -> VlmShape:
    """The shape of a VLM of the catalogue without its config file.

    Raises:
        BadInput: a name that has no shape here; `shape_of(config)` takes any.
    """
    if name not in KNOWN:
        raise BadInput(f"no shape is known for the VLM {name!r}; known: {', '.join(KNOWN)}")
    return KNOWN[name]


def _llava(config: Any) -> VlmShape:
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise Incompatible(f"cost of a {vision.model_type!r} tower: only clip_vision_model is counted in a LLaVA")
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    tower = TowerShape(
        kind="clip",
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        used_layers=max(layer % (vision.num_hidden_layers + 1) for layer in chosen),
        mlp=vision.intermediate_size,
        patch=vision.patch_size,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        image_size=vision.image_size,
    )
    return VlmShape(tower, _llm(config.text_config), feature_width=vision.hidden_size * len(chosen))


def _qwen(config: Any) -> VlmShape:
    vision = config.vision_config
    tower = TowerShape(
        kind="qwen",
        width=vision.hidden_size,
        layers=vision.depth,
        used_layers=vision.depth,
        mlp=vision.intermediate_size,
        patch=vision.patch_size,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge=vision.spatial_merge_size,
        window=vision.window_size // vision.patch_size // vision.spatial_merge_size,
        global_layers=tuple(vision.fullatt_block_indexes),
    )
    width = vision.hidden_size * vision.spatial_merge_size**2
    return VlmShape(tower, _llm(config.text_config), feature_width=width)


def _llm(text: Any) -> LlmShape:
    if text.model_type not in ("llama", "mistral", "qwen2", "qwen2_5_vl_text"):
        raise Incompatible(f"cost of a {text.model_type!r} language model: only llama, mistral and qwen2 are counted")
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return LlmShape(
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        mlp=text.intermediate_size,
        queries=head * text.num_attention_heads,
        keys=head * text.num_key_value_heads,
        vocabulary=text.vocab_size,
    )


_CLIP_L_336 = TowerShape("clip", 1024, 24, 23, 4096, 14, 3 * 14**2, image_size=336)
_QWEN_TOWER = TowerShape(
    "qwen", 1280, 32, 32, 3420, 14, 3 * 2 * 14**2, merge=2, window=4, global_layers=(7, 15, 23, 31)
)
_VICUNA_7B = LlmShape(4096, 32, 11008, 4096, 4096, 32064)
_VICUNA_13B = LlmShape(5120, 40, 13824, 5120, 5120, 32064)

KNOWN: Mapping[str, VlmShape] = {
    "llava-1.5-7b": VlmShape(_CLIP_L_336, _VICUNA_7B, 1024),
    "llava-1.5-13b": VlmShape(_CLIP_L_336, _VICUNA_13B, 1024),
    "llava-next-7b": VlmShape(_CLIP_L_336, _VICUNA_7B, 1024),
    "qwen2.5-vl-3b": VlmShape(_QWEN_TOWER, LlmShape(2048, 36, 11008, 2048, 256, 151936), 5120),
    "qwen2.5-vl-7b": VlmShape(_QWEN_TOWER, LlmShape(3584, 28, 18944, 3584, 512, 152064), 5120),
}
"""Shapes of the large VLMs of the catalogue, so that their cost can be told without their config files."""
