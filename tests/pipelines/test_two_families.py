"""The whole pipeline with tiny-llava and tiny-qwen beside each other, on scenes of many sizes: every stage, the report.

Table 3's layout: shares of an image's tokens, since their number depends on the image.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from small_params import write_params

from ocvtp.data.scenes import STEP
from ocvtp.tokens.loader import TokenDataset
from pipelines import efficiency, extract, measure, report, sample, train
from pipelines import eval as evaluate
from pipelines.stage import outputs

pytestmark = [pytest.mark.pipeline, pytest.mark.nightly]
VLMS = ["tiny-llava", "tiny-qwen"]
SHARES = ["33.3%", "22.2%", "11.1%"]
CHANGES: dict[str, Any] = {
    "vlm": VLMS,
    "keep": SHARES,
    "method": ["vanilla", "oc-vtp", "css", "tome"],
    "sample": {"style": {"sides": [64, 160]}},
    "extract": {"shard_images": 40},
    "measure": {"images": 8},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all stages have run."""
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCVTP_ROOT", str(root))
        patch.delenv("OCVTP_STORE", raising=False)
        patch.delenv("DVC_STAGE", raising=False)
        given = write_params(root, CHANGES)
        for stage in (sample, extract, train, evaluate, measure, efficiency):
            assert stage.main(given) == 0, stage.__name__
        assert report.main(root) == 0
    return root


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    found = json.loads((root / "results" / name).read_text())
    return list(found["rows"] if isinstance(found, dict) else found)


def test_tokens_are_those_of_each_image(root: Path) -> None:
    for vlm, sizes in (("tiny-llava", {144}), ("tiny-qwen", None)):
        listing = json.loads((root / f"data/tokens/{vlm}/layer_9.json").read_text())
        grids = TokenDataset.from_listing(listing, root / ".ocvtp/store").grids
        counts = {height * width for height, width in grids}
        assert counts == sizes if sizes else len(counts) > 5
    least, most = CHANGES["sample"]["style"]["sides"]
    assert all(least // STEP <= side <= most // STEP for grid in grids for side in grid)


def test_each_method_has_rows_on_the_vlms_that_it_fits(root: Path) -> None:
    summary = rows(root, "summary.json")
    for vlm in VLMS:
        assert [row["share"] for row in summary if row["vlm"] == vlm and row["method"] == "css"] == [
            pytest.approx(share, abs=0.002) for share in (0.333, 0.222, 0.111)
        ]
        assert {row["method"] for row in summary if row["vlm"] == vlm} >= {"vanilla", "oc-vtp", "css"}
    # tome needs CLIP's tower.
    for name in ("summary.json", "efficiency.json"):
        assert not {row["method"] for row in rows(root, name) if row["vlm"] == "tiny-qwen"} & {"tome"}
    assert "tome" in {row["method"] for row in summary if row["vlm"] == "tiny-llava"}


def test_measures_and_costs_know_both(root: Path) -> None:
    for name in ("measures.json", "efficiency.json"):
        assert {row["vlm"] for row in rows(root, name)} == set(VLMS), name
    spans = {row["keep"]: row["span_on"] for row in rows(root, "measures.json")
             if (row["vlm"], row["method"]) == ("tiny-qwen", "css")}  # fmt: skip
    assert spans["33.3%"] < spans["22.2%"] < spans["11.1%"]


def test_the_report_has_a_table_of_each_with_the_papers_shares(root: Path) -> None:
    text = (root / "reports/report.md").read_text()
    assert all(vlm in text for vlm in VLMS)
    for share in SHARES:
        assert f"({share})" in text
    assert outputs.checksums(root / "reports")
