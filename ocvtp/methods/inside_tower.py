"""Prune inside the tower: from the layer on that the choice is made on, the tower sees the kept tokens alone.

By default a tower runs to the layer that the LLM is fed from, and tokens are taken of that. With `inside_tower=True`:

1. all patches pass the blocks that come before `hidden_states[r]`; r is the deepest layer that the method looks at,
   such as 9 of `css` with `layer=9`;
2. the method chooses as ever, so that its numbers are those of the same method after the tower;
3. the blocks from r up to the layer that the LLM is fed from read the rows of the kept tokens, and of CLS where the
   tower has one, and nothing else: attention is among these. Positions were added before the first block and stay.

Of LLaVA-NeXT each tile goes on by itself, with the tokens that stay of it; one of which nothing stays does not go on,
nor does padding that is cut off (`spatial_unpad`). But for that nothing changes with all tokens kept. With fewer the
same ones are chosen as after the tower, but have seen less of the image: docs/findings.md has what that costs.

Tokens must be patches that attend to each other, whose hidden states are what the projector reads: CLIP and SigLIP
towers of LLaVA-1.5 and LLaVA-NeXT. Other towers attend in windows or make a token of several patches. A method that
looks at the layer that the LLM is fed from leaves nothing to save. No gradient reaches the tower.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods.base import Encoded, Entry, Kept, Method, one_of, options_of
from ocvtp.phases import phase
from ocvtp.vlms.family import Family, Vision
from ocvtp.vlms.hidden_states import resolve_layer
from ocvtp.vlms.images import Images
from ocvtp.vlms.tiled import ProjectedLate, TiledVision

OPTION = "inside_tower"
"""Of methods that have it; False by default."""


class InsideTower(Method):
    """A method whose choice is all that goes on in the tower."""

    def __init__(self, chooser: Method, last: int) -> None:
        """`last` is the layer that the LLM is fed from."""
        self.chooser, self._from, self._last = chooser, max(chooser.layers()), last
        self.fewer, self.random, self.needs_text = chooser.fewer, chooser.random, chooser.needs_text

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return self.chooser.layers()

    def encode(self, family: Family, images: Images, keeps: Sequence[int]) -> Vision:
        """Stops at the layer that the choice is made on."""
        return family.encode(images, self.layers(), values=False)

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        kept, vision = self.chooser.choose(encoded), cast(TiledVision, encoded.vision)
        with phase("tower"), torch.no_grad():
            values_GkV = vision.onward(self._from, self._last, kept.indices_Gk, encoded.members)
        return replace(kept, values_GkV=values_GkV)

    def slots(self, encoded: Encoded) -> Tensor | None:  # noqa: D102
        return self.chooser.slots(encoded)


def within(name: str, chooser: Method, family: Family, options: Mapping[str, Any]) -> Method:
    """The method itself or, if its option says so, inside the tower.

    Args:
        name: of the method.
        chooser: it chooses by hidden states alone, and hands on tokens of the image.
        family: of the VLM.
        options: of the method, `inside_tower` among them.

    Raises:
        BadInput: the method looks at the last layer that is needed.
        Incompatible: a tower of another kind.
    """
    one_of(name, options, OPTION, (False, True))
    if not options[OPTION]:
        return chooser
    if lacks := unfit(type(family)):
        raise Incompatible(f"{name} with inside_tower=True {lacks}: leave it out")
    looks, fed = max(chooser.layers()), family.facts.feature_layer
    if looks >= fed:
        raise BadInput(
            f"{name} looks at layer {looks} of the tower, and the LLM is fed from layer {fed}: nothing is left that "
            "inside_tower=True could save; leave it out, or give a layer before that, such as layer=9"
        )
    return InsideTower(chooser, fed)


def begins(entry: Entry, given: Mapping[str, Any], depth: int) -> int | None:
    """The layer from which on kept tokens are alone in a tower of `depth` blocks.

    None of a method that prunes after the tower, or whose options do not say which layer it is.
    """
    options = options_of(entry, given)
    if not options.get(OPTION) or options["layer"] is None:
        return None
    return resolve_layer(options["layer"], depth)


def unfit(family: type[Family]) -> str | None:
    """Why nothing can be pruned inside the tower of such VLMs, as the rest of a sentence; None if it can."""
    if issubclass(family, ProjectedLate):
        return None
    return (
        "needs a tower of CLIP or SigLIP whose patches are the tokens, as LLaVA-1.5 and LLaVA-NeXT have: the tower of "
        "this VLM attends in windows, or a token is made of several patches"
    )
