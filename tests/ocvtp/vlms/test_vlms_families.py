"""Every family: a pruned model is a model that never had the dropped tokens, whatever the batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vlms_expected import KEEP, METHODS, NEW, Picture, places_of, prune, stays, taught

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.vlms import family_of

pytestmark = pytest.mark.usefixtures("clean")


# --- What is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vanilla", *METHODS])
@torch.no_grad()
def test_keeping_everything_changes_nothing(vlm: Any, batch: Any, method: str) -> None:
    logits, answer = vlm.model(**batch).logits, vlm.model.generate(**batch, **NEW)
    real = batch["attention_mask"].bool()
    for keep in (None,) if method == "vanilla" else (1.0, "100%"):
        for positions in ("compact", "original"):
            with prune(vlm, method, keep, positions=positions) as handle:
                pruned = vlm.model(**batch).logits
                torch.testing.assert_close(pruned[real], logits[real], atol=1e-5, rtol=1e-5)
                assert torch.equal(vlm.model.generate(**batch, **NEW), answer)
                family = family_of(vlm.model)
                assert handle.last_kept == [list(range(n)) for n in family.counts(family.images(batch))]


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_a_pruned_prompt_is_one_that_never_had_the_tokens(vlm: Any, images: Any, batch: Any, positions: str) -> None:
    length = batch["input_ids"].shape[1]
    with prune(vlm, "random", KEEP, positions=positions) as handle:
        output = vlm.model.generate(**batch, **NEW, return_dict_in_generate=True, output_logits=True)
        kept = iter(handle.last_kept)
    assert torch.equal(output.sequences[:, :length], batch["input_ids"])
    for row in range(8):
        mine, answer = [next(kept) for _ in images[row]], output.sequences[row, length:]
        expected = taught(vlm, vlm.row(images, row), mine, answer, positions)
        found = torch.stack([step[row] for step in output.logits])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        expected[:, vlm.model.generation_config.suppress_tokens] = -torch.inf
        assert torch.equal(expected.argmax(1), answer)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_batch_is_what_its_rows_are_alone(vlm: Any, images: Any, batch: Any, method: str) -> None:
    length = batch["input_ids"].shape[1]
    with prune(vlm, method, KEEP) as handle:
        together, beams = (vlm.model.generate(**batch, **NEW, num_beams=n)[:, length:] for n in (1, 3))
        kept, alone = handle.last_kept, []
        assert [len(row) for row in kept] == [KEEP] * 9
        for row in range(8):
            one = vlm.row(images, row)
            for wanted, count in ((together, 1), (beams, 3)):
                answer = vlm.model.generate(**one, **NEW, num_beams=count)[:, one["input_ids"].shape[1] :]
                assert torch.equal(answer[0], wanted[row]), (row, count)
            alone += handle.last_kept
        assert alone == kept


@torch.no_grad()
def test_beams_and_samples_are_those_of_the_whole_model_if_everything_stays(
    vlm: Any, images: Any, picture_of: Picture
) -> None:
    # At most one image a prompt, and of InternVL at most one tile: transformers 5.17 mixes up those of prompts that it
    # repeats.
    rows = [row[:1] for row in images]
    if vlm.kind == "internvl":
        rows = [[picture_of(number)] * len(row) for number, row in enumerate(rows)]
    batch = vlm.prompt(rows)
    ways: list[dict[str, Any]] = [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "temperature": 1.5}]
    for way in ways:
        found = []
        for keep in (None, 1.0, 1.0):
            torch.manual_seed(5)
            if keep is None:
                found.append(vlm.model.generate(**batch, **{**NEW, **way}))
                continue
            with prune(vlm, "random", keep):
                found.append(vlm.model.generate(**batch, **{**NEW, **way}))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_several_answers_a_prompt_follow_the_seed(vlm: Any, batch: Any) -> None:
    answers = []
    with prune(vlm, "random", KEEP):
        greedy = vlm.model.generate(**batch, **NEW)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            answers.append(vlm.model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=2))
        best = vlm.model.generate(**batch, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    assert torch.equal(best, greedy.repeat_interleave(2, 0))


@torch.no_grad()
def test_padding_on_the_right_works_in_forward(vlm: Any, images: Any, batch: Any) -> None:
    vlm.processor.tokenizer.padding_side = "right"
    try:
        right = vlm.prompt(images)
    finally:
        vlm.processor.tokenizer.padding_side = "left"
    with prune(vlm, "random", KEEP) as handle:
        first, kept = vlm.model(**batch).logits, handle.last_kept
        second = vlm.model(**right).logits
        assert handle.last_kept == kept
        assert (handle.last_columns[:, 0] == 0).all()
        for row in range(8):
            alone = vlm.model(**vlm.row(images, row)).logits[0]
            torch.testing.assert_close(first[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(second[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_eager_attention_keeps_and_says_the_same(vlm: Any, make_vlm: Callable[..., Any], batch: Any) -> None:
    eager = make_vlm(vlm.kind)
    eager.model.set_attn_implementation("eager")
    found = []
    for each in (vlm, eager):
        with prune(each, "oc-vtp", KEEP, fill="attention") as handle:
            found.append((each.model(**batch).logits, handle.last_kept, handle.last_columns))
    (logits, kept, columns), (others, same, _) = found
    assert kept == same
    real = batch["attention_mask"].gather(1, columns.clamp(min=0)).bool() & (columns >= 0)
    torch.testing.assert_close(others[real], logits[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_language_model_reads_what_stays_and_nothing_else(vlm: Any, picture_of: Picture) -> None:
    pictures = [[picture_of(0, 120, 60)], [picture_of(1, 70, 110)]]
    inputs, lengths = vlm.prompt(pictures), list[int]()
    hook = (
        vlm.model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    )
    with prune(vlm, "random", KEEP) as handle:
        vlm.model.generate(**inputs, **NEW)
        kept = handle.last_kept
    hook.remove()
    rows = []
    for row, mine in enumerate(kept):
        one = vlm.row(pictures, row)
        (numbers,) = places_of(vlm, one)
        rows.append(one["input_ids"].shape[1] - stays(numbers, mine).count(False))
        assert stays(numbers, mine).count(True) >= KEEP
    assert lengths == [max(rows), 1, 1, 1, 1, 1]


# --- The tower --------------------------------------------------------------------------------------------------------


def blocks_of(vlm: Any) -> Any:
    family = family_of(vlm.model)
    return family.eye.blocks if hasattr(family, "eye") else family.tower.blocks


def test_the_tower_stops_after_the_layer_it_needs(vlm: Any, batch: Any) -> None:
    family, ran = family_of(vlm.model), list[int]()
    inputs = family.images(batch)
    hooks = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(blocks_of(vlm))
    ]
    for layers, values, blocks in (([2], False, 2), ([1, 3], False, 3), ([2], True, family.facts.feature_layer)):
        ran.clear()
        family.encode(inputs, layers, values=values)
        assert ran == list(range(blocks))
    ran.clear()
    with torch.no_grad(), prune(vlm, "oc-vtp", KEEP):
        vlm.model(**batch)
    assert ran == list(range(family.facts.feature_layer))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_what_is_projected_of_all_tokens_is_what_transformers_makes_of_the_images(vlm: Any, batch: Any) -> None:
    family = family_of(vlm.model)
    inputs = family.images(batch)
    vision = family.encode(inputs, ())
    features = family.project([vision.values([i])[0] for i in range(len(inputs))])
    more = {n: batch[n] for n in ("image_sizes", "image_grid_thw", "batch_num_images") if n in batch}
    made = vlm.model.model.get_image_features(batch["pixel_values"], **more, return_dict=True)
    theirs = torch.cat([each.flatten(0, -2) for each in made.pooler_output])
    theirs = torch.cat(
        [
            theirs,
            *(
                torch.cat(list(plane)) if isinstance(plane, tuple) else plane
                for plane in getattr(made, "deepstack_features", [])
            ),
        ],
        1,
    )
    mine = list[Tensor]()
    for number, ours in enumerate(features):
        placed = family.place(inputs, number, torch.arange(len(ours)), ours)
        assert placed.places_X.tolist() == list(range(placed.whole))
        mine.append(placed.features_XD)
    torch.testing.assert_close(torch.cat(mine), theirs)


# --- On and off, and side by side ------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_families_are_pruned_side_by_side_and_given_back(
    vlm: Any, make_vlm: Callable[..., Any], picture_of: Picture
) -> None:
    other = make_vlm("llava" if vlm.tokens is None else "qwen2_5_vl", 1)
    pictures = [[picture_of(0)], [picture_of(1, 90, 60)]]
    mine, theirs = vlm.prompt(pictures), other.prompt(pictures)
    before, logits = vlm.model.generate(**mine, **NEW), vlm.model(**mine).logits[:, -1]
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    names = set(vlm.model.__dict__)
    unpruned = other.model.generate(**theirs, **NEW)
    with prune(vlm, "random", KEEP) as handle:
        alone = vlm.model.generate(**mine, **NEW)
        kept, pruned = handle.last_kept, vlm.model(**mine).logits[:, -1]
        assert torch.equal(other.model.generate(**theirs, **NEW), unpruned)
        with prune(other, "oc-vtp", 2) as second:
            other.model.generate(**theirs, **NEW)
            assert torch.equal(vlm.model.generate(**mine, **NEW), alone)
            assert (handle.last_kept, [len(each) for each in second.last_kept]) == (kept, [2, 2])
    assert not torch.allclose(pruned, logits, atol=1e-3)
    assert torch.equal(vlm.model.generate(**mine, **NEW), before)
    assert set(vlm.model.__dict__) == names
    for name, value in vlm.model.state_dict().items():
        assert torch.equal(value, weights[name])


@torch.no_grad()
def test_an_exception_inside_leaves_the_handle_usable(vlm: Any, batch: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop here")

    with prune(vlm, "random", KEEP):
        expected = vlm.model.generate(**batch, **NEW)
        with pytest.raises(RuntimeError, match="stop here"):
            vlm.model.generate(**batch, **NEW, stopping_criteria=[fail])
        hook = blocks_of(vlm)[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            vlm.model.generate(**batch, **NEW)
        hook.remove()
        assert torch.equal(vlm.model.generate(**batch, **NEW), expected)


# --- Models that are not as they were loaded -------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear map from eight bits, as quantisers leave it: it has no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed * self.scale, self.bias)


@torch.no_grad()
def test_quantised_models_are_pruned_as_others(make_vlm: Callable[..., Any], vlm: Any, picture_of: Picture) -> None:
    packed = make_vlm(vlm.kind)
    for module in list(packed.model.modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is nn.Linear and child != "lm_head":
                setattr(module, child, Packed(linear))
    inputs = packed.prompt([[picture_of(0)], [picture_of(1, 90, 60)]])
    answer = packed.model.generate(**inputs, **NEW)
    for method in METHODS:
        with prune(packed, method, 1.0):
            assert torch.equal(packed.model.generate(**inputs, **NEW), answer)
        with prune(packed, method, KEEP) as handle:
            packed.model.generate(**inputs, **NEW)
            assert [len(kept) for kept in handle.last_kept] == [KEEP, KEEP]


def test_gradients_are_the_same_with_gradient_checkpointing(
    make_vlm: Callable[..., Any], vlm: Any, picture_of: Picture
) -> None:
    trained = make_vlm(vlm.kind)
    inputs = trained.prompt([[picture_of(0)], [picture_of(1, 90, 60)]])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            trained.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained.model.train()
        trained.model.zero_grad()
        with prune(trained, "oc-vtp", KEEP):
            trained.model(
                **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
            ).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in trained.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for each, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][each], gradient, msg=each)
    first_block = next(
        name for name, p in trained.model.named_parameters() if p is next(blocks_of(trained)[0].parameters())
    )
    assert gradients[0][first_block].abs().max() > 0


@torch.no_grad()
def test_half_precision_keeps_what_a_batch_keeps(vlm: Any, make_vlm: Callable[..., Any], images: Any) -> None:
    half = make_vlm(vlm.kind)
    half.model.to(torch.bfloat16)
    inputs = half.prompt(images)
    with prune(half, "random", KEEP) as handle:
        half.model.generate(**inputs, **NEW)
        kept = handle.last_kept
        half.model.generate(**inputs.to(torch.bfloat16), **NEW)
        assert handle.last_kept == kept
    with prune(vlm, "random", KEEP) as handle:
        vlm.model.generate(**inputs.to(torch.float32), **NEW)
        assert handle.last_kept == kept


def test_other_classes_are_refused_with_what_is_supported() -> None:
    with pytest.raises(BadInput, match="a Linear, which cannot be pruned; supported are") as refused:
        family_of(nn.Linear(2, 2))
    for name in ("LlavaFor", "LlavaNextFor", "Qwen2_5_VLFor"):
        assert f"{name}ConditionalGeneration" in str(refused.value)


def test_a_folder_is_described_by_its_config_alone(vlm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    vlm.model.config.architectures = [type(vlm.model).__name__]
    vlm.model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    expected = family_of(vlm.model).facts_of(AutoConfig.from_pretrained(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(AutoConfig, "from_pretrained", None)
        assert ocvtp.vlms.resolve(tmp_path).facts == expected
    # What a file leaves out is what transformers has by default.
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"].pop("hidden_size")
    (tmp_path / "config.json").write_text(json.dumps(config))
    defaults = family_of(vlm.model).facts_of(AutoConfig.from_pretrained(tmp_path))
    assert ocvtp.vlms.resolve(tmp_path).facts == defaults != expected
