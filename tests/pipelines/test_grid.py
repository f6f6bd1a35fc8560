"""The grid: an axis multiplies what it changes and nothing else."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ocvtp.methods import REGISTRY
from ocvtp.methods.budget import Budget
from ocvtp.selection import CHOICES
from ocvtp.vlms import resolve
from pipelines.grid import Cell, handed_on_layer, pruner_cells, settings, token_sets, trained_on, vlm_folder
from pipelines.params.ablate import Ablate, Change, Together
from pipelines.params.load import load
from pipelines.params.model import Params
from pipelines.stage.context import ROOT

LLAVA = resolve("tiny-llava")
TOKENS: dict[str, int | None] = {"tiny-llava": 144, "variable": None}


@pytest.fixture(scope="module")
def shipped() -> Params:
    """With three budgets of the five."""
    budgets = tuple(Budget(count, count=count) for count in (48, 32, 16))
    return load(ROOT / "params.yaml").model_copy(update={"keep": budgets})


def expand(params: Params, **changes: Any) -> list[Cell]:
    return settings(params.model_copy(update=changes), REGISTRY, TOKENS)


def test_the_default_grid() -> None:
    shipped = load(ROOT / "params.yaml")
    found = expand(shipped)
    by_method = {name: [one for one in found if one.method == name] for name in shipped.method}
    assert {name: len(some) for name, some in by_method.items()} == {
        **dict.fromkeys(shipped.method, 5),
        "vanilla": 1,
        **dict.fromkeys(("random", "oc-vtp-untrained", "oc-vtp"), 15),
    }
    assert len(shipped.method) == 14
    assert set(shipped.method) < set(REGISTRY) - {"trim", "cdpruner"}, "tiny-llava has no text tower"
    assert len(pruner_cells(shipped)) == 3
    assert {one.pruner for one in by_method["oc-vtp"]} == set(pruner_cells(shipped))
    assert {(one.tokens, one.seed) for one in by_method["random"]} == {
        (k, s) for k in (48, 32, 16, 8, 4) for s in (0, 1, 2)
    }


def with_ablate(params: Params, *changes: Change) -> Params:
    """Each change by itself."""
    together = [Together.model_validate(section([change])) for change in changes]
    return params.model_copy(update={"ablate": Ablate(together=tuple(together))})


def section(changes: Iterable[Change]) -> dict[str, Any]:
    """As params.yaml has it."""
    found: dict[str, Any] = {}
    for path, value in changes:
        *above, key = path.split(".")
        place = found
        for name in above:
            place = place.setdefault(name, {})
        place[key] = value
    return found


@pytest.mark.parametrize(
    ("axis", "values", "pruners", "ours", "random"),
    [
        ("layer", (9, 10), 6, 18, 9),
        ("loss", ("aw_mse", "mse"), 6, 18, 9),
        ("slots", ((16,), (16, 32), (48,)), 9, 27, 9),
        ("top_k", (1, 2), 3, 18, 9),
        ("seed", (0, 1), 2, 6, 6),
        ("keep", (Budget(8, count=8),), 3, 3, 3),
    ],
)
def test_an_axis_multiplies_what_it_changes(shipped, axis, values, pruners, ours, random) -> None:
    found = expand(shipped, **{axis: values})
    assert len(pruner_cells(shipped.model_copy(update={axis: values}))) == pruners
    assert sum(one.method == "oc-vtp" for one in found) == ours
    assert sum(one.method == "random" for one in found) == random
    assert sum(one.method == "vanilla" for one in found) == 1
    assert len({(one.vlm, one.name) for one in found}) == len(found)


def test_vanilla_is_always_there_and_once_for_each_vlm(shipped: Params) -> None:
    found = expand(shipped, vlm=("tiny-llava", "variable"), method=("random",))
    assert [one.vlm for one in found if one.method == "vanilla"] == ["tiny-llava", "variable"]


def test_the_untrained_pruner_has_a_layer_but_no_loss(shipped: Params) -> None:
    found = expand(shipped, method=("oc-vtp-untrained",), layer=(9, 10), loss=("mse", "aw_mse"), seed=(0,))
    assert len(found) == 1 + 3 * 2
    assert found[1].options == {"top_k": 1, "layer": 9, "weights_seed": 0}
    assert found[1].axes["loss"] is None
    ours = expand(shipped, method=("oc-vtp",))[1]
    assert ours.options == {"top_k": 1}  # the pruner knows its layer


def test_images_with_different_numbers_of_tokens_have_shares_alone(shipped: Params) -> None:
    share = Budget("11.1%", share=0.111)
    one = expand(shipped, vlm=("variable",), method=("random",), keep=(share, Budget(64, count=64)))[1:]
    assert (one[0].tokens, one[0].share, one[0].name) == (None, 0.111, "random-11.1pct-seed_0")
    assert (one[3].tokens, one[3].share) == (64, None)


def test_names_of_folders() -> None:
    assert vlm_folder("llava-1.5-7b") == "llava-1.5-7b"
    first, second = vlm_folder("/models/a b/llava"), vlm_folder("/models/c/llava")
    assert first != second
    assert first.startswith("llava-")
    assert vlm_folder("/") not in ("", ".", "..")
    assert "/" not in vlm_folder("../..")


@pytest.mark.parametrize(
    ("change", "pruners", "ours", "untrained"),
    [
        (("loss", "mse"), 3, 9, 0),
        (("layer", 10), 3, 9, 9),
        (("top_k", 2), 0, 9, 9),
        (("slots", (16,)), 3, 9, 0),
        (("train.steps", 50), 3, 9, 0),
        (("train.pruner.decoder", "mlp"), 3, 9, 0),
        (("evaluate.options.oc-vtp.fill", "random"), 0, 9, 0),
    ],
)
def test_a_change_adds_what_it_concerns_once_more(shipped, change, pruners, ours, untrained) -> None:
    params = with_ablate(shipped, change)
    assert pruner_cells(params)[:3] == pruner_cells(shipped)
    assert len(pruner_cells(params)) == 3 + pruners
    found = expand(params)
    new = [one for one in found if one.changes]
    assert [one for one in found if not one.changes] == expand(shipped)
    assert {one.changes for one in new} == {(change,)}
    assert sum(one.method == "oc-vtp" for one in new) == ours
    assert sum(one.method == "oc-vtp-untrained" for one in new) == untrained
    free = sum(one.method in CHOICES for one in new)  # one choice on the layer of the axis, three budgets
    assert free == (3 if change[0] == "layer" else 0)
    assert len(new) == ours + untrained + free
    assert len({(one.vlm, one.name) for one in found}) == len(found)
    assert {one.pruner for one in found if one.pruner} == set(pruner_cells(params))


def test_what_is_changed_together_is_one_pruner_and_concerns_each_method_as_far_as_it_goes(shipped: Params) -> None:
    changes: list[Change] = [
        ("layer", -2),
        ("loss", "span"),
        ("slots", (4, 8)),
        ("train.steps", 300),
        ("evaluate.options.oc-vtp.fill", "random"),
    ]
    together = [Together.model_validate(section(some)) for some in (changes, [("layer", -2), ("train.steps", 300)])]
    params = shipped.model_copy(update={"ablate": Ablate(together=tuple(together))})
    assert token_sets(params, LLAVA) == [("sample", 9), ("sample", -2)]
    new = pruner_cells(params)[3:]
    assert [(one.layer, one.loss, one.slots, one.changes) for one in new[::3]] == [
        (-2, "span", (4, 8), (("train.steps", 300),)),
        (-2, "aw_mse", (16, 32, 48), (("train.steps", 300),)),
    ]
    cells = [one for one in expand(params) if one.changes]
    ours = [one for one in cells if one.method == "oc-vtp"]
    assert len(ours) == 2 * 9
    assert {one.changes for one in ours} == {tuple(changes), (("layer", -2), ("train.steps", 300))}
    assert {one.options.get("fill") for one in ours if one.pruner.loss == "span"} == {"random"}
    assert {one.pruner for one in ours} == set(new)
    others = [one for one in cells if one.method != "oc-vtp"]
    assert {one.method for one in others} == {"oc-vtp-untrained", "fps"}  # qr and css have a layer of their own
    assert {one.changes for one in others} == {(("layer", -2),)}
    assert len({(one.vlm, one.name) for one in cells}) == len(cells), "both combinations have layer -2"


def test_changes_that_come_to_the_same_are_one_setting(shipped: Params) -> None:
    one, other = {"layer": -2, "loss": "span"}, {"evaluate": {"options": {"fps": {"layer": -2}}}}
    both = tuple(
        Together.model_validate(changes) for changes in (one, other, {"evaluate": {"options": {"fps": {"layer": 9}}}})
    )
    cells = [cell for cell in expand(shipped, ablate=Ablate(together=both)) if cell.method == "fps"]
    assert [(cell.tokens, cell.layer, cell.changes) for cell in cells] == [
        *((keep, 9, ()) for keep in (48, 32, 16)),
        *((keep, -2, (("layer", -2),)) for keep in (48, 32, 16)),
    ]


def test_what_the_grid_has_is_left_out_of_what_is_changed_together(tmp_path: Path) -> None:
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    data["ablate"] = {"loss": ["aw_mse"], "together": [{"loss": "aw_mse", "layer": 10}, {"top_k": 1}]}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(data))
    assert load(path).ablate.changes == ((("layer", 10),),)


def test_changes_are_not_multiplied_with_each_other(shipped: Params) -> None:
    params = with_ablate(shipped, ("loss", "mse"), ("layer", 10), ("train.steps", 50))
    assert len(pruner_cells(params)) == 3 + 9
    assert token_sets(params, LLAVA) == [("sample", 9), ("sample", 10), ("sample", -2)]
    cells = pruner_cells(params)
    assert cells[-1].changes == (("train.steps", 50),)
    assert cells[-1].folder == "tiny-llava/layer_9-aw_mse-slots_16_32_48-steps_50-seed_2"


def test_options_of_a_method_reach_it(shipped: Params) -> None:
    evaluate = shipped.evaluate.model_copy(update={"options": {"oc-vtp": {"fill": "next_best"}}})
    found = expand(with_ablate(shipped, ("evaluate.options.oc-vtp.fill", "random")), evaluate=evaluate)
    ours = [one for one in found if one.method == "oc-vtp"]
    assert next(one.options for one in ours if not one.changes) == {"fill": "next_best", "top_k": 1}
    assert next(one.options for one in ours if one.changes) == {"fill": "random", "top_k": 1}
    assert all("fill" not in one.options for one in found if one.method == "oc-vtp-untrained")


def test_a_layer_of_its_own_stands_in_place_of_the_axis(shipped) -> None:
    def layers_of(params: Params, method: str) -> set[int | None]:
        return {one.layer for one in expand(params) if one.method == method}

    assert layers_of(shipped, "css") == {-2}
    assert layers_of(shipped, "qr") == {-2}
    assert layers_of(shipped, "fps") == {9}
    assert {one.options["layer"] for one in expand(shipped) if one.method == "css"} == {-2}
    assert layers_of(with_ablate(shipped, ("evaluate.options.css.layer", 9)), "css") == {-2, 9}


def trained(params: Params, *on: str) -> Params:
    return params.model_copy(update={"train": params.train.model_copy(update={"on": on})})


def test_pruners_of_a_benchmarks_own_images_are_an_axis_and_are_evaluated_on_it_alone(shipped: Params) -> None:
    params = trained(shipped, "sample", "gqa")
    cells = pruner_cells(params)
    assert [(one.on, one.seed) for one in cells] == [(on, seed) for on in ("sample", "gqa") for seed in (0, 1, 2)]
    assert cells[-1].folder == "tiny-llava/layer_9-aw_mse-slots_16_32_48-on_gqa-seed_2"
    assert cells[:3] == pruner_cells(shipped), "the grid's own keep their names"
    found = expand(params)
    new = [one for one in found if one.changes]
    assert [one for one in found if not one.changes] == expand(shipped)
    assert {(one.method, one.changes) for one in new} == {("oc-vtp", (("train.on", "gqa"),))}
    assert len(new) == 9
    assert all(one.asks("gqa") and not one.asks("pope") for one in new)
    assert all(one.asks("gqa") and one.asks("pope") for one in found if not one.changes)
    alone = expand(trained(shipped, "gqa"))
    assert {one.changes for one in alone if one.method == "oc-vtp"} == {(("train.on", "gqa"),)}
    assert trained_on(params) == ["gqa"]


def test_tokens_are_extracted_of_the_images_that_pruners_are_trained_on_alone(shipped: Params) -> None:
    assert token_sets(trained(shipped, "gqa"), LLAVA) == [("gqa", 9), ("gqa", -2)]
    ablated = with_ablate(trained(shipped, "sample", "gqa"), ("layer", 10), ("train.on", "vizwiz"), ("loss", "mse"))
    ablated = ablated.model_copy(update={"train": ablated.train.model_copy(update={"handed_on": False})})
    assert token_sets(ablated, LLAVA) == [("sample", 9), ("gqa", 9), ("sample", 10), ("gqa", 10), ("vizwiz", 9)]
    wanted = {(one.on, one.layer) for one in pruner_cells(ablated)}
    assert wanted == set(token_sets(ablated, LLAVA))
    assert trained_on(ablated) == ["gqa", "vizwiz"]
    (path,) = {one.folder for one in pruner_cells(ablated) if one.on == "vizwiz" and one.seed == 0}
    assert path == "tiny-llava/layer_9-aw_mse-slots_16_32_48-on_vizwiz-seed_0"
    assert all(one.changes == (("train.on", "vizwiz"),) for one in pruner_cells(ablated) if one.on == "vizwiz")


def test_the_layer_that_goes_to_the_llm_is_extracted_once_under_the_name_it_has_in_the_grid(shipped: Params) -> None:
    def layers(asked: tuple[int, ...], *changes: Change, handed_on: bool = True) -> list[int]:
        train = shipped.train.model_copy(update={"handed_on": handed_on})
        params = shipped.model_copy(update={"layer": asked, "train": train})
        params = with_ablate(params, *changes) if changes else params
        return [layer for _, layer in token_sets(params, LLAVA)]

    assert LLAVA.feature_layer == LLAVA.depth - 1
    assert layers((9,)) == [9, -2]
    assert layers((9, LLAVA.feature_layer)) == [9, LLAVA.feature_layer]
    assert layers((9,), ("layer", LLAVA.feature_layer)) == [9, LLAVA.feature_layer]
    assert layers((9,), handed_on=False) == [9]
    assert layers((9,), ("train.handed_on", True), handed_on=False) == [9, -2]
    assert handed_on_layer(shipped, resolve("tiny-qwen")) == -1


def test_slots_of_its_own_are_what_the_catalogue_has_for_each_vlm(shipped: Params) -> None:
    params = shipped.model_copy(update={"slots": (), "vlm": ("tiny-llava", "tiny-qwen")})
    assert {(one.vlm, one.slots) for one in pruner_cells(params)} == {
        ("tiny-llava", (16, 32, 48)), ("tiny-qwen", (8, 16, 32)),
    }  # fmt: skip
    assert pruner_cells(params)[:3] == pruner_cells(shipped)
    cells = settings(params, REGISTRY, {"tiny-llava": 144, "tiny-qwen": None})
    assert {one.pruner for one in cells if one.pruner} == set(pruner_cells(params))
    more = with_ablate(params, ("slots", (4, 8)))
    assert {one.slots for one in pruner_cells(more)} == {(16, 32, 48), (8, 16, 32), (4, 8)}
