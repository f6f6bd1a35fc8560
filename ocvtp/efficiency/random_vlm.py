"""VLMs of the catalogue with random weights, made on the device: for measuring time and memory, which do not depend on
what weights say, without fetching any.

Letters: B prompts, I images.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ocvtp.efficiency.shapes import KNOWN, LlmShape, TowerShape, VlmShape, config_in_files
from ocvtp.errors import BadInput
from ocvtp.vlms.catalogue import resolve
from ocvtp.vlms.families import family_of

_TOWER_HEAD = 64
"""Width of an attention head of CLIP's towers."""
_PHOTOGRAPH = 756, 1036
"""Height and width in pixels of an image of a VLM that takes any size: 999 tokens of 28 x 28 pixels."""


def config_of(name: str) -> Any:
    """The transformers config of a VLM: from its shape where that is known, else from its files.

    Raises:
        BadInput: neither a VLM of the catalogue nor a folder with a config.json.
        NotAvailable: its shape is not known, and its files are not on this machine.
    """
    if name not in KNOWN:
        return config_in_files(name)
    shape = KNOWN[name]
    kind = _kind(name)
    from transformers import AutoConfig

    made = _CONFIGS[kind](shape)
    made["text_config"] |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made["tie_word_embeddings"] = made["text_config"]["tie_word_embeddings"] = False
    config = AutoConfig.for_model(kind, **made)
    if kind == "llava_next":
        config.mm_patch_merge_type = "flat"  # 2880 tokens, as in all papers
    return config


def random_vlm(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> Any:
    """A VLM of the catalogue with random weights, in evaluation mode.

    Args:
        name: `llava-1.5-7b`, `llava-next-7b`, `qwen2.5-vl-7b`, ... (`ocvtp.efficiency.shapes.KNOWN`), or what else the
            catalogue has files of, or a folder with a config.json.
        device: where the weights are made.
        dtype: of the weights; float32 on a CPU and bfloat16 elsewhere unless given.
        seed: of the weights.

    Raises:
        BadInput, NotAvailable: as `config_of`.
    """
    from transformers import AutoModelForImageTextToText

    config, device = config_of(name), torch.device(device)
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        )
    model.generation_config.eos_token_id = None
    return model.eval()


def photograph(name: str) -> tuple[int, int]:
    """Height and width in pixels of a photograph as a VLM that takes any size gets it.

    Args:
        name: as in `random_vlm`. Where its processor says how many pixels an image has at most, it is shrunk to them.
    """
    if name in KNOWN or config_in_files(name).model_type not in _NATIVE:
        return _PHOTOGRAPH
    from transformers import AutoImageProcessor

    most = AutoImageProcessor.from_pretrained(resolve(name).folder).size["longest_edge"]
    height, width = _PHOTOGRAPH
    shrink = min(1.0, (most / (height * width)) ** 0.5)
    return int(shrink * height), int(shrink * width)


def random_inputs(
    model: Any, batch: int = 1, *, text_tokens: int = 32, pixels: tuple[int, int] = _PHOTOGRAPH, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of `generate`: in each of B prompts one image of noise, and words without a meaning.

    Args:
        model: of a family that `random_vlm` makes.
        batch: B.
        text_tokens: of a prompt beside the image's.
        pixels: height and width of an image, where the model takes any size.
        seed: of noise and words.

    Raises:
        BadInput: another family, or fewer than two words.
    """
    kind = getattr(model.config, "model_type", "")
    if kind not in _PIXELS:
        raise BadInput(f"no random inputs for a {kind!r} model: only {', '.join(_PIXELS)} are made")
    if text_tokens < 2:
        raise BadInput(f"text_tokens is {text_tokens}: at least 2 are needed, one on each side of the image")
    draws = torch.Generator().manual_seed(seed)
    call = _PIXELS[kind](model.config, batch, draws, pixels)
    family = family_of(model)
    found = family.images(call)
    assert found is not None  # noqa: S101 - just made
    call.pop("num_patches", None)  # of InternVL, whose model counts placeholders
    span = family.spans(found)[0]
    placeholder = family.placeholder
    vocabulary = model.config.get_text_config().vocab_size
    words = torch.randint(vocabulary, (batch, text_tokens), generator=draws)
    while bool((marks := family.stands_for(words)).any()):
        words[marks] = (words[marks] + 1) % vocabulary
    ids_BL = torch.cat([words[:, :1], torch.full((batch, span), placeholder), words[:, 1:]], 1)
    call |= {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    if "mm_token_type_ids" in family.column_inputs:
        call["mm_token_type_ids"] = (ids_BL == placeholder).long()
    if "token_type_ids" in family.column_inputs:
        call["token_type_ids"] = (ids_BL == placeholder).long()
    call["pixel_values"] = call["pixel_values"].to(model.dtype)
    return {name: value.to(model.device) for name, value in call.items()}


# --- Configs ---------------------------------------------------------------------------------------------------------


def _kind(name: str) -> str:
    """Its `model_type`."""
    for start, kind in _KINDS.items():
        if name.startswith(start):
            return kind
    raise BadInput(f"no random weights for {name!r}: only for {', '.join(_KINDS)}")


def _text(llm: LlmShape, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.queries // llm.head,
        "num_key_value_heads": llm.keys // llm.head,
        "vocab_size": llm.vocabulary,
        "max_position_embeddings": 32768,
        **more,
    }


def _vision(tower: TowerShape, kind: str, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch,
        **more,
    }


def _llava(shape: VlmShape) -> dict[str, Any]:
    tower = shape.tower
    vision = _vision(tower, "clip_vision_model", tower.width // _TOWER_HEAD)
    text = _text(shape.llm, model_type="llama")
    return {"vision_config": vision, "text_config": text, "image_token_id": 32000,
            "image_seq_length": tower.patches_per_tile}  # fmt: skip


def _llava_next(shape: VlmShape) -> dict[str, Any]:
    side = 2 * (shape.tower.image_size or 0)
    return _llava(shape) | {"image_grid_pinpoints": [[side, side]]}


def _native(tower: TowerShape, llm: LlmShape) -> dict[str, Any]:
    return {
        "depth": tower.layers,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_heads": 16,
        "patch_size": tower.patch,
        "spatial_merge_size": tower.merge,
        "out_hidden_size": llm.width,
    }


def _mrope(interleaved: bool) -> dict[str, Any]:
    section = {"mrope_section": [24, 20, 20], "mrope_interleaved": True} if interleaved else {
        "mrope_section": [16, 24, 24]}  # fmt: skip
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **section}}


def _qwen2_5(shape: VlmShape) -> dict[str, Any]:
    return {"vision_config": _native(shape.tower, shape.llm), "text_config": _text(shape.llm, **_mrope(False))}


def _qwen3(shape: VlmShape) -> dict[str, Any]:
    tower, planes = shape.tower, shape.projectors - 1
    third = tower.layers // (planes or 1)
    deep = [third * plane + third - 1 for plane in range(planes)]
    vision = _native(tower, shape.llm) | {"deepstack_visual_indexes": deep}
    return {"vision_config": vision, "text_config": _text(shape.llm, head_dim=shape.llm.head, **_mrope(True))}


def _internvl(shape: VlmShape) -> dict[str, Any]:
    tower = shape.tower
    square = {"image_size": [tower.image_size] * 2, "patch_size": [tower.patch] * 2}
    text = _text(shape.llm, model_type="qwen3", head_dim=shape.llm.head)
    vision = _vision(tower, "internvl_vision", tower.width // _TOWER_HEAD) | square
    return {"vision_config": vision, "text_config": text, "image_seq_length": tower.tokens_per_tile,
            "downsample_ratio": 1 / tower.merge, "image_token_id": 151671}  # fmt: skip


def _onevision(shape: VlmShape) -> dict[str, Any]:
    vision = _vision(shape.tower, "siglip_vision_model", 16, vision_use_head=False)
    text = _text(shape.llm, model_type="qwen2")
    return {"vision_config": vision, "text_config": text, "vision_feature_layer": -1, "image_token_id": 151646}


def _gemma3(shape: VlmShape) -> dict[str, Any]:
    vision = _vision(shape.tower, "siglip_vision_model", 16, vision_use_head=False)
    text = _text(shape.llm, model_type="gemma3_text", head_dim=shape.llm.head)
    return {"vision_config": vision, "text_config": text, "mm_tokens_per_image": shape.tower.tokens_per_tile}


def _smolvlm(shape: VlmShape) -> dict[str, Any]:
    vision = _vision(shape.tower, "smolvlm_vision", 16)
    return {"vision_config": vision, "text_config": _text(shape.llm, model_type="llama"),
            "scale_factor": shape.tower.merge, "image_token_id": 49190}  # fmt: skip


# --- Images ----------------------------------------------------------------------------------------------------------


def _square(config: Any, batch: int, draws: torch.Generator, _: tuple[int, int]) -> dict[str, Tensor]:
    side = config.vision_config.image_size
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=draws)}


def _five_tiles(config: Any, batch: int, draws: torch.Generator, _: tuple[int, int]) -> dict[str, Tensor]:
    side = config.vision_config.image_size
    sizes = torch.tensor(config.image_grid_pinpoints[0]).expand(batch, 2)
    return {"pixel_values": torch.randn(batch, 5, 3, side, side, generator=draws), "image_sizes": sizes}


def _patches(config: Any, batch: int, draws: torch.Generator, pixels: tuple[int, int]) -> dict[str, Tensor]:
    vision = config.vision_config
    token = vision.patch_size * vision.spatial_merge_size
    rows, columns = (round(side / token) * vision.spatial_merge_size for side in pixels)
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, rows, columns]]).expand(batch, 3)
    return {"pixel_values": torch.randn(batch * rows * columns, numbers, generator=draws), "image_grid_thw": grid}


def _tiles_and_thumbnail(config: Any, batch: int, draws: torch.Generator, pixels: tuple[int, int]) -> dict[str, Tensor]:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    side = config.vision_config.image_size[0]
    columns, rows = get_optimal_tiled_canvas(pixels, (side, side), 1, 12)
    tiles = columns * rows + 1
    return {"pixel_values": torch.randn(batch * tiles, 3, side, side, generator=draws),
            "num_patches": torch.full((batch,), tiles)}  # fmt: skip


def _any_resolution(config: Any, batch: int, draws: torch.Generator, pixels: tuple[int, int]) -> dict[str, Tensor]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = config.vision_config.image_size
    tiles = image_size_to_num_patches(pixels, config.image_grid_pinpoints, side)
    return {"pixel_values": torch.randn(batch, tiles, 3, side, side, generator=draws),
            "image_sizes": torch.tensor(pixels).expand(batch, 2)}  # fmt: skip


def _one_tile(config: Any, batch: int, draws: torch.Generator, pixels: tuple[int, int]) -> dict[str, Tensor]:
    return {"pixel_values": _square(config, batch, draws, pixels)["pixel_values"][:, None]}


_NATIVE = ("qwen2_5_vl", "qwen3_vl")
"""Families whose images keep their size."""
_KINDS = {
    "llava-1.5": "llava",
    "llava-next": "llava_next",
    "llava-onevision": "llava_onevision",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "internvl": "internvl",
    "gemma-3": "gemma3",
    "smolvlm": "smolvlm",
}
_CONFIGS: Mapping[str, Callable[[VlmShape], dict[str, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "internvl": _internvl,
    "llava_onevision": _onevision,
    "gemma3": _gemma3,
    "smolvlm": _smolvlm,
}
_PIXELS: Mapping[str, Callable[[Any, int, torch.Generator, tuple[int, int]], dict[str, Tensor]]] = {
    "llava": _square,
    "llava_next": _five_tiles,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "internvl": _tiles_and_thumbnail,
    "llava_onevision": _any_resolution,
    "gemma3": _square,
    "smolvlm": _one_tile,
}
