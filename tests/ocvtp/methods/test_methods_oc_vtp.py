"""OC-VTP on a model: the right layer is looked at, gaps are filled as said, and foreign pruners are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import ocvtp
from ocvtp.errors import BadInput, Incompatible, NotAvailable
from ocvtp.methods import describe, entry_of
from ocvtp.pruner import OCPruner, PrunerConfig, TrainedFor
from ocvtp.pruner.slots import SharedGaussian

Picture = Callable[..., Image.Image]


def pruner(layer: int | None = 3, tower_layer: int | None = None, width: int = 32, **options: Any) -> OCPruner:
    torch.manual_seed(5)
    made = OCPruner(
        PrunerConfig(width, grid=(4, 4), decoder=None, **options),
        TrainedFor(vlm="tiny", layer=layer, tower_layer=tower_layer, weights="abc"),
    ).eval()
    if isinstance(made.queries, SharedGaussian):
        with torch.no_grad():  # so that slots differ
            made.queries.log_std.fill_(1.0)
    return made


def slowly(made: OCPruner, tokens_NC: Tensor, keep: int, slots: int, seed: int, ranking_N: Tensor) -> list[int]:
    """Each slot's most attended token, then the best of the ranking, in plain Python."""
    attention_KN = made(tokens_NC[None], slots, seeds=[seed], decode="none").attention[0]
    picks: dict[int, float] = {}
    for row in attention_KN.tolist():
        best = max(range(len(row)), key=lambda i: row[i])
        picks[best] = max(picks.get(best, 0.0), row[best])
    chosen = sorted(picks, key=lambda i: -picks[i])[:keep]
    for token in sorted(range(len(tokens_NC)), key=lambda i: -float(ranking_N[i])):
        if len(chosen) < keep and token not in chosen:
            chosen.append(token)
    return sorted(chosen)


@pytest.mark.parametrize("behaviour", ["default", "reference"])
@torch.no_grad()
def test_indices_follow_from_the_hidden_states_of_transformers(
    make_vlm: Callable[..., Any], picture_of: Picture, behaviour: str
) -> None:
    llava = make_vlm("llava")
    made = pruner(behaviour=behaviour)
    inputs = llava.prompt([[picture_of(i)] for i in range(6)])
    seeds: list[list[int]] = []
    select = made.select_details
    made.select_details = lambda *args, **kwargs: seeds.append(kwargs["seeds"]) or select(*args, **kwargs)  # type: ignore[func-returns-value,method-assign]
    with ocvtp.prune(llava.model, "oc-vtp", 6, made, surplus="attention") as handle:
        llava.model(**inputs)
    llava.model.set_attn_implementation({"vision_config": "eager"})
    output = llava.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert len(set(seeds[0])) == 6
    for image in range(6):
        tokens_NC = output.hidden_states[3][image, 1:]
        if behaviour == "reference":  # one slot more, gaps by the attention in the block before layer -2
            ranking_N = output.attentions[3][image].mean((0, 1))[1:]
            expected = slowly(made, tokens_NC, 6, 7, seeds[0][image], ranking_N)
        else:
            attention_KN = made(tokens_NC[None], 6, seeds=[seeds[0][image]], decode="none").attention[0]
            ranking_N = (attention_KN / attention_KN.sum(1, keepdim=True)).sum(0)
            expected = slowly(made, tokens_NC, 6, 6, seeds[0][image], ranking_N)
        assert handle.last_kept[image] == expected


@torch.no_grad()
def test_what_picks_leave_is_that_of_the_layer_that_goes_on(make_vlm: Callable[..., Any], picture_of: Picture) -> None:
    """Slots read layer 3, residuals are those of the layer that the LLM is fed from; `mass_power` is an option."""
    llava = make_vlm("llava")
    made = pruner(assignment="mass", residual_of="handed_on", queries="fps")
    inputs = llava.prompt([[picture_of(i)] for i in range(3)])
    states = llava.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layer = llava.model.config.vision_feature_layer
    for power in (None, 0, 2.0):
        with ocvtp.prune(llava.model, "oc-vtp", 6, made, mass_power=power) as handle:
            llava.model(**inputs)
        expected = made.select(states[3][:, 1:], 6, handed_on=states[layer][:, 1:], mass_power=power)
        assert handle.last_kept == expected.tolist()
    with pytest.raises(BadInput, match="mass_power is -1"):
        ocvtp.prune(llava.model, "oc-vtp", 6, made, mass_power=-1)


@torch.no_grad()
def test_seeds_and_options_reach_the_pruner(llava: Any, picture_of: Picture) -> None:
    inputs = llava.prompt([[picture_of(i)] for i in range(4)])

    def kept(seed: int = 0, keep: int = 6, **options: Any) -> list[list[int]]:
        with ocvtp.prune(llava.model, "oc-vtp", keep, pruner(), seed=seed, **options) as handle:
            llava.model(**inputs)
            return handle.last_kept

    first = kept()
    assert [len(row) for row in first] == [6] * 4
    assert kept() == first
    assert any(kept(seed) != first for seed in range(1, 4))
    assert kept(top_k=3) != first
    bare = kept(fill="none", keep=12)
    assert any(len(row) < 12 for row in bare)
    for row in bare:
        assert row == sorted(set(row))
    llava.model(**inputs)


@torch.no_grad()
def test_a_pruner_comes_from_a_folder(llava: Any, picture_of: Picture, tmp_path: Path) -> None:
    made, inputs = pruner(), llava.prompt([[picture_of(0)]])
    made.save_pretrained(tmp_path / "pruner")
    found = []
    for given in (made, tmp_path / "pruner", str(tmp_path / "pruner"), made.train()):
        with ocvtp.prune(llava.model, "oc-vtp", 6, given) as handle:
            llava.model(**inputs)
            found.append(handle.last_kept)
    assert found == [found[0]] * 4
    with pytest.raises(NotAvailable):
        ocvtp.prune(llava.model, "oc-vtp", 6, tmp_path / "nothing")


def test_a_pruner_of_something_else_is_refused(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Incompatible, match=r"of tiny.* width 24, but the vision tower of .* has width 32"):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner(width=24))
    with pytest.raises(
        Incompatible, match=r"layer -2, which was hidden_states\[11\] of tiny, but is hidden_states\[4\]"
    ):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner(-2, 11))
    with pytest.raises(BadInput, match="layer 9 is outside of the vision tower of this VLM: it has 5 encoder blocks"):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner(9))
    with pytest.raises(Incompatible, match="trained for layer 3, but layer=2 is asked for"):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner(3), layer=2)
    with pytest.raises(BadInput, match="does not say which layer"):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner(None))
    ocvtp.prune(llava.model, "oc-vtp", 6, pruner(None), layer=2).remove()
    ocvtp.prune(llava.model, "oc-vtp", 6, pruner(-2), layer=4).remove()
    monkeypatch.setattr(
        llava.model, "ocvtp_entry", type("Entry", (), {"name": "big", "weights": "xyz"})(), raising=False
    )
    with pytest.raises(Incompatible, match="trained for tiny with weights abc, but the model is big with weights xyz"):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner())
    ocvtp.prune(llava.model, "oc-vtp", 6, pruner(), other_vlm=True).remove()


def test_a_pruner_of_another_stock_model_is_refused(
    llava: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Models that the catalogue has not loaded: transformers knows their commit, or the folder they are from."""
    monkeypatch.delattr(llava.model, "ocvtp_entry", raising=False)
    ocvtp.prune(llava.model, "oc-vtp", 6, pruner()).remove()
    assert "cannot tell whether" in caplog.text
    assert "is tiny with weights abc, for which the pruner was trained" in caplog.text
    monkeypatch.setattr(llava.model.config, "_commit_hash", "0" * 40, raising=False)
    with pytest.raises(
        Incompatible, match=r"trained for tiny with weights abc, but the model is .* with weights 0{40}"
    ):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner())
    ocvtp.prune(llava.model, "oc-vtp", 6, pruner(), other_vlm=True).remove()
    monkeypatch.setattr(llava.model.config, "_commit_hash", None)
    llava.model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(llava.model.config, "_name_or_path", str(tmp_path / "saved"))
    with pytest.raises(Incompatible, match=f"the model is {tmp_path}/saved with weights [0-9a-f]{{64}}"):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("fill", "xx", "fill is 'xx'"), ("assignment", "mine", "assignment is"), ("surplus", 1, "surplus is 1"),
        ("slots", 0, "slots=0"), ("slots", [3, 4], "slots="), ("top_k", "a", "top_k='a'"),
        ("precision", "fp8", "precision is 'fp8'"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_any_image(llava: Any, option: str, value: Any, said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        ocvtp.prune(llava.model, "oc-vtp", 6, pruner(), **{option: value})
    with pytest.raises(BadInput, match="weights_seed"):
        ocvtp.prune(llava.model, "oc-vtp-untrained", 6, layer=2, weights_seed="a")


@torch.no_grad()
def test_untrained_weights_are_drawn_from_their_own_seed(llava: Any, picture_of: Picture) -> None:
    inputs = llava.prompt([[picture_of(i)] for i in range(4)])

    def kept(weights_seed: int) -> list[list[int]]:
        with ocvtp.prune(llava.model, "oc-vtp-untrained", 6, layer=3, weights_seed=weights_seed) as handle:
            llava.model(**inputs)
            return handle.last_kept

    torch.manual_seed(1)
    first = kept(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert kept(0) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert kept(1) != first


def test_slots_are_those_that_chose(make_vlm: Callable[..., Any], picture_of: Picture) -> None:
    """Each slot's most attended token is kept, image by image, in every family; other methods have no slots."""
    for family in ("llava", "llava_next", "qwen2_5_vl"):
        vlm = make_vlm(family)
        inputs = vlm.prompt([[picture_of(1)], [picture_of(2, 80, 40)]])
        with ocvtp.prune(vlm.model, "oc-vtp-untrained", 6, layer=2) as handle:
            vlm.model(**inputs)
            slots = handle.slots(**inputs)
        for attention_KN, kept in zip(slots, handle.last_kept, strict=True):
            assert attention_KN is not None
            assert len(attention_KN) == 6
            assert set(attention_KN.argmax(1).tolist()) <= set(kept)
        with ocvtp.prune(vlm.model, "random", 6) as handle:
            assert handle.slots(**inputs) == [None, None]
        with ocvtp.prune(vlm.model, "vanilla") as handle:
            assert handle.slots(**inputs) == [None, None]


def test_the_register_says_what_there_is() -> None:
    rows = {row["name"]: row for row in describe()}
    assert {"vanilla", "random", "oc-vtp", "oc-vtp-untrained"} <= set(rows)
    for row in rows.values():
        assert set(row) == {"name", "acts", "needs_text", "source", "without_cls"}
    with pytest.raises(BadInput, match="no method 'ocvtp'; did you mean 'oc-vtp'"):
        entry_of("ocvtp")
