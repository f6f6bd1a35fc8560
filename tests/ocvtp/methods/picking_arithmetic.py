"""Methods that choose in each tile, one image and one tile at a time, in plain loops and in float64.

Each takes what it knows of the tokens of a tile and how many to keep, and gives their numbers as they are picked.
Scores that greedy picks are made by are equal if they differ by less than 1e-5 of the best: the lower number is picked.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIE = 1e-5


@dataclass(frozen=True)
class Tile:
    """Of n tokens: the tower's, as the LLM reads them, attention, cosines in float32, relevance, rows and columns."""

    tokens: Tensor
    projected: Tensor
    attention: list[float]
    cosines: Tensor
    relevance: list[float] | None = None
    shallow: list[float] | None = None
    grid: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        return len(self.attention)


def by_attention(scores: list[float], among: Any = None) -> list[int]:
    return sorted(range(len(scores)) if among is None else among, key=lambda n: (-scores[n], n))


def lowest_of_best(scores: dict[int, float]) -> int:
    top = max(scores.values())
    return min(n for n, score in scores.items() if score >= top * (1 - TIE))


def unit(tokens: Tensor) -> Tensor:
    tokens = tokens.double()
    return tokens / tokens.norm(dim=1, keepdim=True).clamp(min=1e-12)


def scope(tile: Tile, keep: int, alpha: float = 1.0, **_: Any) -> list[int]:
    S = (unit(tile.tokens) @ unit(tile.tokens).T).clamp(min=0)
    covered, picked = torch.zeros(tile.count, dtype=torch.double), list[int]()
    least = TIE * float(S.max()) * tile.count
    for _ in range(keep):
        gains = {}
        for n in range(tile.count):
            if n not in picked:
                gain = float((S[n] - covered).clamp(min=0).sum())
                gains[n] = (gain if gain > least else 0.0) * tile.attention[n] ** alpha
        picked.append(lowest_of_best(gains))
        covered = torch.maximum(covered, S[picked[-1]])
    return picked


def divprune(tile: Tile, keep: int, **_: Any) -> list[int]:
    far = (1 - unit(tile.projected) @ unit(tile.projected).T).tolist()
    picked: list[int] = []
    for _ in range(keep):
        scores = {}
        for n in range(tile.count):
            if n not in picked:
                near = min(far[n][m] for m in (picked or range(tile.count)) if m != n)
                scores[n] = near if near > TIE else 0.0
        picked.append(lowest_of_best(scores))
    return picked


def dpp(vectors: Tensor, keep: int, among: list[int], first: int | None = None) -> list[int]:
    """Greedy picks of the largest determinant, by what least squares leave of a vector."""
    picked, left = [], list(among)
    while left and len(picked) < keep:
        if first is not None and not picked:
            pick = first
        else:
            scores = {}
            span = vectors[picked].T @ torch.linalg.pinv(vectors[picked].T, rtol=1e-7) if picked else None
            for n in left:
                rest = vectors[n] if span is None else vectors[n] - span @ vectors[n]
                whole = float(vectors[n] @ vectors[n])
                scores[n] = float(rest @ rest) if float(rest @ rest) > 1e-5 * whole else 0.0
            pick = lowest_of_best(scores)
        picked.append(pick)
        left.remove(pick)
    return picked


def cdpruner(tile: Tile, keep: int, **_: Any) -> list[int]:
    vectors = unit(tile.tokens)
    if tile.relevance is not None:
        vectors = vectors * torch.tensor(tile.relevance, dtype=torch.double)[:, None]
    return dpp(vectors, keep, list(range(tile.count)))


def promprune(tile: Tile, keep: int, mu: float = 0.42, tau: float = 0.02, **_: Any) -> list[int]:
    U = unit(tile.projected)
    centred = U - U.mean(0)
    side = min(centred.shape)
    values = torch.linalg.svdvals(centred)[:side].square().clamp(min=1e-12)
    shares = (values / values.sum()).tolist()
    entropy = -sum(s * math.log(s) for s in shares) / math.log(max(2, side))
    z = min(20.0, max(-20.0, (entropy - mu) / tau))
    number = round((1 - 1 / (1 + math.exp(-z))) * keep)
    picked = by_attention(tile.attention)[:number]
    left = [n for n in range(tile.count) if n not in picked]
    first = None
    if picked:
        likest = {n: max(float(U[n] @ U[m]) for m in picked) for n in left}
        first = min(n for n in left if likest[n] <= min(likest.values()) + TIE)
    return picked + dpp(U, keep - number, left, first if first is not None else left[0])


def vispruner(tile: Tile, keep: int, important: float = 0.5, removed: int = 8, **_: Any) -> list[int]:
    S, order = tile.cosines.tolist(), by_attention(tile.attention)
    chosen, rest = order[: int(important * keep)], order[int(important * keep) :]
    left = keep - len(chosen)
    while left and len(rest) > left:
        former, latter = rest[::2], rest[1::2]
        near = [max(S[n][m] for m in latter) for n in former]
        gone = min(removed, len(rest) - left)
        alike = sorted(range(len(former)), key=lambda place: (-near[place], place))
        rest = [former[place] for place in alike[gone:]] + latter
    return chosen + rest[:left]


def holov(
    tile: Tile, keep: int, strips: int = 16, alpha: float = 0.09, overflow: str = "shared", single: str = "scaled",
    **_: Any,
) -> list[int]:  # fmt: skip
    pieces, U = min(strips, tile.count), unit(tile.projected)
    sizes = [tile.count // pieces + (p < tile.count % pieces) for p in range(pieces)]
    members, scores = [], []
    for p, size in enumerate(sizes):
        some = list(range(sum(sizes[:p]), sum(sizes[:p]) + size))
        members.append(some)
        scaled = [1e3 * tile.attention[n] for n in some]
        mean = sum(scaled) / size
        if size == 1:
            scores.append(mean / 1e3 if single == "raw" else mean)
            continue
        variances = []
        for n in some:
            row = [0.0 if m == n else float(U[n] @ U[m]) for m in some]
            middle = sum(row) / (size - 1)
            variances.append(sum((each - middle) ** 2 for each in row) / (size - 1))
        spread = sum(variances) / size
        scores.append(
            sum(s + alpha * v * mean / (spread + 1e-6) for s, v in zip(scaled, variances, strict=True)) / size
        )
    total = sum(scores)
    shares = [score / total if total else 1 / pieces for score in scores]
    heavy = sorted(range(pieces), key=lambda p: (-shares[p], p))
    room = [keep] * pieces if overflow == "lost" else sizes
    given = [min(int(share * keep + 1e-6), space) for share, space in zip(shares, room, strict=True)]
    while sum(given) < min(keep, sum(room)):
        for p in heavy:
            if sum(given) < keep and given[p] < room[p]:
                given[p] += 1
    picked: list[int] = []
    for some, number in zip(members, given, strict=True):
        picked += by_attention(tile.attention, some)[:number]
    return picked


def prunesid(tile: Tile, keep: int, cls: bool = False, **_: Any) -> list[int]:
    n = tile.count
    A = torch.sigmoid(tile.tokens.double()).T
    A = A - A.mean(0)
    q = min(max(1, keep // 4), *A.shape)
    start = torch.randn(n, q, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(A @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(A @ torch.linalg.qr(A.T @ basis).Q).Q
    V = torch.linalg.svd(basis.T @ A, full_matrices=False).Vh.T.abs()
    group = V.argmax(1).tolist()
    S = tile.cosines.tolist()
    pairs = [S[i][j] for i in range(n) for j in range(i)]
    threshold = keep / 32 * sum(pairs) / max(1, len(pairs))
    survive: dict[int, list[int]] = {g: [] for g in range(max(1, keep // 4))}
    for token in by_attention(tile.attention):
        if all(S[token][other] <= threshold for other in survive[group[token]]):
            survive[group[token]].append(token)
    sizes = {g: group.count(g) for g in survive}
    lower = {g: min(1, sizes[g]) for g in survive}
    upper = {g: min(5 * math.ceil(keep / 64), sizes[g], len(survive[g])) for g in survive}
    while sum(upper.values()) < keep:
        upper = {g: min(upper[g] + 1, sizes[g]) for g in survive}
    total = keep - cls
    rest, alive = max(0, total - sum(lower.values())), sum(map(len, survive.values()))
    wanted, before, done = {}, 0, 0
    for g in survive:
        done += len(survive[g])
        edge = round(done / alive * rest)
        wanted[g], before = min(lower[g] + edge - before, upper[g]), edge
    for g in sorted(survive, key=lambda g: (-len(survive[g]), g)):
        wanted[g] += min(upper[g] - wanted[g], max(0, total - sum(wanted.values())))
    picked: list[int] = []
    for g in survive:
        others = [t for t in by_attention(tile.attention) if group[t] == g and t not in survive[g]]
        picked += (survive[g] + others)[: wanted[g]]
    return picked[:total]


def vscan(tile: Tile, keep: int, window: int = 6, **_: Any) -> list[int]:
    rows, columns = tile.grid
    windows: dict[tuple[int, int], list[int]] = {}
    for number in range(rows * columns):
        windows.setdefault((number // columns // window, number % columns // window), []).append(number)
    places = [windows[key] for key in sorted(windows)]
    given = [0] * len(places)
    while sum(given) < keep // 2:
        room = [w for w in range(len(places)) if given[w] < len(places[w])]
        each = (keep // 2 - sum(given)) // len(room)
        for w in room if each else room[: keep // 2 - sum(given)]:
            given[w] = min(len(places[w]), given[w] + max(1, each))
    assert tile.shallow is not None
    picked = [n for some, number in zip(places, given, strict=True) for n in by_attention(tile.shallow, some)[:number]]
    rest = [n for n in by_attention(tile.attention) if n not in picked]
    return sorted(picked + rest[: keep - len(picked)])


RULES = {
    "scope": scope,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "cdpruner-no-text": cdpruner,
    "promprune": promprune,
    "vispruner": vispruner,
    "holov": holov,
    "prunesid": prunesid,
    "vscan-before": vscan,
}
