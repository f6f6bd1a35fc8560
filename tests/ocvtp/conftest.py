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
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = "<pad> <s> </s> <unk> <image> what is this red blue square how many are there in the image ? :".split()
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

    def prompt(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str] = QUESTIONS) -> Any:
        """A batch: each prompt has its images, which may be none, and then a question."""
        texts = [
            "<s>" + " <image>" * len(row) + f" {question}"
            for row, question in zip(images, questions[: len(images)], strict=True)
        ]
        flat = [image for row in images for image in row]
        return self.processor(text=texts, images=flat or None, return_tensors="pt", padding=True)

    def row(self, images: Sequence[Sequence[Image.Image]], row: int) -> Any:
        """One prompt of such a batch by itself."""
        return self.prompt([images[row]], [QUESTIONS[row]])


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
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


def make_llava(seed: int = 0) -> TinyVLM:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        projection_dim=16,
        image_size=56,
        patch_size=14,
    )
    text = LlamaConfig(
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
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=WORDS.index("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = enlarge(LlavaForConditionalGeneration(config), seed)
    # Answers of random weights would often end at once.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return TinyVLM(model, processor, 16)


MAKERS: dict[str, Callable[[int], TinyVLM]] = {"llava": make_llava}


@pytest.fixture(scope="session")
def llava() -> TinyVLM:
    """LLaVA: 16 tokens an image."""
    return make_llava()


@pytest.fixture(scope="session", params=list(MAKERS))
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
