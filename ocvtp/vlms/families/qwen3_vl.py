"""Qwen3-VL: what DeepStack's mergers make of earlier blocks is added to the first layers of the language model.

The values of a token are what the last merger makes of it and, behind that, what each of DeepStack's does: so all of
them are cut by one choice, and where methods merge tokens they merge all of them alike.

Letters: N tokens of all images, X those that stay, S DeepStack's mergers, D width of the language model.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.vlms.images import Facts, Kind
from ocvtp.vlms.native import NativeFamily


class Qwen3VLFamily(NativeFamily):
    """`Qwen3VLForConditionalGeneration`."""

    @classmethod
    def facts_of(cls, config: Any) -> Facts:
        """With S."""
        return replace(super().facts_of(config), added=len(config.vision_config.deepstack_visual_indexes))

    def merged(self, output: Any) -> Tensor:
        """[N, (1 + S) D]."""
        return torch.cat([output.pooler_output, *output.deepstack_features], 1)

    def features(self, features_XD: Tensor, kind: Kind = "image") -> Any:
        """With a plane for each of DeepStack's mergers."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        width = self.model.config.text_config.hidden_size
        merged_XD, *planes = features_XD.split(width, 1)
        split = self.takes_outputs  # by images; older getters leave planes whole
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=(merged_XD,), deepstack_features=[(plane_XD,) if split else plane_XD for plane_XD in planes]
        )
