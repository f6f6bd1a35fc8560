"""Choices without training, against the same rules written plainly in float64, and on what is left over."""

import functools
import itertools
import math
from functools import partial

import pytest
import torch

from ocvtp.errors import BadInput
from ocvtp.selection import CHOICES, css, fps, greedy, medoids, prototype_error, qr, span_error
from ocvtp.selection.greedy import TIE
from ocvtp.selection.kept_error import RIDGE


def residual(X, kept):
    """What least squares on the rows `kept` leaves of the rows of X."""
    if not kept:
        return X
    A = X[kept]
    return X - X @ torch.linalg.pinv(A, rtol=1e-9) @ A


def plain_qr(X, kept):
    return residual(X - X.mean(0), kept).square().sum(1)


def plain_css(X, kept):
    """Drop of the whole residual, each candidate tried by least squares."""
    X = X - X.mean(0)
    before = residual(X, kept).square().sum()
    return torch.stack([before - residual(X, [*kept, n]).square().sum() for n in range(len(X))])


def cosines(X):
    U = X / X.norm(dim=1, keepdim=True)
    return U @ U.T


def plain_fps(X, kept):
    U = X / X.norm(dim=1, keepdim=True)
    if not kept:
        m = U.mean(0)
        return 1 - U @ m / m.norm()
    return torch.tensor([min(float(1 - U[n] @ U[k]) for k in kept) for n in range(len(X))])


def plain_medoids(X, kept):
    S = 1 + cosines(X)
    before = S[:, kept].max(1).values.sum() if kept else 0
    return torch.stack([S[:, [*kept, n]].max(1).values.sum() - before for n in range(len(X))])


PLAIN = {"qr": plain_qr, "css": plain_css, "fps": plain_fps, "medoids": plain_medoids}


def plainly(name, X, keep):
    kept = []
    for _ in range(min(keep, len(X))):
        scores = PLAIN[name](X.double(), kept)
        left = [n for n in range(len(X)) if n not in kept]
        best = max(float(scores[n]) for n in left)
        kept.append(next(n for n in left if float(scores[n]) >= best * (1 - TIE)))
    return sorted(kept)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [1, 2, 5, 9])
@pytest.mark.parametrize("name", CHOICES)
def test_each_is_its_rule_written_plainly(name, keep):
    tokens_BNC = drawn(0, 12, 24, 10) * drawn(1, 12, 24, 1).exp() + 0.5
    found = CHOICES[name](tokens_BNC, keep)
    assert found.dtype == torch.int64
    assert found.tolist() == [plainly(name, X, keep) for X in tokens_BNC]


@pytest.mark.parametrize("spread", [0.3, 1, 2.5])
def test_css_with_spread_is_its_rule_written_plainly(spread):
    tokens_BNC, apart_BNA = drawn(0, 8, 24, 10), drawn(11, 8, 24, 6) + 0.5

    def plainly_spread(X, Y):
        kept, alike = [], cosines(Y.double())
        for _ in range(7):
            scores = plain_css(X.double(), kept) * ((1 - alike[:, kept].amax(1)) ** spread if kept else 1)
            scores[kept] = -1
            kept.append(int(scores.argmax()))
        return sorted(kept)

    expected = [plainly_spread(X, Y) for X, Y in zip(tokens_BNC, apart_BNA, strict=True)]
    assert css(tokens_BNC, 7, spread=spread, apart=apart_BNA).tolist() == expected
    alone = [plainly_spread(X, X) for X in tokens_BNC]
    assert css(tokens_BNC, 7, spread=spread).tolist() == alone != css(tokens_BNC, 7).tolist()


def test_css_with_spread_in_padded_batches_with_ties_and_with_copies():
    counts, keeps = [24, 7, 3, 15], [5, 4, 6, 2]
    tokens_BNC, apart_BNA = drawn(2, 4, 24, 10), drawn(12, 4, 24, 5)
    mask_BN = torch.arange(24) < torch.tensor(counts)[:, None]
    tokens_BNC[~mask_BN], apart_BNA[~mask_BN] = torch.nan, torch.inf
    found = css(tokens_BNC, keeps, mask_BN, spread=1, apart=apart_BNA)
    for row, count, keep, X, Y in zip(found.tolist(), counts, keeps, tokens_BNC, apart_BNA, strict=True):
        alone = css(X[None, :count], keep, spread=1, apart=Y[None, :count])[0].tolist()
        assert row == alone + [-1] * (6 - len(alone))
    assert css(torch.full((1, 8, 4), 123.4), 3, spread=1).tolist() == [[0, 1, 2]]
    # Two kinds of `apart`: after one of each nothing is at a distance, and the lowest index stays.
    two = torch.eye(2)[[0, 1, 0, 1, 0, 1]][None]
    picks = css(drawn(13, 1, 6, 4), 4, spread=2, apart=two)[0].tolist()
    assert len({*picks}) == 4
    assert {0, 1} <= {*picks}


def test_what_spread_cannot_be():
    tokens_BNC = drawn(7, 3, 6, 4)
    for spread in (-1, math.nan, math.inf, True, "1"):
        with pytest.raises(BadInput, match="a number of at least 0 is needed"):
            css(tokens_BNC, 2, spread=spread)
    with pytest.raises(BadInput, match="apart is given, but spread is 0"):
        css(tokens_BNC, 2, apart=tokens_BNC)
    with pytest.raises(BadInput, match=r"apart \[3, 5, 4\] of tokens \[3, 6, 4\]"):
        css(tokens_BNC, 2, spread=1, apart=tokens_BNC[:, :5])
    bad = tokens_BNC.clone()
    bad[1, 2, 3] = torch.nan
    with pytest.raises(BadInput, match="image 1 of the batch hold NaN"):
        css(tokens_BNC, 2, spread=1, apart=bad)


@pytest.mark.parametrize("name", CHOICES)
def test_padded_batches_and_budgets_of_their_own_are_singles(name):
    counts, keeps = [24, 7, 3, 15], [5, 4, 6, 2]
    tokens_BNC = drawn(2, 4, 24, 10)
    mask_BN = torch.arange(24) < torch.tensor(counts)[:, None]
    tokens_BNC[~mask_BN] = torch.nan  # padding is nothing
    found = CHOICES[name](tokens_BNC, keeps, mask_BN)
    assert found.shape == (4, 6)
    for row, count, keep, X in zip(found.tolist(), counts, keeps, tokens_BNC, strict=True):
        alone = CHOICES[name](X[None, :count], keep)[0].tolist()
        assert len(alone) == min(count, keep)
        assert row == alone + [-1] * (6 - len(alone))


def low_rank(seed, images, rank, shift=0.0):
    return drawn(seed, images, 20, rank) @ drawn(seed + 1, images, rank, 16) + shift * drawn(seed + 2, images, 1, 16)


@pytest.mark.parametrize(("rank", "shift"), [(2, 0), (4, 0), (3, 20.0)])
def test_css_where_one_direction_is_left(rank, shift):
    """Then all tokens gain the same, by whatever of them is left: the lowest index, alone and in padded batches."""
    tokens_BNC = low_rank(50, 40, rank, shift)
    expected = [plainly("css", X, rank) for X in tokens_BNC]
    assert sum(a == b for a, b in zip(css(tokens_BNC, rank).tolist(), expected, strict=True)) >= 39
    counts = torch.tensor([20, 7, 12, 16] * 10)
    mask_BN = torch.arange(20) < counts[:, None]
    together = css(tokens_BNC.masked_fill(~mask_BN[:, :, None], torch.nan), rank, mask_BN)
    alone = torch.cat([css(X[None, :count], rank) for X, count in zip(tokens_BNC, counts, strict=True)])
    assert int((together != alone).any(1).sum()) <= 1


@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_css_of_very_long_and_very_short_tokens(scale):
    tokens_BNC = drawn(60, 4, 24, 10)
    assert torch.equal(css(tokens_BNC * scale, 7), css(tokens_BNC, 7))


@pytest.mark.parametrize("name", CHOICES)
def test_remainders(name):
    choose = CHOICES[name]
    tokens_BNC = drawn(3, 2, 8, 4)
    everything = list(range(8))
    assert choose(tokens_BNC, 8).tolist() == choose(tokens_BNC, 99).tolist() == [everything] * 2
    # Tokens that are all alike tell nothing apart: the lowest indices.
    assert choose(torch.full((1, 8, 4), 123.4), 3).tolist() == [[0, 1, 2]]
    assert choose(torch.zeros(1, 8, 4), 3).tolist() == [[0, 1, 2]]
    # Three kinds of tokens, each many times: one of each, the first; then the lowest that are left.
    kinds = drawn(4, 1, 3, 16)[:, [2, 2, 0, 2, 1, 0, 1, 1, 2, 0]]
    # About their mean three kinds span two directions, so that where those count two picks are all.
    picked = choose(kinds, 3 if name in ("fps", "medoids") else 2).tolist()[0]
    assert {*picked} < {0, 2, 4} if name in ("qr", "css") else picked == [0, 2, 4]
    assert choose(kinds, 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", CHOICES)
def test_ties_go_to_the_lower_index_in_any_batch(name):
    """A token and its copies, at odd places of batches of odd sizes, where the last digit is another."""
    one = drawn(5, 1, 9, 33)
    doubled = one.repeat(1, 3, 1)
    for batch in (1, 2, 5):
        assert CHOICES[name](doubled.expand(batch, -1, -1), 4).max() < 9


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(name, dtype):
    tokens_BNC = (20 * drawn(6, 3, 30, 12)).to(dtype)
    expected = CHOICES[name](tokens_BNC.float(), 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CHOICES[name](tokens_BNC, 7), expected)


@pytest.mark.parametrize("name", CHOICES)
def test_what_cannot_be_is_refused(name):
    choose, tokens_BNC = CHOICES[name], drawn(7, 3, 6, 4)
    bad = tokens_BNC.clone()
    bad[1, 2, 3] = torch.nan
    with pytest.raises(BadInput, match="image 1 of the batch hold NaN"):
        choose(bad, 2)
    with pytest.raises(BadInput, match=r"tokens are of shape \[6, 4\]"):
        choose(tokens_BNC[0], 2)
    with pytest.raises(BadInput, match="int64: a floating type"):
        choose(tokens_BNC.long(), 2)
    with pytest.raises(BadInput, match="keep is 0"):
        choose(tokens_BNC, 0)
    with pytest.raises(BadInput, match="keep has 2 numbers for 3 images"):
        choose(tokens_BNC, [1, 2])
    with pytest.raises(BadInput, match=r"mask \[3, 5\]"):
        choose(tokens_BNC, 2, torch.ones(3, 5))
    with pytest.raises(BadInput, match="mask is a list of tokens"):
        choose(tokens_BNC, 2, [[True] * 6] * 3)


def test_values_that_are_not_looked_at_still_end_in_distinct_tokens():
    """As on a GPU, where to look would wait."""
    tokens_BNC = drawn(8, 1, 6, 4)
    tokens_BNC[0, 1] = torch.nan
    for choose in CHOICES.values():
        assert len({*choose(tokens_BNC, 3, check_values=False)[0].tolist()} & {*range(6)}) == 3


def test_bounds():
    """fps: within twice the best radius; medoids: within 1 - 1/e of the best; css: by its submodularity ratio."""
    for seed in range(5):
        X = drawn(10 + seed, 10, 3).double()
        subsets = list(itertools.combinations(range(10), 3))
        chord = (2 - 2 * cosines(X)).clamp(min=0).sqrt()
        radius = {s: float(chord[:, list(s)].min(1).values.max()) for s in subsets}
        assert radius[tuple(fps(X[None], 3)[0].tolist())] <= 2 * min(radius.values()) + 1e-9
        place = {s: float((1 + cosines(X))[:, list(s)].max(1).values.sum()) for s in subsets}
        assert place[tuple(medoids(X[None], 3)[0].tolist())] >= (1 - 1 / math.e) * max(place.values())
        Y = drawn(30 + seed, 10, 8).double()
        explained = explained_by(Y)
        greedy = tuple(css(Y[None], 3)[0].tolist())
        assert explained(greedy) >= (1 - math.exp(-submodularity(explained, greedy))) * max(map(explained, subsets))


def explained_by(Y):
    """Of a set of tokens, the energy of all (about their mean) in its span."""
    Z = Y - Y.mean(0)

    @functools.cache
    def explained(kept):
        return float((Z - Z @ torch.linalg.pinv(Z[[*kept]]) @ Z[[*kept]]).square().sum()) if kept else total

    total = float(Z.square().sum())
    return lambda kept: total - explained(tuple(sorted(kept)))


def submodularity(gain, greedy):
    """The ratio of Das and Kempe (2011), definition 2.3, of a greedy choice from 10 tokens."""
    ratios = []
    for chosen in (subset for size in range(4) for subset in itertools.combinations(greedy, size)):
        others = [n for n in range(10) if n not in chosen]
        for some in (s for number in (1, 2, 3) for s in itertools.combinations(others, number)):
            one_by_one = sum(gain((*chosen, n)) - gain(chosen) for n in some)
            ratios.append(one_by_one / (gain((*chosen, *some)) - gain(chosen)))
    return min(ratios)


def test_span_error_is_ridge_regression():
    X, kept = drawn(40, 2, 12, 5), torch.tensor([[1, 4, 7], [0, 11, -1]])
    found = span_error(X, kept)
    for row, tokens in enumerate(X.double()):
        Z = tokens - tokens.mean(0)
        A = Z[[k for k in kept[row].tolist() if k >= 0]]
        A = A / A.norm(dim=1, keepdim=True)
        W = torch.linalg.solve(A @ A.T + RIDGE * torch.eye(len(A)), A @ Z.T)
        expected = (Z - W.T @ A).square().sum() / Z.square().sum()
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4)


def test_span_error_knows_what_is_spanned():
    basis = drawn(41, 3, 20).double()
    weights = drawn(42, 16, 3).double()
    weights = weights / weights.sum(1, keepdim=True)
    X = (weights @ basis)[None].float()  # three tokens span all, about their mean
    assert float(span_error(X, qr(X, 3), ridge=1e-6)) < 1e-3
    assert float(span_error(X, torch.tensor([[0, 0, 0]]))) > 0.05
    assert float(span_error(torch.ones(1, 6, 4), torch.tensor([[2]]))) == 0.0
    # Neither moves nor lengths matter; one that is kept twice is kept once.
    Y, kept = drawn(43, 1, 12, 6), torch.tensor([[1, 5]])
    assert float(span_error(100 * Y + 7, kept)) == pytest.approx(float(span_error(Y, kept)), rel=1e-3)
    assert float(span_error(Y, torch.tensor([[1, 5, 5]]))) == pytest.approx(float(span_error(Y, kept)), rel=2e-3)


def test_errors_of_padded_images_are_those_of_singles():
    X, mask = drawn(44, 2, 9, 5), torch.arange(9) < torch.tensor([[9], [6]])
    X[~mask] = torch.inf
    kept = torch.tensor([[0, 3, 8], [1, 5, -1]])
    for error in (span_error, prototype_error):
        found = error(X, kept, mask)
        torch.testing.assert_close(found[1:], error(X[1:, :6], kept[1:, :2]))
        torch.testing.assert_close(found[:1], error(X[:1], kept[:1]))
    with pytest.raises(BadInput, match="index 9 of 9 tokens"):
        span_error(drawn(0, 1, 9, 2), torch.tensor([[9]]))


def test_prototype_error_is_the_distance_to_the_nearest():
    X = drawn(45, 1, 7, 4)
    expected = (1 - cosines(X[0])[:, [2, 6]].max(1).values).mean()
    torch.testing.assert_close(prototype_error(X, torch.tensor([[2, 6]]))[0], expected)


@pytest.mark.parametrize("choose", [*CHOICES.values(), partial(css, spread=1.0)])
def test_the_same_choice_twice_has_one_key(choose, monkeypatch):
    """By which a recorded CUDA graph is found again."""
    keys = []

    def noted(key, function, *tensors):
        keys.append(key)
        return function(*tensors)

    monkeypatch.setattr(greedy, "_REPLAYS", noted)
    for _ in range(2):
        choose(drawn(9, 2, 6, 4), 3)
    assert keys[0] == keys[1]
    assert hash(keys[0]) == hash(keys[1])


def test_what_errors_of_kept_tokens_cannot_be_of():
    X = drawn(61, 2, 6, 4)
    for ridge in (0, -1, math.nan, True):
        with pytest.raises(BadInput, match="ridge is"):
            span_error(X, torch.tensor([[0], [1]]), ridge=ridge)
    for error in (span_error, prototype_error):
        with pytest.raises(BadInput, match="at least one column"):
            error(X, torch.zeros(2, 0, dtype=torch.int64))
        empty = torch.ones(2, 6, dtype=torch.bool)
        empty[1] = False
        assert float(error(X, torch.tensor([[0], [-1]]), empty)[1]) == 0
    with pytest.raises(BadInput, match="first is 'lonly': far or lonely"):
        fps(X, 2, first="lonly")
