"""Every method that acts before the LLM on every family: all tokens, batches, and implementations of attention.

What they choose is compared with their descriptions in the tests of each; those inside the LLM have their own file
(test_pruning_inside.py).
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from PIL import Image
from test_methods_trim import clip_tokenizer, make_clip
from transformers.utils import is_flash_attn_2_available

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY
from ocvtp.methods.inside import Inside
from ocvtp.methods.register import AUTHORS
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.selection import CHOICES
from ocvtp.vlms import family_of

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 5, "do_sample": False}
BEFORE = sorted(name for name, entry in REGISTRY.items() if entry.acts == "before the LLM")
REFUSED = {
    ("qwen2_5_vl", "trim"): "trim needs",
    ("qwen2_5_vl", "cdpruner"): "cdpruner needs",
    ("qwen2_5_vl", "tome"): "tome merges tokens inside a CLIP tower",
    ("llava_next", "tome"): "only 56 are tokens: set mm_patch_merge_type",
}
"""What a family cannot have, and why: TRIM and CDPruner want a CLIP tower, ToMe images whose every patch is a token."""
TEXT = ("trim", "cdpruner")
GREEDY = {*CHOICES, "holov", "scope", "prunesid", "promprune", "cdpruner", "cdpruner-no-text", "divprune", "vispruner"}
"""Whose picks depend on each other, or on budgets of parts."""
FAMILIES = ("llava", "llava_next", "qwen2_5_vl")
OTHERS = ("qwen3_vl", "internvl", "llava_onevision", "gemma3", "smolvlm")
"""Without a CLIP tower."""
IN_BF16 = 2
"""Tokens of an image in which implementations of attention may differ in bfloat16: rounding decides between scores that
are nearly equal. In float32 they do not differ."""
CASCADE, CASCADE_IN_BF16 = "pyramiddrop-authors", 0.15
"""Drops few tokens at each of three stages, and the share of all kept tokens that may differ at its end."""


@pytest.fixture
def images(picture_of: Picture) -> list[list[Image.Image]]:
    """Eight ragged prompts: none, one, two and three images, of several sizes."""
    sizes = [
        [(112, 112)], [(140, 84), (112, 112)], [], [(84, 168)], [(120, 120)], [(112, 112), (90, 200), (168, 84)],
        [(200, 100)], [],
    ]  # fmt: skip
    return [[picture_of(5 * row + i, *size) for i, size in enumerate(each)] for row, each in enumerate(sizes)]


def on_each(methods: Iterable[str]) -> Any:
    """Parameters `vlm` and `method`: each method on each family that can have it."""
    pairs = [(family, method) for family in FAMILIES for method in methods if (family, method) not in REFUSED]
    return pytest.mark.parametrize(("vlm", "method"), pairs, indirect=["vlm"])


def prune(vlm: Any, method: str, keep: Any) -> Any:
    """A handle, with what each method needs."""
    facts = family_of(vlm.model).facts
    options: dict[str, Any] = {}
    if method == "oc-vtp":
        torch.manual_seed(0)
        options = {"pruner": OCPruner(PrunerConfig(facts.width, grid=(4, 4))).eval(), "layer": 2}
    elif method in ("oc-vtp-untrained", *CHOICES):
        options = {"layer": 2}
    elif method in TEXT:
        options = {
            "clip": make_clip(vlm), "clip_tokenizer": clip_tokenizer(), "tokenizer": vlm.processor.tokenizer
        }  # fmt: skip
    return ocvtp.prune(vlm.model, method, keep, **options)


@torch.no_grad()
def test_by_default_it_is_pivoted_qr(vlm: Any, images: Any) -> None:
    inputs = vlm.prompt(images)
    kept = []
    for how in ((), ("qr",)):
        with ocvtp.prune(vlm.model, *how, keep=0.5) as handle:
            vlm.model(**inputs)
            kept.append(handle.last_kept)
    assert kept[0] == kept[1]
    with pytest.raises(BadInput, match="qr uses no pruner"):
        ocvtp.prune(vlm.model, keep=0.5, pruner="folder")


@pytest.mark.parametrize(("vlm", "method", "why"), [(*pair, why) for pair, why in REFUSED.items()], indirect=["vlm"])
def test_what_a_family_cannot_have_is_refused(vlm: Any, method: str, why: str, picture_of: Picture) -> None:
    """When it is asked for, or at the latest at the first image of a shape that it cannot have."""
    inputs = vlm.prompt([[picture_of(0, 200, 80)]])
    with pytest.raises(BadInput, match=why), ocvtp.prune(vlm.model, method, 0.5):
        vlm.model(**inputs)


@torch.no_grad()
@on_each(BEFORE)
def test_keeping_everything_changes_nothing(vlm: Any, images: Any, method: str) -> None:
    model, inputs = vlm.model, vlm.prompt(images)
    logits, answer = model(**inputs).logits, model.generate(**inputs, **NEW)
    real = inputs["attention_mask"].bool()
    with prune(vlm, method, "100%") as handle:
        torch.testing.assert_close(model(**inputs).logits[real], logits[real], atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate(**inputs, **NEW), answer)
        assert [len(kept) for kept in handle.last_kept] == [max(kept) + 1 for kept in handle.last_kept]


@torch.no_grad()
@on_each(BEFORE)
def test_a_batch_is_what_its_rows_are_alone(vlm: Any, images: Any, method: str) -> None:
    model, inputs = vlm.model, vlm.prompt(images)
    length = inputs["input_ids"].shape[1]
    with prune(vlm, method, 0.5) as handle:
        together = model.generate(**inputs, **NEW)[:, length:]
        kept, alone = handle.last_kept, []
        for row in range(8):
            one = vlm.row(images, row)
            answer = model.generate(**one, **NEW)[:, one["input_ids"].shape[1] :]
            assert torch.equal(answer[0], together[row]), row
            alone += handle.last_kept
    assert len(kept) == 9
    assert alone == kept


def on_others() -> Any:
    """Parameters `vlm` and `method`: each method on each other family that can have it; budgets do not matter here."""
    methods = [name for name, entry in REGISTRY.items() if name != "vanilla" and "clip tower" not in entry.needs]
    methods = [name for name in methods if not name.endswith(AUTHORS)]
    # Layers with windows; so few layers that features of the tower are added to most of them.
    pairs = [
        (family, method)
        for family in OTHERS
        for method in methods
        if REGISTRY[method].acts == "before the LLM" or family not in ("gemma3", "qwen3_vl")
    ]
    return pytest.mark.parametrize(("vlm", "method"), pairs, indirect=["vlm"])


@torch.no_grad()
@on_others()
def test_on_other_families_all_is_all_and_a_batch_is_its_rows(vlm: Any, images: Any, method: str) -> None:
    """In one pass each: ways to generate do not ask which method it is."""
    model, inputs = vlm.model, vlm.prompt(images)
    logits, real = model(**inputs).logits, inputs["attention_mask"].bool()
    with prune(vlm, method, "100%") as handle:
        torch.testing.assert_close(model(**inputs).logits[real], logits[real], atol=1e-5, rtol=1e-5)
        assert all(kept == list(range(len(kept))) for kept in handle.last_kept)
    with prune(vlm, method, 0.5 if REGISTRY[method].acts == "before the LLM" else 0.75) as handle:
        model(**inputs)
        kept, alone = handle.last_kept, []
        for row in range(8):
            model(**vlm.row(images, row))
            alone += handle.last_kept
    assert kept == alone
    assert len(kept) >= 9
    assert any(kept != list(range(len(kept))) for kept in alone)


@torch.no_grad()
def test_images_that_are_no_pixels_are_refused_and_not_left_unpruned(vlm: Any, images: Any) -> None:
    inputs, model = vlm.prompt(images), vlm.model
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    embeddings = model.get_input_embeddings()(ids["input_ids"])
    with prune(vlm, "random", 0.5):
        for call in (model.generate, model.forward):
            for hidden in ({"mm_encoder_outputs": object()}, {"pixel_values_videos": embeddings}):
                name = next(iter(hidden))
                with pytest.raises(BadInput, match=f"cannot take {name}|needs video_grid_thw beside {name}"):
                    call(**ids, **hidden)
            with pytest.raises(BadInput, match="cannot take inputs_embeds: give input_ids"):
                call(**ids, inputs_embeds=embeddings)


def test_a_pruned_model_is_not_copied(vlm: Any) -> None:
    with (
        prune(vlm, "fastv", 0.5),
        pytest.raises(BadInput, match=r"neither be copied nor be saved as a whole: call remove\(\)"),
    ):
        copy.deepcopy(vlm.model)
    copy.deepcopy(vlm.model)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_each(sorted(set(REGISTRY) - {"vanilla"}))
def test_implementations_of_attention_keep_the_same(
    vlm: Any, images: Any, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, scores = {}, dict[str, list[torch.Tensor]]()
    names = ["sdpa", "eager"]
    if is_flash_attn_2_available() and torch.cuda.is_available() and dtype != torch.float32:
        names.append("flash_attention_2")
    score = Inside.score
    for name in names:
        one = vlm._replace(model=copy.deepcopy(vlm.model).to(dtype))
        if name == "flash_attention_2":
            one.model.cuda()
        one.model.set_attn_implementation(name)
        inputs = one.prompt(images).to(one.model.device)
        seen = scores[name] = []

        def noted(self: Inside, scored: Any, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(score(self, scored))
            return seen[-1]

        monkeypatch.setattr(Inside, "score", noted)
        with prune(one, method, 0.5) as handle:
            one.model(**inputs)
            kept[name] = handle.last_kept
    for name in names[1:]:
        apart = [len({*a} - {*b}) for a, b in zip(kept["sdpa"], kept[name], strict=True)]
        if method != CASCADE or dtype == torch.float32:
            assert max(apart) <= (0 if dtype == torch.float32 else allowed(method)), name
            continue
        # A later stage ranks what the stages before it left, at positions that depend on that: one token that changes
        # places at the first may change all that follow. So the first is held to the bound, and the rest all together.
        better = [half(scores[which][0]) for which in ("sdpa", name)]
        assert max(len(a - b) for a, b in zip(*better, strict=True)) <= allowed(method), name
        assert sum(apart) <= CASCADE_IN_BF16 * sum(map(len, kept[name])), name


def half(scores_IN: torch.Tensor) -> list[set[int]]:
    """Of each image the better half of its tokens."""
    found = []
    for row_N in scores_IN.float().cpu():
        there = int(row_N.isfinite().sum())
        found.append({*row_N.nan_to_num(neginf=-1.0).topk(there // 2).indices.tolist()})
    return found


def allowed(method: str) -> int:
    """In bfloat16. What goes late inside the LLM depends on all that went before, as greedy picks do on each other."""
    return 8 if REGISTRY[method].acts != "before the LLM" or method in GREEDY else IN_BF16
