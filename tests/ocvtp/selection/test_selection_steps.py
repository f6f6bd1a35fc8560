"""The steps that methods share, against the same rules in plain loops; small whole numbers, so that there are ties."""

import pytest
import torch

from ocvtp.selection import facility
from ocvtp.selection.cosines import cosines, mean_of_pairs
from ocvtp.selection.dpp import dpp
from ocvtp.selection.fps import fps
from ocvtp.selection.greedy import TIE, picks
from ocvtp.selection.merging import into_nearest
from ocvtp.selection.nms import survivors
from ocvtp.selection.quotas import apportion, best_of_parts, filled
from ocvtp.selection.ranking import ascending, highest, marked, others, rows


def drawn(seed, *shape, low=-3, high=4):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def best(scores, left):
    top = max(scores[n] for n in left)
    return next(n for n in left if scores[n] >= top * (1 - TIE))


@pytest.mark.parametrize("quality", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_dpp_raises_the_determinant_most(seed, quality, first):
    tokens = drawn(seed, 3, 9, 6)
    weights = drawn(seed + 50, 3, 9, low=1) / 2 if quality else None
    exists = drawn(seed + 99, 3, 9, low=0, high=4) > 0
    begins = torch.tensor([row.nonzero()[-1, 0].item() for row in exists]) if first else None
    found = dpp(tokens, 5, weights, exists, begins)
    for image, order in enumerate(found.tolist()):
        unit = torch.nn.functional.normalize(tokens[image].double(), dim=1)
        unit = unit if weights is None else unit * weights[image].double()[:, None]
        kernel, kept = unit @ unit.T, []
        left = exists[image].nonzero()[:, 0].tolist()
        while left and len(kept) < 5:
            if first and not kept:
                pick = int(begins[image])
            else:
                before = torch.linalg.det(kernel[kept][:, kept]) if kept else torch.ones((), dtype=torch.double)
                gain = {n: float(torch.linalg.det(kernel[[*kept, n]][:, [*kept, n]]) / before) for n in left}
                gain = {n: value if value > 1e-5 * float(kernel[n, n]) else 0.0 for n, value in gain.items()}
                # What adds nothing is not spanned any further: the lowest numbers.
                pick = best(gain, left)
                if gain[pick] == 0:
                    kept += left
                    break
            kept.append(pick)
            left.remove(pick)
        count = min(5, int(exists[image].sum()))
        assert order[:count] == kept[:5]
        assert order[count:] == [9] * (5 - count)


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_facility_location_with_weights(seed):
    likeness = cosines(drawn(seed, 2, 11, 4)).clamp(min=0)
    weights = drawn(seed + 7, 2, 11, low=0)
    exists = torch.ones(2, 11, dtype=torch.bool)
    found = picks(exists, 6, *facility.begin(likeness, exists, weights))
    for image, order in enumerate(found.tolist()):
        S, covered, left = likeness[image].double(), [0.0] * 11, list(range(11))
        for pick in order:
            gains = {n: sum(max(0.0, float(S[n, m]) - covered[m]) for m in range(11)) for n in left}
            gains = {n: (gain if gain > 2e-4 else 0.0) * float(weights[image, n]) for n, gain in gains.items()}
            assert pick == best(gains, left)
            covered = [max(covered[m], float(S[pick, m])) for m in range(11)]
            left.remove(pick)


def test_coverage_is_chosen_where_gradients_are_wanted():
    likeness = cosines(drawn(0, 2, 11, 4).requires_grad_()).clamp(min=0)
    exists = torch.ones(2, 11, dtype=torch.bool)
    found = picks(exists, 6, *facility.begin(likeness, exists))
    assert torch.equal(found, picks(exists, 6, *facility.begin(likeness.detach(), exists)))


def test_farthest_points_may_begin_with_the_loneliest():
    tokens = drawn(3, 4, 12, 5)
    found = fps(tokens, 4, first="lonely")
    for X, row in zip(tokens.double(), found.tolist(), strict=True):
        S = torch.nn.functional.normalize(X, dim=1)
        far = (1 - S @ S.T).tolist()
        lonely = {n: min(far[n][m] for m in range(12) if m != n) for n in range(12)}
        kept, left = [], list(range(12))
        for _ in range(4):
            scores = lonely if not kept else {n: min(far[n][m] for m in kept) for n in left}
            scores = {n: value if value > TIE else 0.0 for n, value in scores.items()}
            kept.append(best(scores, left))
            left.remove(kept[-1])
        assert row == sorted(kept)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_suppression(seed, grouped):
    scores, likeness = drawn(seed, 3, 14, low=0), drawn(seed + 1, 3, 14, 14, low=0, high=6)
    likeness = likeness + likeness.transpose(1, 2)
    groups = drawn(seed + 2, 3, 14, low=0, high=3).long() if grouped else None
    above = torch.tensor([6.0, 7.0, 8.0])
    found = survivors(scores, likeness, above, groups)
    for image in range(3):
        stay = []
        for n in sorted(range(14), key=lambda n: (-float(scores[image, n]), n)):
            same = [m for m in stay if groups is None or groups[image, m] == groups[image, n]]
            if all(float(likeness[image, n, m]) <= float(above[image]) for m in same):
                stay.append(n)
        assert found[image].nonzero()[:, 0].tolist() == sorted(stay)


@pytest.mark.parametrize("seed", range(8))
def test_apportioning(seed):
    weights, sizes = drawn(seed, 4, 5, low=0), drawn(seed + 9, 5, low=0, high=6).long()
    for total in (0, 1, 4, 7, int(sizes.sum()), int(sizes.sum()) + 3):
        found = apportion(weights, sizes, total)
        for image in range(4):
            w = [float(x) for x in weights[image]]
            shares = [x / sum(w) if sum(w) else 0.2 for x in w]
            given = [min(int(share * total + 1e-6), int(size)) for share, size in zip(shares, sizes, strict=True)]
            turn = sorted(range(5), key=lambda p: (-shares[p], p))
            while sum(given) < min(total, int(sizes.sum())):
                for p in turn:
                    if sum(given) < total and given[p] < sizes[p]:
                        given[p] += 1
            assert found[image].tolist() == given


def test_filling_up():
    least, most = torch.tensor([[1, 0, 2], [1, 5, 0]]), torch.tensor([[2, 4, 5], [3, 2, 1]])
    order = torch.tensor([[2, 0, 1], [0, 1, 2]])
    assert filled(least, most, order, torch.tensor([8, 9])).tolist() == [[2, 1, 5], [3, 2, 1]]
    assert filled(least, most, order, torch.tensor([4, 0])).tolist() == [[1, 0, 3], [1, 2, 0]]


def test_the_best_of_each_part():
    scores, parts = drawn(1, 3, 20), drawn(2, 3, 20, low=0, high=4).long()
    quotas = torch.stack([torch.bincount(row, minlength=4) // 2 for row in parts])
    number = int(quotas.sum(1).max()) + 2
    found = best_of_parts(scores, parts, quotas, number)
    for image in range(3):
        expected = []
        for part in range(4):
            mine = [n for n in range(20) if parts[image, n] == part]
            mine = sorted(mine, key=lambda n: (-float(scores[image, n]), n))
            expected += mine[: int(quotas[image, part])]
        assert found[image].tolist() == expected + [-1] * (number - len(expected))


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_merging_into_the_nearest(how):
    kept, rest, likeness = drawn(1, 2, 3, 4), drawn(2, 2, 8, 4), drawn(3, 2, 8, 3)
    found = into_nearest(kept, rest, likeness, how)
    for image in range(2):
        near = [max(range(3), key=lambda m: (float(likeness[image, o, m]), -m)) for o in range(8)]
        for m in range(3):
            joined = [rest[image, o] for o in range(8) if near[o] == m]
            if how == "sum":
                expected = kept[image, m] + (torch.stack(joined).mean(0) if joined else 0)
            else:
                expected = torch.stack([kept[image, m], *joined]).mean(0)
            torch.testing.assert_close(found[image, m], expected)
    assert torch.equal(into_nearest(kept, rest[:, :0], likeness[:, :0], how), kept)


def test_numbers_of_tokens():
    scores = torch.tensor([[1.0, 3, 3, 0, 3], [2, 2, 2, 2, 2]])
    assert highest(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert ascending(torch.tensor([[3, -1, 0], [-1, -1, 2]])).tolist() == [[0, 3, -1], [2, -1, -1]]
    assert marked(torch.tensor([[0, 2], [1, -1]]), 3).tolist() == [[True, False, True], [False, True, False]]
    assert others(torch.tensor([[0, 2], [1, 3]]), 4).tolist() == [[1, 3], [0, 2]]
    assert rows(torch.arange(6.0).view(1, 3, 2), torch.tensor([[2, 0]])).tolist() == [[[4, 5], [0, 1]]]


def test_cosines():
    tokens = drawn(4, 2, 6, 3)
    tokens[0, 0] = 0
    found = cosines(tokens)
    expected = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=3)
    torch.testing.assert_close(found, expected)
    pairs = [[float(expected[b, i, j]) for i in range(6) for j in range(i)] for b in range(2)]
    torch.testing.assert_close(mean_of_pairs(found), torch.tensor([sum(row) / len(row) for row in pairs]))
    torch.testing.assert_close(cosines(tokens, tokens[:, 2:4]), expected[:, :, 2:4])
