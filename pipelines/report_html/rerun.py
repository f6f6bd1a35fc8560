"""Rerun against paper: for each claim of the paper what was measured here, on what, and what never was."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.report_html.claims import FILL, LAYER, LOSS, OWN, REBUILDING, RIVALS, TOP_K, findings
from pipelines.report_html.data import Results
from pipelines.report_html.facts import measured_times
from pipelines.report_html.tables import PRUNED

NEVER = "never measured"
_CLAIMS = (
    ("Tables 1 to 3", "OC-VTP keeps more accuracy than every other method at equal budget", RIVALS),
    ("Tables 1 to 3", "a pruner trained on a benchmark's own images keeps more than one trained on COCO", OWN),
    ("Table 1", "unpadded, with 50.7 tokens in the mean, it keeps 92.6%, with 64 95.5%", FILL),
    ("Table 5", "one token a slot is better than several", TOP_K),
    ("Table 6", "layer 9 is the best place to look", LAYER),
    ("Table 7", "AW-MSE trains a better pruner than MSE", LOSS),
    ("Section 3.2", "the kept tokens are those that rebuild the others", REBUILDING),
)
"""Where the paper says it, what, and the key of the findings about it."""
_BESIDE = (
    ("Table 4", "a prefill takes 6.5 (LLaVA-1.5) and 17.3 times (LLaVA-NeXT) fewer FLOP",
     "closed form and PyTorch's own count, for any size: `ocvtp flops llava-1.5-7b`; no weights are needed"),
)  # fmt: skip


@dataclass(frozen=True)
class Rerun:
    """One claim of the paper: where it stands, and what was measured, VLM by VLM."""

    where: str
    claim: str
    measured: list[str]


def rerun(results: Results) -> list[Rerun]:
    """All claims of the paper, also those that nothing here says anything about."""
    found = [Rerun(where, claim, list(_measured(results, key)) or [NEVER]) for where, claim, key in _CLAIMS]
    found += [Rerun(where, claim, [how]) for where, claim, how in _BESIDE]
    return [*found, Rerun("Figure 3", "an image takes 2.2 and 2.8 times less time on a V100", list(_times(results)))]


def _times(results: Results) -> Iterator[str]:
    """What was measured at the budgets of Figure 3, the paper's own bars left out."""
    yield f"on a V100, or end to end on its benchmarks: {NEVER}"
    for label, groups in measured_times(results).items():
        for name, times in list(groups.items())[1:]:
            if PRUNED in times:
                share = 100 * times[PRUNED] / times["vanilla"]
                yield f"{label}, {name}, random weights: {share:.0f}% of the unpruned model's time to the first token"


def _measured(results: Results, key: str) -> Iterator[str]:
    real = set((results.paper or {}).get("vlms", ()))
    about = {vlm: [one for one in findings(results, vlm) if one.key == key] for vlm in results.vlms}
    for vlm, of_vlm in about.items():
        what = "the paper's VLM" if vlm in real else "not a VLM of the paper"
        yield from (f"{vlm} ({what}): {one.verdict}. {one.claim}: {one.evidence}" for one in of_vlm)
    if any(about.values()) and not real & set(results.vlms):
        yield f"on the weights of any VLM of the paper: {NEVER}"
