"""FastV: after the first layers, only the image tokens that the last token of the prompt attends to go on.

Layers 0 to K-1 read everything. Tokens are ranked by the attention of layer K-1, mean over heads, that the last token
of the prompt pays them; layer K is the first that reads the shorter prompt. Nothing is merged, and every token keeps
its position, so that new tokens go on from the length of the whole prompt.

K is 2 in a model of 32 layers, at the same share in others and never 0 (`ocvtp.methods.inside`); `k="middle"` is 16 of
32. The authors' variant with a cache runs layer K - 1 twice and caches its keys and values twice, which changes no
answer (run: to 1e-15) and is not done here.

Budgets: `average` solves (K N + (L - K) n) / L = keep for n, rounded down. `reference` counts as the authors'
evaluation does: n = keep tokens after layer K.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ocvtp.methods.base import Entry, no_pruner, whole
from ocvtp.methods.inside import Inside, PruneStage, Step, depth_of, listed, per_layer, scaled
from ocvtp.vlms.family import Family

_K, _MIDDLE = 2, 16
"""Of 32 layers."""
MIDDLE = "middle"


class FastV(Inside):
    """One stage."""

    name: str = "fastv"
    positions: Literal["compact", "original"] = "original"

    def __init__(self, depth: int, options: Mapping[str, Any]) -> None:
        """`options`: as in `ENTRY`."""
        k = options["k"]
        if k in (None, MIDDLE):
            layers = scaled([_K if k is None else _MIDDLE], depth)
        else:
            whole(self.name, options, "k", 1)
            layers = listed(self.name, "k", [k], 1, depth - 1)
        super().__init__(depth, options["budget"], [PruneStage(layer - 1, layer) for layer in layers])

    def steps(self, tokens: int, keep: int) -> list[Step]:  # noqa: D102 - as in Inside
        if self.budget == "reference":
            return [Step(keep)]
        first, after = self.stages[0].pruned, self.depth - self.stages[0].pruned
        kept = (keep * self.depth - first * tokens) // after
        if kept < 1:
            way = f"budget='reference' counts {keep} tokens after layer {first} instead"
            raise self.refuse(tokens, keep, first * tokens + after, ways=[way])
        return [Step(kept)]


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> FastV:
    no_pruner("fastv", pruner)
    return FastV(depth_of("fastv", family), options)


ENTRY = Entry(
    name="fastv",
    acts="inside the LLM",
    needs_text=True,
    source="FastV, arXiv 2403.06764",
    random=False,
    trained=False,
    options={"budget": "average", "k": None},
    build=_build,
    positions="original",
    per_layer=per_layer(FastV),
)
