"""Results whose scores are the paper's own, for tests of what the report makes of them."""

import re
from pathlib import Path
from typing import Any

from pipelines.report_html.data import Results, paper

PAPER: Any = paper()


def of_the_paper(vlm: str = "llava-1.5-7b", drop: str = "") -> Results:
    """Results whose scores are the paper's own."""
    table = PAPER[PAPER["vlms"][vlm]]
    names_of = {label: name for name, label in PAPER["benchmarks"].items()}
    methods = {label: name for name, label in PAPER["methods"].items()}
    whole, rows = table["rows"][0], []
    for row in table["rows"]:
        if row["method"] not in methods:
            continue
        method, share = methods[row["method"]], float(re.findall(r"([\d.]+)%", row["retain"])[0]) / 100
        found = {
            names_of[label]: {"score": row[label], "relative": 100 * row[label] / whole[label]}
            for label in table["benchmarks"]
            if row[label] is not None and names_of[label] != drop
        }
        ours = method == "oc-vtp"
        axes = {"layer": 9, "loss": "aw_mse", "slots": [16], "top_k": 1} if ours else dict.fromkeys(
            ("layer", "loss", "slots", "top_k"))  # fmt: skip
        rows.append({"vlm": vlm, "method": method, "tokens": None, "share": share, "benchmarks": found,
                     "average": {"relative": None}, "changes": {}, "difference": None, "against": {},
                     "coverage": None, **axes})  # fmt: skip
    return Results(Path(), [], rows, paper=PAPER)
