"""Methods inside the LLM against a language model in plain loops: what stays, what layers read, what follows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import inside_arithmetic
import pytest
import torch

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY, options_of
from ocvtp.methods.autoprune import AutoPrune
from ocvtp.methods.dart import Dart
from ocvtp.methods.fastv import FastV
from ocvtp.methods.pyramiddrop import PyramidDrop
from ocvtp.methods.sparsevlm import SparseVLM
from ocvtp.methods.sparsevlm_plus import SparseVLMPlus
from ocvtp.pruning import scoring as layers_
from ocvtp.vlms import family_of

BUILD: dict[str, Any] = {"fastv": FastV, "pyramiddrop": PyramidDrop, "sparsevlm": SparseVLM, "dart": Dart,
                         "autoprune": AutoPrune, "sparsevlm-plus": SparseVLMPlus}  # fmt: skip
ROUNDED = ("fastv", "pyramiddrop", "sparsevlm")
"""Whose scores are attention and nothing else, so that it can be rounded to make ties."""
Picture = Callable[..., Any]
NEW = {"max_new_tokens": 4, "do_sample": False}
CASES = [
    ("fastv", 0.5, {}),
    ("fastv", 0.3, {"budget": "reference", "k": 2}),
    ("fastv", 0.6, {"positions": "compact"}),
    ("pyramiddrop", 0.5, {}),
    ("pyramiddrop", 0.5, {"budget": "reference", "layers": [1, 3]}),
    ("sparsevlm", 0.6, {}),
    ("sparsevlm", 0.4, {"budget": "reference", "behaviour": "reference"}),
    ("sparsevlm", 0.6, {"recycle": False, "layers": [1]}),
    ("dart", 0.6, {}),
    ("dart", 0.5, {"budget": "reference", "behaviour": "reference", "k": 2}),
    ("autoprune", 0.7, {}),
    ("autoprune", 0.4, {"budget": "reference", "behaviour": "reference"}),
    ("sparsevlm-plus", 0.6, {}),
    ("sparsevlm-plus", 0.5, {"budget": "reference", "behaviour": "reference"}),
]


def numbers_of(model: Any, tokens: int, inputs: Any) -> list[list[int | None]]:
    """Of each image's placeholders: counted; None where LLaVA-NeXT ends a row, which its own packing says."""
    ids = inputs["input_ids"][0]
    if "image_sizes" not in inputs:
        counts = (
            [tokens] * len(inputs["pixel_values"])
            if "image_grid_thw" not in inputs
            else [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        )
        return [list(range(count)) for count in counts]
    features = model.model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"], return_dict=True
    ).pooler_output
    newline = model.model.image_newline
    found = []
    for rows in features:
        ends, number = [bool(torch.equal(row, newline)) for row in rows], iter(range(len(rows)))
        found.append([None if end else next(number) for end in ends])
    assert sum(map(len, found)) == int((ids == model.config.image_token_id).sum())
    return found


def stages_of(
    method: str, counts: Sequence[int], keep: float, depth: int, options: dict[str, Any]
) -> dict[int, list[tuple[int, int]]]:
    """Kept and merged tokens of each image before each layer that prunes."""
    made = BUILD[method](depth, options_of(REGISTRY[method], options))
    found: dict[int, list[tuple[int, int]]] = {stage.pruned: [] for stage in made.stages}
    for count in counts:
        for stage, step in zip(made.stages, made.steps(count, max(1, int(keep * count + 0.5))), strict=True):
            found[stage.pruned].append((step.kept, step.merged))
    return found


def tower_of(model: Any, inputs: Any) -> list[list[float]]:
    """Attention of CLS to each token of each image, or, without one, what tokens receive."""
    family = family_of(model)
    block = family.facts.feature_layer - 1
    vision = family.encode(family.images(inputs), {block})
    attention = vision.from_cls if family.facts.cls else vision.received
    return [attention(block, [image])[0].tolist() for image in range(len(vision.counts))]


def adapted(
    counts: Sequence[int], keep: float, depth: int, options: dict[str, Any], bits: Sequence[float]
) -> dict[int, list[tuple[int, int]]]:
    """The stages of AutoPrune once the mutual information of each image is known."""
    made = AutoPrune(depth, options_of(REGISTRY["autoprune"], options))
    found: dict[int, list[tuple[int, int]]] = {stage.pruned: [] for stage in made.stages}
    for count, information in zip(counts, bits, strict=True):
        steps = made.adapted(count, max(1, int(keep * count + 0.5)), information)
        for stage, step in zip(made.stages, steps, strict=True):
            found[stage.pruned].append((step.kept, step.merged))
    return found


@pytest.fixture
def images(picture_of: Picture) -> list[list[Any]]:
    """Six ragged prompts: one, two, three images and none, of several sizes."""
    sizes = [[(112, 112)], [(140, 84), (112, 112)], [], [(84, 168)], [(168, 140)], [(112, 84), (112, 112), (200, 90)]]
    return [[picture_of(7 * row + i, *size) for i, size in enumerate(each)] for row, each in enumerate(sizes)]


@pytest.mark.parametrize(
    ("method", "keep", "options", "grain"),
    [(*case, None) for case in CASES] + [(*case, 256) for case in CASES if case[0] in ROUNDED],
)
@torch.no_grad()
def test_what_stays_and_what_follows_is_as_in_plain_loops(
    vlm: Any, images: list[list[Any]], method: str, keep: float, options: dict[str, Any], grain: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = vlm.model
    batch = vlm.prompt(images)
    if grain is not None:  # attention is rounded, on both sides, so that many tokens are equal
        attended = layers_.attended
        monkeypatch.setattr(layers_, "attended", lambda *args: (attended(*args) * grain).round() / grain)
    length, depth = batch["input_ids"].shape[1], model.get_decoder().config.num_hidden_layers
    read: list[list[int]] = [[] for _ in range(depth)]
    if "image_grid_thw" in batch and "positions" in options:
        with pytest.raises(BadInput, match=r"positions='compact' cannot be had .* M-RoPE"):
            ocvtp.prune(model, method, keep, **options)
        return
    with ocvtp.prune(model, method, keep, **options) as handle:
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, call, row=row: row.append(args[0].shape[1]), with_kwargs=True
            )
            for layer, row in zip(model.get_decoder().layers, read, strict=True)
        ]
        out = model.generate(**batch, **NEW, return_dict_in_generate=True, output_logits=True)
        for hook in hooks:
            hook.remove()
    kept, layers = iter(handle.last_kept), [iter(layer) for layer in handle.last_layers]
    lengths: list[list[int]] = []
    for row, pictures in enumerate(images):
        alone = vlm.row(images, row)
        numbers = numbers_of(model, vlm.tokens, alone) if pictures else []
        answer = out.sequences[row, length:].tolist()
        slow = inside_arithmetic.Slow(model, alone, answer[:-1], numbers)
        plan = {key: value for key, value in options.items() if key != "positions"}
        stages = stages_of(method, [len(each) for each in numbers], keep, depth, plan)
        mode = "original" if method in ("fastv", "dart", "sparsevlm-plus") or "image_grid_thw" in batch else "compact"
        found = slow.run(
            method, stages if pictures else {}, options.get("positions", mode),
            noise=options.get("behaviour") == "reference", grain=grain,
            least=None if options.get("behaviour") == "reference" else 0.05,
            tower=tower_of(model, alone) if method == "autoprune" and pictures else [],
            adapt=partial(adapted, [len(each) for each in numbers], keep, depth, plan),
        )  # fmt: skip
        assert found.kept == [next(kept) for _ in pictures]
        assert found.layers == [[next(layer) for _ in pictures] for layer in layers]
        torch.testing.assert_close(torch.stack([step[row] for step in out.logits]), found.logits, atol=1e-4, rtol=1e-4)
        lengths.append(found.lengths)
    # What each layer computes: the longest of its prompts, then one token at a time.
    assert [row[0] for row in read] == [max(each[layer] for each in lengths) for layer in range(depth)]
    assert all(row[1:] == [1] * 3 for row in read)
    cache = out.past_key_values
    assert [cache.get_seq_length(layer) for layer in range(depth)] == [row[0] + 3 for row in read]
