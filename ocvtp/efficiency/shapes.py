"""The sizes of a VLM that its cost depends on, read from a transformers config.

A tower sees tiles of equal size (CLIP, SigLIP, InternViT: two matrices in the MLP, perhaps a CLS token), or images of
any size (Qwen-VL: any grid of patches, attention inside windows in most layers of Qwen2.5-VL, whose MLP has three
matrices). A language model is a Llama or one of its like: grouped keys and values, three matrices in the MLP.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ocvtp.errors import BadInput, Incompatible


@dataclass(frozen=True)
class TowerShape:
    """A vision tower. `used_layers` is how many of its `layers` run."""

    kind: Literal["tiles", "native"]
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
    """Patches on a side of a token."""
    window: int | None = None
    """Merged tokens on a side of an attention window; None where attention is global everywhere."""
    global_layers: tuple[int, ...] = ()
    """Layers with global attention, where the others have windows."""
    cls: bool = False
    """A CLS token comes before the patches of a tile."""
    matrices: int = 2
    """In the MLP."""

    @property
    def patches_per_tile(self) -> int | None:
        """Patches of a tile; None where images keep their size."""
        return None if self.image_size is None else (self.image_size // self.patch) ** 2

    @property
    def tokens_per_tile(self) -> int | None:
        """Tokens of a tile; None where images keep their size."""
        return None if self.patches_per_tile is None else self.patches_per_tile // self.merge**2


@dataclass(frozen=True)
class LlmShape:
    """A language model. `queries` and `keys` are heads times the size of a head, which is `head`."""

    width: int
    layers: int
    mlp: int
    queries: int
    keys: int
    vocabulary: int
    head: int = 128


@dataclass(frozen=True)
class VlmShape:
    """A tower, a language model and what lies between.

    Attributes:
        feature_width: what the projector takes of a token.
        hidden: width between the projector's two matrices; 0: it has one; None: that of the language model.
        projects: what passes the projector: tokens that are kept, all tokens, or all patches.
        projectors: how many there are (Qwen3-VL's DeepStack has several).
    """

    tower: TowerShape
    llm: LlmShape
    feature_width: int
    hidden: int | None = None
    projects: Literal["kept", "tokens", "patches"] = "kept"
    projectors: int = 1


def shape_of(config: Any) -> VlmShape:
    """The shape of a VLM from its transformers config.

    Args:
        config: of a supported family (`model.config`).

    Raises:
        Incompatible: another kind of model, tower or language model.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in _READERS:
        raise Incompatible(f"cost of a {kind!r} model: only {', '.join(_READERS)} are counted")
    return _READERS[kind](config)


def config_in_files(name: str) -> Any:
    """The transformers config of a VLM of the catalogue, or of a folder, as its files have it; no weights are read.

    Raises:
        BadInput: neither of the two.
        NotAvailable: its files are not on this machine.
    """
    from ocvtp.vlms import catalog, resolve

    if name not in catalog() and not (Path(name) / "config.json").is_file():
        raise BadInput(
            f"{name!r} is neither a VLM of the catalogue ({', '.join(catalog())}) nor a folder with a config.json"
        )
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve(name).folder)


def known_shape(name: str) -> VlmShape:
    """The shape of a VLM of the catalogue without its config file.

    Raises:
        BadInput: a name that has no shape here; `shape_of(config)` takes any.
    """
    if name not in KNOWN:
        raise BadInput(f"no shape is known for the VLM {name!r}; known: {', '.join(KNOWN)}")
    return KNOWN[name]


def parameters(shape: VlmShape) -> int:
    """Of the matrices of a VLM, embeddings and head among them: what its memory is made of.

    Where the head is the embeddings (Gemma 3, Qwen's small models) that matrix is counted twice.
    """
    llm = shape.llm
    return (
        llm_parameters(llm)
        + 2 * llm.width * llm.vocabulary
        + tower_parameters(shape.tower, shape.tower.layers)
        + projector_parameters(shape)
    )


def tower_parameters(tower: TowerShape, layers: int) -> int:
    """Of the matrices of so many of its layers."""
    return layers * tower.width * (4 * tower.width + tower.matrices * tower.mlp)


def projector_parameters(shape: VlmShape) -> int:
    """Of the matrices of all projectors: C -> d -> d, Qwen's 4C -> 4C -> d, or one matrix."""
    features, width = shape.feature_width, shape.llm.width
    hidden = width if shape.hidden is None else shape.hidden
    return shape.projectors * (features * hidden + hidden * width if hidden else features * width)


def llm_parameters(llm: LlmShape) -> int:
    """Of the matrices of its layers, without embeddings and head."""
    return llm.layers * llm.width * (2 * llm.queries + 2 * llm.keys + 3 * llm.mlp)


def _tiles(config: Any, merge: int = 1) -> TowerShape:
    vision = config.vision_config
    if vision.model_type not in _CLS:
        raise Incompatible(f"cost of a {vision.model_type!r} tower: only {', '.join(_CLS)} are counted")
    size, patch = (each if isinstance(each, int) else each[0] for each in (vision.image_size, vision.patch_size))
    return TowerShape(
        kind="tiles",
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        used_layers=vision.num_hidden_layers,
        mlp=vision.intermediate_size,
        patch=patch,
        patch_inputs=vision.num_channels * patch**2,
        image_size=size,
        merge=merge,
        cls=_CLS[vision.model_type],
    )


def _llava(config: Any) -> VlmShape:
    tower, chosen = _tiles(config), config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    used = max(layer % (tower.layers + 1) for layer in chosen)
    return VlmShape(replace(tower, used_layers=used), _llm(config.text_config), tower.width * len(chosen))


def _onevision(config: Any) -> VlmShape:
    return replace(_llava(config), tower=_tiles(config), projects="patches")


def _internvl(config: Any) -> VlmShape:
    merge = round(1 / config.downsample_ratio)
    tower = _tiles(config, merge)
    return VlmShape(tower, _llm(config.text_config), tower.width * merge**2, projects="tokens")


def _gemma3(config: Any) -> VlmShape:
    vision = config.vision_config
    tower = _tiles(config, vision.image_size // vision.patch_size // int(config.mm_tokens_per_image**0.5))
    return VlmShape(tower, _llm(config.text_config), tower.width, hidden=0, projects="tokens")


def _smolvlm(config: Any) -> VlmShape:
    tower = _tiles(config, config.scale_factor)
    width = tower.width * config.scale_factor**2
    return VlmShape(tower, _llm(config.text_config), width, hidden=0, projects="tokens")


def _qwen(config: Any) -> VlmShape:
    vision = config.vision_config
    windows, deep = getattr(vision, "window_size", None), getattr(vision, "deepstack_visual_indexes", ())
    tower = TowerShape(
        kind="native",
        width=vision.hidden_size,
        layers=vision.depth,
        used_layers=vision.depth,
        mlp=vision.intermediate_size,
        patch=vision.patch_size,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge=vision.spatial_merge_size,
        window=None if windows is None else windows // vision.patch_size // vision.spatial_merge_size,
        global_layers=tuple(range(vision.depth) if windows is None else vision.fullatt_block_indexes),
        matrices=2 if windows is None else 3,
    )
    width = vision.hidden_size * vision.spatial_merge_size**2
    llm = _llm(config.text_config)
    return VlmShape(tower, llm, width, hidden=width, projects="tokens", projectors=1 + len(deep))


def _llm(text: Any) -> LlmShape:
    if text.model_type not in _LLMS:
        raise Incompatible(f"cost of a {text.model_type!r} language model: only {', '.join(_LLMS)} are counted")
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return LlmShape(
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        mlp=text.intermediate_size,
        queries=head * text.num_attention_heads,
        keys=head * text.num_key_value_heads,
        vocabulary=text.vocab_size,
        head=head,
    )


_CLS = {
    "clip_vision_model": True,
    "siglip_vision_model": False,
    "internvl_vision": True,
    "smolvlm_vision": False,
}
"""Towers that see tiles, and whether they have a CLS token."""
_LLMS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text", "gemma3_text")
_READERS: Mapping[str, Callable[[Any], VlmShape]] = {
    "llava": _llava,
    "llava_next": _llava,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "llava_onevision": _onevision,
    "gemma3": _gemma3,
    "smolvlm": _smolvlm,
}
_CLIP_L_336 = TowerShape("tiles", 1024, 24, 23, 4096, 14, 3 * 14**2, image_size=336, cls=True)
_QWEN_TOWER = TowerShape(
    "native", 1280, 32, 32, 3420, 14, 3 * 2 * 14**2, merge=2, window=4, global_layers=(7, 15, 23, 31), matrices=3
)
_VICUNA_7B = LlmShape(4096, 32, 11008, 4096, 4096, 32064)
_VICUNA_13B = LlmShape(5120, 40, 13824, 5120, 5120, 32064)
_QWEN3_4B = TowerShape("native", 1024, 24, 24, 4096, 16, 3 * 2 * 16**2, merge=2, global_layers=tuple(range(24)))
_QWEN3_8B = TowerShape("native", 1152, 27, 27, 4304, 16, 3 * 2 * 16**2, merge=2, global_layers=tuple(range(27)))
_INTERN_VIT_300M = TowerShape("tiles", 1024, 24, 24, 4096, 14, 3 * 14**2, image_size=448, merge=2, cls=True)
_SIGLIP = TowerShape("tiles", 1152, 27, 27, 4304, 14, 3 * 14**2, image_size=384)

KNOWN: Mapping[str, VlmShape] = {
    "llava-1.5-7b": VlmShape(_CLIP_L_336, _VICUNA_7B, 1024),
    "llava-1.5-13b": VlmShape(_CLIP_L_336, _VICUNA_13B, 1024),
    "llava-next-7b": VlmShape(_CLIP_L_336, _VICUNA_7B, 1024),
    "qwen2.5-vl-3b": VlmShape(_QWEN_TOWER, LlmShape(2048, 36, 11008, 2048, 256, 151936), 5120, 5120, "tokens"),
    "qwen2.5-vl-7b": VlmShape(_QWEN_TOWER, LlmShape(3584, 28, 18944, 3584, 512, 152064), 5120, 5120, "tokens"),
    "qwen3-vl-4b": VlmShape(_QWEN3_4B, LlmShape(2560, 36, 9728, 4096, 1024, 151936), 4096, 4096, "tokens", 4),
    "qwen3-vl-8b": VlmShape(_QWEN3_8B, LlmShape(4096, 36, 12288, 4096, 1024, 151936), 4608, 4608, "tokens", 4),
    "internvl3.5-8b": VlmShape(
        _INTERN_VIT_300M, LlmShape(4096, 36, 12288, 4096, 1024, 151936), 4096, projects="tokens"
    ),
    "llava-onevision-7b": VlmShape(
        replace(_SIGLIP, layers=26, used_layers=26),
        LlmShape(3584, 28, 18944, 3584, 512, 152000),
        1152,
        projects="patches",
    ),
    "gemma-3-4b": VlmShape(
        replace(_SIGLIP, image_size=896, merge=4),
        LlmShape(2560, 34, 10240, 2048, 1024, 262208, head=256),
        1152,
        0,
        "tokens",
    ),
    "smolvlm2-2.2b": VlmShape(
        replace(_SIGLIP, merge=3), LlmShape(2048, 24, 8192, 2048, 2048, 49280, head=64), 10368, 0, "tokens"
    ),
}
"""Shapes of the large VLMs of the catalogue, so that their cost can be told without their config files."""
