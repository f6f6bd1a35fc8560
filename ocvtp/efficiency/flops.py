"""Floating-point operations of a prefill, in closed form.

Two counts stand side by side. `paper_llm_flops` is the formula behind the paper's Table 4: the language model
only, two matrices in its MLP, attention over all pairs. `prefill_flops` is the true count: tower, projector,
pruner, language model with the matrices that it has, and `lm_head`. A multiply-accumulate counts as two
operations throughout, and operations on single elements (norms, activations, softmax) are left out unless
asked for.

Legend: n tokens, d width, m width of the MLP, T vision tokens of an image, K slots, C width of a token.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ocvtp.efficiency.shapes import LlmShape, TowerShape, VlmShape, projector_parameters
from ocvtp.errors import BadInput

MAC = 2
"""Operations of a multiply-accumulate."""
PAPER_SLOTS = 64
"""Of the pruner whose cost the paper's Table 4 gives, whatever is kept."""


@dataclass(frozen=True)
class Prefill:
    """Operations of each part of a prefill of one image and its prompt."""

    tower: int
    projector: int
    pruner: int
    llm: int
    lm_head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.tower + self.projector + self.pruner + self.llm + self.lm_head

    def as_dict(self) -> dict[str, int]:
        """Parts and total, for JSON."""
        return {**asdict(self), "total": self.total}


def paper_llm_flops(tokens: int | Sequence[int], *, width: int = 4096, layers: int = 32, mlp: int = 11008) -> int:
    """The paper's count of a prefill of `tokens` (vision and text), by default of a 7B model.

    One count, or one for each layer.

    2 L (4 n d^2 + 2 n^2 d + 2 n d m). It leaves out one of the MLP's three matrices, the tower, the projector
    and `lm_head`. With the paper's 32 text tokens it gives all of Table 4 but 6.30 T, which is 6.31 T by the
    formula (n = 608) and 6.30 T for one token less.
    """
    d, m = width, mlp
    return sum(MAC * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m) for n in _each_layer("tokens", tokens, layers))


def pruner_flops(
    tokens: int,
    width: int,
    slots: int,
    *,
    slot_dim: int | None = None,
    hidden: int | None = None,
    ffn: int | None = None,
    iterations: int = 3,
    elementwise: bool = False,
) -> int:
    """Operations of the OC-Pruner without its decoder, for one image.

    T (C h + h D) + 2 T D^2 + iterations x (K D^2 + 2 K T D + 6 K D^2 + 2 K D f) multiply-accumulates:
    projection, keys and values once, then queries, the two attention products, the GRU and the FFN of each
    iteration.

    Args:
        tokens: T, the tokens that the slots look at.
        width: C, their width.
        slots: K.
        slot_dim: D; half of `width` unless given, as in the paper's pruner.
        hidden: h, the hidden width of the projection; twice `width` unless given.
        ffn: f, the hidden width of the FFN; four times `slot_dim` unless given.
        iterations: of slot attention.
        elementwise: count norms (5 an element), activations, softmax, scaling and biases (1 an element) too,
            as profilers do. So counted, 64 slots cost the paper's 5.97 G (T = 576) and 23.82 G (T = 2880).
    """
    _check("tokens", tokens, 1)
    _check("width", width, 1)
    _check("slots", slots, 1)
    dim = slot_dim or max(1, width // 2)
    inner = hidden or 2 * width
    ffn = ffn or 4 * dim
    encode = tokens * (width * inner + inner * dim) + 2 * tokens * dim**2
    iteration = slots * dim**2 + 2 * slots * tokens * dim + 6 * slots * dim**2 + 2 * slots * dim * ffn
    flops = MAC * (encode + iterations * iteration)
    if elementwise:
        norm, bias_and_gelu = 5, 2
        once = tokens * (norm * width + bias_and_gelu * inner + dim + norm * dim)
        gru_biases, ffn_elements = 6 * dim, bias_and_gelu * ffn + dim
        each = slots * (2 * norm * dim + gru_biases + ffn_elements) + 2 * slots * tokens
        flops += once + iterations * each
    return flops


def paper_pruner_flops(tokens: int, width: int, slots: int = PAPER_SLOTS) -> int:
    """The paper's count of its pruner: 64 slots whatever is kept, operations on single elements too (Table 4)."""
    return pruner_flops(tokens, width, slots, elementwise=True)


def prefill_flops(
    shape: VlmShape,
    *,
    image_tokens: int,
    kept: int | Sequence[int] | None = None,
    text_tokens: int = 32,
    projected: int | None = None,
    pruner: int = 0,
    tiles: int | None = None,
    grid: tuple[int, int] | None = None,
    tower_layers: int | None = None,
    inside_tower: int | None = None,
    causal: bool = False,
    text_asks: bool = False,
) -> Prefill:
    """The true operations of a prefill of one image and its prompt.

    Args:
        shape: from `shapes.shape_of(config)` or `shapes.known_shape(name)`.
        image_tokens: vision tokens of the image before pruning.
        kept: vision tokens that the language model computes: one count, or one for each of its layers for
            methods that drop tokens inside it; None is all.
        text_tokens: tokens of the prompt beside the image's.
        projected: tokens that pass the projector; as many as the language model's first layer sees unless
            given. Where the projector is part of the tower, all do.
        pruner: operations of the pruner, from `pruner_flops`.
        tiles: tiles of an image cut into several; from `image_tokens` unless given.
        grid: rows and columns of merged tokens, which decide the windows of Qwen2.5-VL's tower; whole windows
            are assumed unless given.
        tower_layers: layers of the tower that run; those that the features need unless given.
        inside_tower: the layer of the tower that the choice is made on, if the kept tokens and CLS are alone in it from
            there on (`ocvtp.methods.inside_tower`); tiles have even shares of them.
        causal: count only the attention pairs that a causal mask leaves.
        text_asks: where tokens are dropped between layers, every token of the prompt ranks them and not the last one
            alone (`ocvtp.methods.Entry.text_asks`). Ranking is part of `llm`.

    Raises:
        BadInput: counts that are negative, larger than the image or not one a layer; a tower that cannot be pruned
            inside, or a layer beyond those that run.
    """
    _check("image_tokens", image_tokens, 0)
    _check("text_tokens", text_tokens, 0)
    counts = by_layer(kept, image_tokens, shape.llm.layers)
    if projected is None:
        patches = _tiles(shape.tower, image_tokens, tiles) * (shape.tower.patches_per_tile or 0)
        projected = {"kept": counts[0], "tokens": image_tokens, "patches": patches}[shape.projects]
    if inside_tower is not None and (shape.tower.kind, shape.projects) != ("tiles", "kept"):
        raise BadInput("inside_tower needs a tower whose patches are the tokens, as LLaVA-1.5 and LLaVA-NeXT have")
    alone = None if inside_tower is None else (inside_tower, counts[0])
    return Prefill(
        tower=_tower(shape.tower, image_tokens, tiles, grid, tower_layers, alone),
        projector=MAC * projected * projector_parameters(shape),
        pruner=pruner,
        llm=sum(llm_layer_flops(shape.llm, tokens + text_tokens, causal=causal) for tokens in counts)
        + _ranking(shape.llm, counts, text_tokens, text_asks=text_asks),
        lm_head=MAC * shape.llm.width * shape.llm.vocabulary,
    )


def llm_layer_flops(llm: LlmShape, tokens: int, *, causal: bool = False) -> int:
    """Operations of one layer of the language model over `tokens`."""
    weights = llm.width * (2 * llm.queries + 2 * llm.keys + 3 * llm.mlp)
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    return MAC * (tokens * weights + 2 * pairs * llm.queries)


def ranking_flops(llm: LlmShape, tokens: int, rows: int = 1) -> int:
    """Operations of some rows of one layer's attention over `tokens`: all keys, and the queries of these rows."""
    return MAC * (tokens * llm.width * llm.keys + rows * llm.width * llm.queries + rows * tokens * llm.queries)


def _ranking(llm: LlmShape, counts: Sequence[int], text_tokens: int, *, text_asks: bool) -> int:
    """Of what is done before each layer that reads fewer tokens than the one before it, and once to find who asks."""
    rows = 1 + text_tokens if text_asks else 1
    before = [tokens for tokens, after in pairwise(counts) if after < tokens]
    finding = MAC * counts[0] * text_tokens * llm.width if before and text_asks else 0
    return finding + sum(ranking_flops(llm, tokens + text_tokens, rows) for tokens in before)


def by_layer(kept: int | Sequence[int] | None, image_tokens: int, layers: int) -> list[int]:
    """How many of an image's tokens each layer of the language model reads; `BadInput` for more than there are.

    Args:
        kept: one count, or one for each layer; None is all.
        image_tokens: of the unpruned image.
        layers: of the language model.
    """
    counts = _each_layer("kept", image_tokens if kept is None else kept, layers)
    for count in counts:
        if not 0 <= count <= image_tokens:
            raise BadInput(f"kept is {count}: an image of {image_tokens} tokens keeps 0 to {image_tokens}")
    return counts


def kv_cache_bytes(llm: LlmShape, tokens: int | Sequence[int], *, bytes_per_number: int = 2) -> int:
    """Memory of the keys and values of `tokens` over all layers: one count, or one for each layer."""
    return 2 * llm.keys * sum(_each_layer("tokens", tokens, llm.layers)) * bytes_per_number


def _tiles(tower: TowerShape, image_tokens: int, tiles: int | None) -> int:
    """Tiles of an image, unless they are given; an image that keeps its size is one."""
    return -(-image_tokens // (tower.tokens_per_tile or max(1, image_tokens))) if tiles is None else tiles


def _tower(
    tower: TowerShape, image_tokens: int, tiles: int | None, grid: tuple[int, int] | None, run: int | None,
    alone: tuple[int, int] | None,
) -> int:  # fmt: skip
    """`alone`: from which layer on so many tokens of the image, and CLS, are all that there is."""
    run = tower.used_layers if run is None else run
    if not 0 <= run <= tower.layers:
        raise BadInput(f"tower_layers is {run}: the tower has {tower.layers} layers")
    d = tower.width
    if tower.kind == "tiles":
        patches = tower.patches_per_tile or image_tokens
        seen = _tiles(tower, image_tokens, tiles)
        first, kept = (run, 0) if alone is None else alone
        if not 0 <= first <= run:
            raise BadInput(f"inside_tower is {first}: {run} layers of the tower run")

        def layer(tokens: int) -> int:
            n = tokens + tower.cls
            return 4 * n * d**2 + 2 * n**2 * d + tower.matrices * n * d * tower.mlp

        left, shares = run - first, [kept // seen + (tile < kept % seen) for tile in range(seen)]
        blocks = seen * first * layer(patches) + left * sum(layer(share) for share in shares if share)
        return MAC * (seen * patches * tower.patch_inputs * d + blocks)
    n = image_tokens * tower.merge**2
    weights = n * (4 * d**2 + tower.matrices * d * tower.mlp)
    pairs = [n**2 if index in tower.global_layers else _window_pairs(tower, image_tokens, grid) for index in range(run)]
    return MAC * (n * tower.patch_inputs * d + run * weights + 2 * sum(pairs) * d)


def _window_pairs(tower: TowerShape, image_tokens: int, grid: tuple[int, int] | None) -> int:
    """Pairs of patches that attend to each other in a layer with windows."""
    side = tower.window or 1
    patches = tower.merge**2
    if grid is None:
        return image_tokens * patches * side**2 * patches
    rows, columns = grid
    if rows * columns != image_tokens:
        raise BadInput(f"grid {rows} x {columns} has {rows * columns} tokens, image_tokens is {image_tokens}")

    def extents(length: int) -> list[int]:
        return [min(side, length - start) for start in range(0, length, side)]

    return sum((h * w * patches) ** 2 for h in extents(rows) for w in extents(columns))


def _each_layer(name: str, counts: int | Sequence[int], layers: int) -> list[int]:
    found = list(counts) if isinstance(counts, Sequence) else [counts] * layers
    if len(found) != layers:
        raise BadInput(f"{name} has {len(found)} counts: one for each of the {layers} layers is needed")
    for count in found:
        _check(name, count, 0)
    return found


def _check(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise BadInput(f"{name} is {value!r}: a whole number of at least {low} is needed")
