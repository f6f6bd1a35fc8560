"""tiny-llava: a `LlavaForConditionalGeneration` of about 2 M parameters.

A 12-layer CLIP tower over 96 x 96 images in patches of 8 (144 patch tokens), LLaVA's projector, and a 4-layer Llama
over a vocabulary of words.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ocvtp.data.scenes import SIZE
from pipelines.tiny.architecture import Architecture, shrink_outputs
from pipelines.tiny.recipe import Recipe, Schedule
from pipelines.tiny.words import chat_template, make_tokenizer, vocabulary

IMAGE_TOKEN = "<image>"
FEATURE_LAYER = -2


class TinyLlava(Architecture):
    """144 tokens an image."""

    name = "tiny-llava"
    about = (
        "a `LlavaForConditionalGeneration` of {parameters} M parameters with a 12-layer CLIP tower (144 patch tokens "
        "of 96 x 96 images), LLaVA's projector and a 4-layer Llama over a vocabulary of words"
    )
    start = "It begins with fresh weights."
    feature = (
        "Linear read-outs of layer -2 name the colour, shape, size, digit and middle of the object in each patch; CLS "
        "of layer -2 and of the last layer tags the whole picture, so CLS attention means something. A mild penalty "
        "keeps tokens near unit size, since LLaVA's projector has no norm of its own."
    )
    recipe = Recipe(
        scenes=24_000,
        tower=Schedule(1_400, 1.5e-3, warmup=100),
        language=Schedule(1_600, 2e-3, warmup=100),
        projector=Schedule(200, 2e-3, warmup=20),
        vlm=Schedule(1_000, 1e-3, warmup=50),
    )
    norm_weight = 0.05

    def make_model(self) -> LlavaForConditionalGeneration:
        """With fresh weights."""
        model = LlavaForConditionalGeneration(make_config())
        shrink_outputs(model.model.language_model.layers)
        return model

    def make_processor(self) -> LlavaProcessor:
        """As LLaVA-1.5's, for 96 x 96 images."""
        side = {"height": SIZE, "width": SIZE}
        return LlavaProcessor(
            image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side),
            tokenizer=make_tokenizer({"image_token": IMAGE_TOKEN}),
            patch_size=self.patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat_template({"image": IMAGE_TOKEN + "\n"}),
        )

    def tower(self, model: Any) -> nn.Module:  # noqa: D102 - these as in Architecture
        part: nn.Module = model.model.vision_tower
        return part

    def projector(self, model: Any) -> nn.Module:  # noqa: D102
        part: nn.Module = model.model.multi_modal_projector
        return part

    def read(self, model: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Patches and CLS of layer -2, and the pooled CLS of the last layer."""
        output = self.tower(model)(pixels_B3HW, output_hidden_states=True)
        chosen_BLC = output.hidden_states[FEATURE_LAYER]
        return chosen_BLC[:, 1:], {"tags": chosen_BLC[:, 0], "tags_last": output.pooler_output}

    def features(self, model: Any, pixels_B3HW: Tensor) -> Tensor:  # noqa: D102
        return self.read(model, pixels_B3HW)[0]

    def project(self, model: Any, features_BVF: Tensor) -> Tensor:  # noqa: D102
        projected_BVD: Tensor = self.projector(model)(features_BVF)
        return projected_BVD


def make_config() -> LlavaConfig:
    """The architecture."""
    ids = {token: index for index, token in enumerate(vocabulary(IMAGE_TOKEN))}
    vision: dict[str, Any] = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=3,
        hidden_act="gelu",
        projection_dim=96,
        image_size=SIZE,
        patch_size=TinyLlava.patch,
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
        image_seq_length=(SIZE // TinyLlava.patch) ** 2,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )
