"""What tiny-llava is: its configuration, its words, its processor.

A `LlavaForConditionalGeneration` of about 2 M parameters: a 12-layer CLIP tower over 96 x 96 images in patches of 8
(144 patch tokens), LLaVA's projector, and a 4-layer Llama over a vocabulary of words.
"""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ocvtp.data.questions import MAX_COUNT, POST_PROMPT, plural
from ocvtp.data.scenes import COLORS, DIGITS, SHAPES, SIZE

PATCH = 8
GRID = SIZE // PATCH
"""Patches on a side: 12, so 144 tokens an image."""
IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)
PHRASES = ("USER:", "ASSISTANT:", POST_PROMPT)
"""Phrases of every prompt, one token each: they carry no information and would only make sequences long."""
_WORDS = """
    is are there a an the what which how many color shape number total of in it does image this picture written
    object objects small medium large yes no nothing center and or to left right above below with text digit . , ? : ;
""".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """Every token, in the order of its id."""
    numbers = sorted({*DIGITS, *(str(n) for n in range(MAX_COUNT + 1))})
    words = [*_WORDS, *COLORS, *SHAPES, *(plural(shape) for shape in SHAPES), *numbers]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *PHRASES, *words]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation in lower case, with the phrases of the prompts as single tokens."""
    tokens = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, lstrip=True, rstrip=True) for phrase in PHRASES])
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, lstrip=True, rstrip=True) for t in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokens["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=1024,
    )


def make_processor() -> LlavaProcessor:
    """The processor, as LLaVA-1.5's, for 96 x 96 images."""
    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_config() -> LlavaConfig:
    """The architecture."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    vision: dict[str, Any] = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=3,
        hidden_act="gelu",
        projection_dim=96,
        image_size=SIZE,
        patch_size=PATCH,
        attention_dropout=0.0,
    ).to_dict()
    text: dict[str, Any] = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=128**-0.5,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=True,
    ).to_dict()
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        tie_word_embeddings=True,
        image_token_id=ids[IMAGE_TOKEN],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )


def make_model() -> LlavaForConditionalGeneration:
    """The model with fresh weights (float32); seed torch before.

    Llama's usual deviation of 0.02 suits widths of thousands. At width 128 it lets the first layers drown the words
    and leaves attention flat, and lookups take many times longer to appear.
    """
    model = LlavaForConditionalGeneration(make_config())
    layers = model.model.language_model.layers
    with torch.no_grad():
        for layer in layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.mul_((2 * len(layers)) ** -0.5)
    return model
