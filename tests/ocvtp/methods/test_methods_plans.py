"""How many tokens methods inside the LLM, and pairs of methods, let each layer read."""

from typing import Any

import pytest

from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY, entry_of, options_of


def per_layer(name: str, tokens: int, keep: int, depth: int = 32, **options: Any) -> list[int]:
    entry = entry_of(name)
    assert entry.per_layer is not None
    return entry.per_layer(tokens, keep, depth, options_of(entry, options))


def test_vscan_at_64_is_as_its_authors_have_it() -> None:
    for keep, before, after in ((192, 288, 96), (128, 192, 64), (64, 96, 32)):
        counts = per_layer("vscan", 576, keep)
        assert counts == [before] * 16 + [after] * 16
        assert sum(counts) == 32 * keep


def test_autoprune_counts_what_leaves_layers_as_its_authors_do() -> None:
    for keep in (64, 128, 192):
        counts = per_layer("autoprune", 576, keep, budget="reference")
        assert counts[:2] == [576, min(int(2.5 * keep), 576)]
        # What leaves each layer: the last one drops a few more, which nobody reads.
        assert sum(counts[1:]) / 32 < keep < (sum(counts[1:]) + counts[-1]) / 32 + 0.5
        true = per_layer("autoprune", 576, keep)
        assert keep - 1.5 < sum(true) / 32 <= keep
        assert true == sorted(true, reverse=True)


def test_dart_keeps_what_its_pivots_bring() -> None:
    assert per_layer("dart", 576, 128)[:3] == [576, 576, 98]
    assert per_layer("dart", 576, 128, budget="reference") == [576] * 2 + [128] * 30
    assert per_layer("dart", 576, 130, budget="reference", behaviour="reference")[2] == 4 + 8 * 16
    assert per_layer("dart", 576, 576, budget="reference", behaviour="reference") == [576] * 32


@pytest.mark.parametrize(("keep", "counted"), [(192, 192.4), (128, 128.0), (96, 96.8), (64, 64.4)])
def test_sparsevlm_plus_takes_the_authors_lists(keep: int, counted: float) -> None:
    counts = per_layer("sparsevlm-plus", 576, keep, budget="reference")
    assert sum([*counts[1:], counts[-1]]) / 32 == pytest.approx(counted, abs=0.06)
    assert sum(per_layer("sparsevlm-plus", 576, keep)) / 32 <= keep


@pytest.mark.parametrize(
    "name",
    [n for n, e in REGISTRY.items() if e.acts == "inside the LLM" and not n.endswith("-authors")] + ["css+fastv"],
)
@pytest.mark.parametrize(("tokens", "depth"), [(144, 4), (576, 32), (2880, 28), (37, 12)])
def test_averages_stay_within_the_budget(name: str, tokens: int, depth: int) -> None:
    for share in (0.4, 0.5, 0.77):
        keep = int(share * tokens)
        counts = per_layer(name, tokens, keep, depth)
        assert len(counts) == depth
        assert min(counts) >= 1
        assert sum(counts) <= keep * depth
    assert per_layer(name, tokens, tokens, depth) == [tokens] * depth


def test_autoprune_is_refused_what_it_cannot_reach() -> None:
    with pytest.raises(BadInput, match=r"autoprune cannot keep 12 of 576 .* at least \d+ are needed; budget='refer"):
        per_layer("autoprune", 576, 12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fastv+css", r"fastv\+css: fastv acts inside the LLM, but a method that acts before the LLM must stand there"),
        ("css+random", r"random acts before the LLM, but a method that acts inside"),
        ("oc-vtp+fastv", "needs a trained pruner, which a pair cannot be given"),
        ("css+fastv+dart", "no method"),
        ("css+fast", r"no method 'css.fast'"),
    ],
)
def test_pairs_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        entry_of(name)


def test_options_of_pairs() -> None:
    entry = entry_of("visionzip+fastv")
    assert entry.options["before_merge"] == "sum"
    assert entry.options["inside_k"] is None
    assert per_layer("visionzip+fastv", 576, 64, split=1) == [64] * 32
    assert per_layer("visionzip+fastv", 576, 64, split=3, inside_k=8) == [192] * 8 + [21] * 24
    assert "inside_k" not in entry_of("vscan").options
    with pytest.raises(BadInput, match=r"no split=0\.5"):
        per_layer("visionzip+fastv", 576, 64, split=0.5)
    with pytest.raises(BadInput, match=r"no option 'insidek'; did you mean 'inside_k'"):
        options_of(entry, {"insidek": 1})
