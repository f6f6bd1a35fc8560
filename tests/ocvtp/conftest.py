"""Tiny random VLMs with processors, one recipe a family, made without a network.

Weights are larger than transformers draws them, so that what the model answers depends on what it sees.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

WORDS = "<pad> <s> </s> <unk> <image> what is this red blue square how many are there in the image ? :".split()
QWEN_WORDS = [*WORDS, "<video>", "<vision>", "</vision>"]
SPECIAL = {"<video>": "video_token", "<vision>": "vision_start_token", "</vision>": "vision_end_token",
           "<soft>": "image_token", "<boi>": "boi_token", "<eoi>": "eoi_token", "<img>": "start_image_token",
           "</img>": "end_image_token", "<context>": "context_image_token"}  # fmt: skip
QUESTIONS = (
    "what is this ?",
    "how many red are there in the image ?",
    "is this blue : is this red : is this a square in the image ?",
    "red",
    "many many many red blue square : there are how many in this image ? what is in it ?",
    "this : this",
    "is there a square",
    "what : the blue in this is red ?",
)


class TinyVLM(NamedTuple):
    model: Any
    processor: Any
    tokens: int | None
    """Of an image, where all images have as many."""
    mark: str = " <image>"
    """Where a prompt has an image."""
    maker: str = ""
    """In `MAKERS`, where the type of the model does not say it."""

    @property
    def kind(self) -> str:
        """Its name in `MAKERS`."""
        return self.maker or str(self.model.config.model_type)

    def prompt(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str] = QUESTIONS) -> Any:
        """A batch: each prompt has its images, which may be none, and then a question."""
        mark = self.mark
        texts = [
            "<s>" + mark * len(row) + f" {question}"
            for row, question in zip(images, questions[: len(images)], strict=True)
        ]
        nested = [list(row) for row in images]
        if not isinstance(self.processor, Gemma3Processor | LlavaOnevisionProcessor):
            nested = [image for row in nested for image in row]
        return self.processor(text=texts, images=nested if any(nested) else None, return_tensors="pt", padding=True)

    def row(self, images: Sequence[Sequence[Image.Image]], row: int) -> Any:
        """One prompt of such a batch by itself."""
        return self.prompt([images[row]], [QUESTIONS[row]])


def tokenizer(vocabulary: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}
        | {name: word for word, name in SPECIAL.items() if word in vocabulary},
        padding_side="left",
    )


def enlarge(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = 1.4 * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    """Blobs of colour on noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    noisy = smooth + 0.1 * torch.rand(3, height, width, generator=generator)
    return Image.fromarray((noisy.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=5,
    num_attention_heads=2,
    projection_dim=16,
    image_size=56,
    patch_size=14,
)
TEXT = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def ready(model: Any, seed: int | None) -> Any:
    """With weights of a seed, if one is given; answers do not end before they have to."""
    if seed is not None:
        model = enlarge(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # Trained models do not say that there is an image, and transformers refuses prompts with more than were given.
    config = model.config
    model.generation_config.suppress_tokens = [
        token for token in (config.image_token_id, getattr(config, "video_token_id", None)) if token is not None
    ]
    return model


def make_llava(seed: int = 0) -> TinyVLM:
    config = LlavaConfig(
        vision_config=VISION.to_dict(),
        text_config=TEXT.to_dict(),
        image_token_id=WORDS.index("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = ready(LlavaForConditionalGeneration(config), seed)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return TinyVLM(model, processor, 16)


def make_llava_next(seed: int = 0) -> TinyVLM:
    """Tiles of 4 x 4 tokens, of which an image has one to four beside the one of all of it."""
    pinpoints = [[56, 112], [112, 56], [112, 112], [56, 168]]
    config = LlavaNextConfig(
        vision_config=VISION.to_dict(),
        text_config=TEXT.to_dict(),
        image_token_id=WORDS.index("<image>"),
        image_seq_length=16,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = ready(LlavaNextForConditionalGeneration(config), seed)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return TinyVLM(model, processor, None)


def qwen(made: Any, *, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """A config of a Qwen: five blocks of 2 x 2 patches a token, M-RoPE, and what sets the generations apart."""
    blocks = {"depth": 5, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
              "spatial_merge_size": 2, "out_hidden_size": 32}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **text.pop("rope", {})}
    shared = {**{name: getattr(TEXT, name) for name in TEXT_OF_QWEN}, "vocab_size": len(QWEN_WORDS)}
    words = {"image_token_id": "<image>", "video_token_id": "<video>", "vision_start_token_id": "<vision>",
             "vision_end_token_id": "</vision>"}  # fmt: skip
    return made(
        vision_config={**blocks, **vision},
        text_config={**shared, "rope_parameters": rope, **text},
        **{name: QWEN_WORDS.index(word) for name, word in words.items()},
    )


def qwen_processor(made: Any, video_processor: Any) -> Any:
    """A processor of a Qwen: 16 to 40 tokens an image."""
    return made(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28 * 16, "longest_edge": 28 * 28 * 40}),
        tokenizer=tokenizer(QWEN_WORDS),
        video_processor=video_processor,
    )


def make_qwen2_5_vl(seed: int = 0) -> TinyVLM:
    """16 to 40 tokens of 2 x 2 patches; windows of 2 x 2 tokens in all blocks but two."""
    config = qwen(Qwen2_5_VLConfig, vision={"window_size": 56, "fullatt_block_indexes": [2, 4]}, text={})
    torch.manual_seed(seed)
    model = ready(Qwen2_5_VLForConditionalGeneration(config), seed)
    videos = Qwen2VLVideoProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 84 * 84})
    return TinyVLM(model, qwen_processor(Qwen2_5_VLProcessor, videos), None, " <vision> <image> </vision>")


def make_qwen3_vl(seed: int = 0) -> TinyVLM:
    """16 to 40 tokens of 2 x 2 patches; DeepStack adds what blocks 1 and 3 saw to the first two layers of four."""
    config = qwen(
        Qwen3VLConfig,
        vision={"num_position_embeddings": 64, "deepstack_visual_indexes": [1, 3]},
        text={"head_dim": 8, "rope": {"mrope_interleaved": True}},
    )
    torch.manual_seed(seed)
    model = ready(Qwen3VLForConditionalGeneration(config), seed)
    videos = Qwen3VLVideoProcessor(patch_size=14, size={"shortest_edge": 4 * 84 * 84, "longest_edge": 6 * 112 * 112})
    return TinyVLM(model, qwen_processor(Qwen3VLProcessor, videos), None, " <vision> <image> </vision>")


def make_tiny_qwen(_: int = 0) -> TinyVLM:
    """tiny-qwen with the weights that it is shipped with."""
    from ocvtp.vlms import load

    vlm = load("tiny-qwen")
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return TinyVLM(ready(vlm.model, None), vlm.processor, None, mark, "tiny_qwen")


def make_internvl(seed: int = 0) -> TinyVLM:
    """One to four tiles of 2 x 2 tokens of 2 x 2 patches, and a thumbnail where there are several."""
    words = [*WORDS, "<video>", "<img>", "</img>", "<context>"]
    config = InternVLConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2,
                       "image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": True},
        text_config={**TEXT.to_dict(), "model_type": "llama", "vocab_size": len(words)},
        image_token_id=words.index("<context>"),
        image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = ready(InternVLForConditionalGeneration(config), seed)
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1,
                                              max_patches=4),
        tokenizer=tokenizer(words),
        video_processor=InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
    )  # fmt: skip
    return TinyVLM(model, processor, None, " <context>")


SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
          "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False}  # fmt: skip


def make_onevision(seed: int = 0) -> TinyVLM:
    """Tiles of 4 x 4 tokens, resized where an image has more than two of them."""
    pinpoints = [[56, 112], [112, 56], [112, 112], [112, 168]]
    words = [*WORDS, "<video>"]
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={**TEXT.to_dict(), "vocab_size": len(words)},
        image_token_id=words.index("<image>"),
        video_token_id=words.index("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    )
    torch.manual_seed(seed)
    model = ready(LlavaOnevisionForConditionalGeneration(config), seed)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer(words),
        video_processor=LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    return TinyVLM(model, processor, None)


def make_gemma3(seed: int = 0) -> TinyVLM:
    """16 tokens of 2 x 2 patches; one layer in two attends to the last eight columns only."""
    words = [*WORDS, "<soft>", "<boi>", "<eoi>"]
    config = Gemma3Config(
        vision_config={**SIGLIP, "image_size": 112},
        text_config={**{name: getattr(TEXT, name) for name in TEXT_OF_QWEN}, "vocab_size": len(words), "head_dim": 8,
                     "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
        mm_tokens_per_image=16,
        image_token_id=words.index("<soft>"),
        boi_token_id=words.index("<boi>"),
        eoi_token_id=words.index("<eoi>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = ready(Gemma3ForConditionalGeneration(config), seed)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 112, "width": 112}),
        tokenizer=tokenizer(words),
        image_seq_length=16,
    )
    return TinyVLM(model, processor, 16, " <boi>")


class SmolProcessor:
    """As SmolVLM's own, which needs a package that spells numbers, but for one image a tile."""

    def __init__(self, words: Sequence[str]) -> None:
        self.tokenizer = tokenizer(words)
        self.image_processor = CLIPImageProcessor(
            size={"height": 56, "width": 56}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )

    def __call__(self, text: Sequence[str], images: Any = None, **options: Any) -> Any:
        texts = [each.replace("<image>", " ".join(["<image>"] * 4)) for each in text]
        made = self.tokenizer(texts, return_tensors="pt", padding=True)
        if images:
            rows = [each.count("<image>") for each in text]
            pixels = list(self.image_processor(images=images, return_tensors="pt")["pixel_values"].split(rows))
            made["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
        return made


def make_smolvlm(seed: int = 0) -> TinyVLM:
    """Four tokens of 2 x 2 patches an image."""
    config = SmolVLMConfig(
        vision_config={**SIGLIP, "model_type": "smolvlm_vision"},
        text_config={**TEXT.to_dict(), "model_type": "llama"},
        image_token_id=WORDS.index("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return TinyVLM(ready(SmolVLMForConditionalGeneration(config), seed), SmolProcessor(WORDS), 4)


TEXT_OF_QWEN = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings "
    "pad_token_id bos_token_id eos_token_id"
).split()
MAKERS: dict[str, Callable[[int], TinyVLM]] = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "tiny_qwen": make_tiny_qwen,
    "internvl": make_internvl,
    "llava_onevision": make_onevision,
    "gemma3": make_gemma3,
    "smolvlm": make_smolvlm,
}
EVERYWHERE = ("llava", "llava_next", "qwen2_5_vl")
"""Families with which each test runs; the others run with those of `tests/ocvtp/vlms`."""


@pytest.fixture(scope="session")
def llava() -> TinyVLM:
    """LLaVA: 16 tokens an image."""
    return make_llava()


@pytest.fixture(scope="session", params=EVERYWHERE)
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    """Each family in turn."""
    return MAKERS[request.param](0)


@pytest.fixture(scope="session")
def make_vlm() -> Callable[[str, int], TinyVLM]:
    """A fresh model of a family."""
    return lambda family, seed=0: MAKERS[family](seed)


@pytest.fixture(scope="session")
def picture_of() -> Callable[..., Image.Image]:
    """An image from a seed."""
    return picture
