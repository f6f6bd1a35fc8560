"""What a pruned model of vLLM has in place of its vision: tower and projector of transformers, and a method.

The code that prunes a stock model (`ocvtp.pruning.choosing`) then serves here too, with the same picks: it stops the
tower at the layer that is needed, chooses, and projects what stays.
"""

from typing import Any

import torch

from ocvtp.errors import BadInput
from ocvtp.pruner.seeding import derive
from ocvtp.pruning.choosing import choose, name_of
from ocvtp.serving.section import Setting, family_in
from ocvtp.vlms.images import Images, Placed


class PrunedVision:
    """Chooses tokens of images for one served model."""

    def __init__(self, setting: Setting, architecture: str, config: Any, module: Any) -> None:
        """`module` has tower and projector, under the names that transformers gives them.

        Raises:
            BadInput, Incompatible, NotAvailable: as `ocvtp.prune`.
        """
        setting.check(architecture, config)
        self._setting = setting
        self._family = family_in(architecture, config, module)
        self._method = setting.build(self._family)

    @torch.no_grad()
    def embed(self, images: Images) -> list[Placed]:
        """What the language model reads of each image.

        Raises:
            BadInput: the method kept another number of tokens than the prompt has room for.
        """
        family, setting = self._family, self._setting
        seeds = [0] * len(images)
        if setting.entry.random:
            seeds = [derive(setting.seed, name_of(family.pixels_of(images, number))) for number in range(len(images))]
        found = choose(family, self._method, setting.budget, images, seeds, [[]] * len(images))
        for each, count in zip(found, family.counts(images), strict=True):
            if len(each.features_XD) != (wanted := setting.budget.at_most(count)):
                raise BadInput(
                    f"{setting.entry.name} kept {len(each.features_XD)} rows of an image of {count} tokens, but its "
                    f"prompt has room for {wanted}: such a setting cannot be served"
                )
        return found


def tower_of(vision_config: Any) -> torch.nn.Module:
    """A vision tower of transformers on the default device and of the default type, its weights not loaded yet."""
    from transformers import AutoModel

    tower: torch.nn.Module = AutoModel.from_config(
        vision_config, dtype=torch.get_default_dtype(), attn_implementation="sdpa"
    )
    return tower.eval()
