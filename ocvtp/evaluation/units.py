"""The question, the right answer, and the unit of resampling of a row of a benchmark."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ocvtp.evaluation.catalogue import Benchmark

_CIRCLE = 1_000_000
"""MMBench asks a question again, its options in another order, under an index larger by multiples of this."""


def unit_of(doc: Mapping[str, Any], doc_id: int, benchmark: Benchmark) -> int | str:
    """What may not be torn apart in resampling: the row itself, or the name of the group it belongs to."""
    if benchmark.rule == "all_right":
        return int(doc["index"]) % _CIRCLE
    return "/".join(str(doc[column]) for column in benchmark.unit) if benchmark.unit else doc_id


def answer_of(doc: Mapping[str, Any], benchmark: Benchmark) -> str:
    """The right answer: of several annotators' the most frequent, of an option its letter."""
    answer = doc[benchmark.answer]
    if isinstance(answer, int):
        return chr(ord("A") + answer)
    if not isinstance(answer, list):
        return str(answer)
    given = [str(item["answer"]) if isinstance(item, Mapping) else str(item) for item in answer]
    return Counter(given).most_common(1)[0][0] if given else ""


def category_of(doc: Mapping[str, Any], benchmark: Benchmark) -> str:
    """The benchmark's own category of a row; empty where it has none."""
    return str(doc.get(benchmark.category) or "") if benchmark.category else ""
