"""Small VLMs of other families in folders: a LLaVA-NeXT with the weights of tiny-llava, a random Qwen2.5-VL, tiny-qwen
as it is shipped, and a random LLaVA-OneVision, which is not served.

Heads are 32 wide, the least that vLLM's attention on CPUs takes.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)

from ocvtp import vlms

PINPOINTS = [[96, 192], [192, 96], [192, 192]]


def llava(_: Path) -> Path:
    """tiny-llava."""
    return vlms.resolve("tiny-llava").folder


def llava_next(folder: Path) -> Path:
    """One whole image and two to four tiles of 144 tokens, without newlines."""
    tiny = vlms.load("tiny-llava")
    own = tiny.model.config
    config = LlavaNextConfig(
        vision_config=own.vision_config.to_dict(), text_config=own.text_config.to_dict(),
        image_token_id=own.image_token_id, image_seq_length=own.image_seq_length, image_grid_pinpoints=PINPOINTS,
        projector_hidden_act=own.projector_hidden_act, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    config.mm_patch_merge_type = "flat"
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    missing, unknown = model.load_state_dict(tiny.model.state_dict(), strict=False)
    assert (missing, unknown) == (["model.image_newline"], [])
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tiny.processor.tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tiny.processor.chat_template,
    )  # fmt: skip
    return _saved(model, processor, folder)


def qwen2_5_vl(folder: Path) -> Path:
    """16 to 144 tokens of 2 x 2 patches; windows of 4 x 4 tokens in all blocks but two; M-RoPE."""
    tiny = vlms.resolve("tiny-qwen").folder
    own, theirs = AutoConfig.from_pretrained(tiny), AutoProcessor.from_pretrained(tiny)
    text = {name: getattr(own.text_config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={"depth": 5, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 8,
                       "spatial_merge_size": 2, "out_hidden_size": text["hidden_size"], "window_size": 64,
                       "fullatt_block_indexes": [2, 4]},
        **{name: getattr(own, name) for name in (
            "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # larger than transformers draws them, so that answers depend on what is seen
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.4 * weight[0].numel() ** -0.5)
    videos = Qwen2VLVideoProcessor(patch_size=8, size={"shortest_edge": 1024, "longest_edge": 36864})
    processor = Qwen2_5_VLProcessor(
        image_processor=theirs.image_processor, tokenizer=theirs.tokenizer, video_processor=videos,
        chat_template=theirs.chat_template,
    )  # fmt: skip
    return _saved(model, processor, folder)


def qwen3_vl(_: Path) -> Path:
    """tiny-qwen: up to 144 tokens of 2 x 2 patches, DeepStack and M-RoPE; it answers questions about scenes."""
    return vlms.resolve("tiny-qwen").folder


def onevision(folder: Path) -> Path:
    """A family that the plugin does not prune."""
    tiny = vlms.load("tiny-llava")
    own = tiny.model.config
    vision = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 96, "patch_size": 8, "vision_use_head": False}  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=own.text_config.to_dict(), image_token_id=own.image_token_id,
        video_token_id=own.image_token_id, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    size = {"height": 96, "width": 96}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        video_processor=LlavaOnevisionVideoProcessor(size=size), tokenizer=tiny.processor.tokenizer,
        num_image_tokens=144, vision_feature_select_strategy="full", chat_template=tiny.processor.chat_template,
    )  # fmt: skip
    return _saved(LlavaOnevisionForConditionalGeneration(config), processor, folder)


def _saved(model: Any, processor: Any, folder: Path) -> Path:
    processor.tokenizer.padding_side = "left"
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
