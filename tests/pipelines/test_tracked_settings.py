"""What stage `evaluate` tells MLflow of its settings: which series each belongs to, and under which names."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.task import canonical
from ocvtp.methods import REGISTRY
from ocvtp.methods.budget import Budget
from pipelines import eval as evaluate
from pipelines.grid import Cell, settings
from pipelines.params.ablate import Ablate
from pipelines.params.load import load
from pipelines.spool import Record
from pipelines.stage.context import ROOT
from pipelines.summary import Result

BENCHMARKS = ("pope", "gqa")


def told(
    tmp_path: Path,
    protocol: str = "native",
    score_of: Callable[[Cell, str], float | None] | None = None,
    **changes: Any,
) -> dict[Cell, Record]:
    """Records of a grid in which every setting scores its tokens on each benchmark, unless `score_of` says else."""
    params = load(ROOT / "params.yaml")
    params = params.model_copy(update={
        "keep": (Budget(48, count=48), Budget(16, count=16)), "method": ("vanilla", "random", "css", "oc-vtp"),
        "seed": (0, 1), "benchmark": BENCHMARKS, **changes,
    })  # fmt: skip
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"data": "official"})})
    wanted = settings(params, REGISTRY, {"tiny-llava": 144})
    tasks: dict[Any, Any] = {}
    results = []
    for cell in wanted:
        asked = {"vlm": cell.vlm, "method": cell.method, "keep": cell.tokens if cell.keep else None, "seed": cell.seed,
                 "options": cell.options, "pruner": cell.pruner and cell.pruner.folder, "data": None}  # fmt: skip
        spec = {"answers": asked, "answers_code": "code", "masks": None}
        pruner = None if cell.pruner is None else f"pruners/key-of-{cell.pruner.group}-{cell.pruner.seed}"
        for name in params.benchmark:
            tasks[cell, name] = SimpleNamespace(spec=spec, code="code", inputs={"pruner": pruner})
            score = {
                "score": score_of(cell, name) if score_of else float(cell.tokens or 0),
                "data": {"hub": name},
                "limit": None,
                "setting": {},
                "protocol": protocol,
            }
            results.append(Result(cell, name, score, [], ""))
    run: Any = SimpleNamespace(params=params, root=tmp_path)
    records = evaluate._records(run, wanted, tasks, results)
    return dict(zip(dict.fromkeys(result.setting for result in results), records, strict=True))


def test_budgets_of_one_pruner_or_method_and_seed_are_one_series(tmp_path: Path) -> None:
    found = told(tmp_path)
    series = {cell: record.series for cell, record in found.items()}
    assert [cell.method for cell, one in series.items() if one is None] == ["vanilla"]
    known = {cell: one for cell, one in series.items() if one is not None}
    assert Counter(one.name for one in known.values()) == dict.fromkeys((
        "tiny-llava/random-seed_0", "tiny-llava/random-seed_1", "tiny-llava/css-layer_-2",
        "tiny-llava/layer_9-aw_mse-slots_16_32_48-seed_0", "tiny-llava/layer_9-aw_mse-slots_16_32_48-seed_1",
    ), 2)  # fmt: skip
    assert len({one.fingerprint for one in known.values()}) == 5
    ours = next(one for cell, one in known.items() if cell.pruner is not None and cell.seed == 1)
    assert (ours.fingerprint, ours.kind) == ("key-of-layer_9-aw_mse-slots_16_32_48-1", "pruner"), "of its training"
    assert all("keep" not in one.params for one in known.values())
    css = next(record for cell, record in found.items() if cell.method == "css" and cell.tokens == 16)
    assert css.series_metrics == {
        "keep_16/pope": 16.0, "keep_16/gqa": 16.0, "keep_16/average_relative-gqa-pope": pytest.approx(100 * 16 / 144)
    }  # fmt: skip
    assert css.params["layer"] == -2
    assert {name for name in css.measured_on if name.startswith("keep")} == {"keep_16/pope", "keep_16/gqa"}
    assert [(one.name, one.context) for one in css.datasets] == [(name, "evaluation") for name in BENCHMARKS]


def test_an_average_says_over_which_benchmarks_it_is(tmp_path: Path) -> None:
    """Else css, asked about POPE alone, would be ranked among averages over two."""

    def averages(*benchmarks: str) -> dict[str, float]:
        def score(cell: Cell, name: str) -> float:
            return 0.0 if name == "mmbench" else {"pope": 90.0, "gqa": 50.0}[name] / (1 if cell.keep is None else 2)

        found = told(tmp_path, score_of=score, benchmark=benchmarks)
        css = next(record for cell, record in found.items() if cell.method == "css" and cell.tokens == 16)
        return {name: value for name, value in css.series_metrics.items() if "average" in name}

    both = averages("pope", "gqa")
    assert both == averages("gqa", "pope") == {"keep_16/average_relative-gqa-pope": 50.0}
    assert averages("pope") == {"keep_16/average_relative-pope": 50.0}
    assert averages("gqa", "mmbench", "pope") == both, "of what the unpruned model gets nothing right in there is none"
    assert averages("mmbench") == {}


def test_settings_and_their_pruner_say_on_which_images_it_was_trained(tmp_path: Path) -> None:
    train = load(ROOT / "params.yaml").train.model_copy(update={"on": ("sample", "gqa")})
    found = told(tmp_path, train=train)
    said = {
        (cell.method, cell.pruner and cell.pruner.on, record.params.get("train.on"),
         record.series and record.series.params.get("train.on"))
        for cell, record in found.items()
    }  # fmt: skip
    assert said == {
        ("vanilla", None, None, None), ("random", None, None, None), ("css", None, None, None),
        ("oc-vtp", "sample", "sample", "sample"), ("oc-vtp", "gqa", "gqa", "gqa"),
    }  # fmt: skip


def test_the_papers_protocol_has_names_of_its_own(tmp_path: Path) -> None:
    pruned = [one for one in told(tmp_path, "paper").values() if one.series]
    assert {name.partition("/")[0] for one in pruned for name in one.series_metrics} == {
        "keep_48-paper",
        "keep_16-paper",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": (1, 2)},
        {"layer": (9, 10), "loss": ("aw_mse", "mse")},
        {"ablate": Ablate.model_validate({"evaluate": {"options": {"oc-vtp": {"fill": ["attention", "next_best"]}}}})},
        {"ablate": Ablate.model_validate({"evaluate": {"options": {"css": {"layer": [9]}}}})},
    ],
    ids=["top_k", "pruners", "options of oc-vtp", "options of css"],
)
def test_no_two_settings_write_to_one_metric(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = told(tmp_path, **changes)
    assert len(found) > 11, "there is more than the grid"
    named = Counter((record.series.fingerprint, name)
                    for record in found.values() if record.series for name in record.series_metrics)  # fmt: skip
    assert set(named.values()) == {1}
    assert len({canonical(record.fingerprint) for record in found.values()}) == len(found)
