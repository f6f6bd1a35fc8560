"""Where the tokens of an image stand: neighbours, tiles, strips, windows, cells of a coarser grid.

Letters: N tokens of an image, k cells.
"""

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from ocvtp.vlms.images import Grid, Layout, Part

TILES = ("even", "floor", "together")
"""How an image's tiles share its budget: equally, the first get what is left over; equally, what is left over is lost;
or their tokens compete."""
FLOOR = {"tiles": ("floor",)}
"""`Entry.loses` of methods that take one of `TILES`."""
RELEASED_FLOOR = {"behaviour": ("reference",), **FLOOR}
"""The same of those whose release has `floor`."""
NOBODY = -1
"""In a table of neighbours: there is none."""


def share_out(keep: int, sizes: list[int]) -> list[int]:
    """Split a budget in proportion to sizes, by largest remainder, the first of equals first."""
    total = sum(sizes)
    shares = [keep * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(keep * sizes[i] % total), i))
    for i in order[: keep - sum(shares)]:
        shares[i] += 1
    return shares


def share_evenly(keep: int, sizes: list[int]) -> list[int]:
    """Split a budget into equal shares; what one cannot hold goes to the others, and what is left over to the first."""
    shares = [0] * len(sizes)
    while (left := keep - sum(shares)) > 0:
        open_ = [i for i, size in enumerate(sizes) if shares[i] < size]
        each = left // len(open_)
        for i in open_ if each else open_[:left]:
            shares[i] = min(sizes[i], shares[i] + max(each, 1))
    return shares


@lru_cache(maxsize=64)
def neighbours(layout: Layout, device: torch.device, *, wrap: bool = False) -> Tensor:
    """Numbers of the tokens left, right, above and below each token in its grid, [N, 4]; NOBODY at its edges.

    With `wrap` they are the token's own number -1, +1, - columns and + columns, held between the first and last number
    of the grid: at an edge that is a token of another row, or the token itself.
    """
    tables = []
    for part in layout:
        numbers_hw = _numbers(part)
        if wrap:
            steps = torch.tensor([-1, 1, -part.grid[1], part.grid[1]])
            tables.append((numbers_hw.view(-1, 1) + steps).clamp(numbers_hw[0, 0], numbers_hw[-1, -1]))
            continue
        framed = torch.nn.functional.pad(numbers_hw, (1, 1, 1, 1), value=NOBODY)
        around = [framed[1:-1, :-2], framed[1:-1, 2:], framed[:-2, 1:-1], framed[2:, 1:-1]]
        tables.append(torch.stack([each.flatten() for each in around], 1))
    return torch.cat(tables).to(device)


@lru_cache(maxsize=64)
def tiles(layout: Layout, device: torch.device) -> tuple[tuple[Tensor, Grid], ...]:
    """Numbers of the tokens of each tile, row by row, and rows and columns of what is left of the tile."""
    found = []
    for part in layout:
        numbers_hw = _numbers(part)
        rows, columns = _cuts(part, 0), _cuts(part, 1)
        for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
            tile = numbers_hw[top:bottom, left:right]
            found.append((tile.flatten().to(device), (bottom - top, right - left)))
    return tuple(found)


def budgets(layout: Layout, keep: int, how: str, device: torch.device) -> list[tuple[Tensor, Grid, int]]:
    """Tokens, rows and columns of each tile, and what it may keep; `how` is `even` or `floor` of `TILES`."""
    found = tiles(layout, device)
    sizes = [len(members_n) for members_n, _ in found]
    shares = share_evenly(keep, sizes) if how == "even" else [min(keep // len(sizes), size) for size in sizes]
    return [(*tile, share) for tile, share in zip(found, shares, strict=True)]


def parts(layout: Layout, keep: int, how: str, device: torch.device) -> list[tuple[Tensor, Grid, int]]:
    """As `budgets`, for all of `TILES`: together, all tokens are one part, whose grid is that of the whole image."""
    if how != "together":
        return budgets(layout, keep, how, device)
    everything_N = torch.arange(sum(math.prod(part.grid) for part in layout), device=device)
    return [(everything_N, layout[0].grid, keep)]


@lru_cache(maxsize=64)
def strips(count: int, pieces: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens in their order, cut into strips of equal length, the first of which are longer by one.

    Returns:
        the strip of each token, [count], and how many each has, [pieces]; no more pieces than tokens.
    """
    pieces = min(pieces, count)
    sizes = [count // pieces + int(piece < count % pieces) for piece in range(pieces)]
    sizes_P = torch.tensor(sizes, device=device)
    return torch.arange(pieces, device=device).repeat_interleave(sizes_P, output_size=count), sizes_P


@lru_cache(maxsize=64)
def windows(grid: Grid, side: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """A grid cut into windows of side x side tokens, smaller at its right and lower edge.

    Returns:
        the window of each token, row by row, [rows x columns], and how many each has.
    """
    rows, columns = grid
    across = -(-columns // side)
    of_hw = torch.arange(rows)[:, None] // side * across + torch.arange(columns) // side
    sizes = torch.bincount(of_hw.flatten(), minlength=across * -(-rows // side)).tolist()
    return of_hw.flatten().to(device), sizes


@lru_cache(maxsize=32)
def cells(layout: Layout, keep: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut the grids of an image into k cells.

    Each grid has its share of the cells. They stand in bands of equal height, whose number makes cells about square;
    bands differ by one cell at most, and the cells of a band are equally wide.

    Returns:
        weights_kN: float32, how much of a cell each token covers, 1 in all.
        centres_k: the token at each cell's centre; ascending, no two the same.
    """
    sizes = [math.prod(part.grid) for part in layout]
    weights_kN, centres, done = torch.zeros(keep, sum(sizes)), list[int](), 0
    for part, share in zip(layout, share_out(keep, sizes), strict=True):
        rows, columns = part.grid
        if not share:  # such as an extremely narrow image, of whose tiles nothing is left but newlines
            continue
        # A band must not have more cells than columns, nor the grid more bands than rows.
        bands = min(max(round(math.sqrt(share * rows / columns)), -(-share // columns)), rows, share)
        for band in range(bands):
            across = (band + 1) * share // bands - band * share // bands
            high = _cover(band, bands, rows)[:, None]
            for cell in range(across):
                covered = (high * _cover(cell, across, columns)).flatten()
                weights_kN[done, part.start : part.start + rows * columns] = (covered / covered.sum()).float()
                # In whole numbers, for a centre often lies on the edge of a token.
                row, column = rows * (2 * band + 1) // (2 * bands), columns * (2 * cell + 1) // (2 * across)
                centres.append(part.start + row * columns + column)
                done += 1
    return weights_kN.to(device), torch.tensor(centres)


def _cover(number: int, pieces: int, length: int) -> Tensor:
    """How much of each unit of a length lies in one of its equal pieces."""
    edges = torch.arange(length + 1, dtype=torch.float64)
    return edges.clamp(length * number / pieces, length * (number + 1) / pieces).diff()


def _numbers(part: Part) -> Tensor:
    rows, columns = part.grid
    return part.start + torch.arange(rows * columns).view(rows, columns)


def _cuts(part: Part, axis: int) -> list[int]:
    """Where tiles begin and end along an axis of a part's grid."""
    length = part.grid[axis]
    if part.tile is None:
        return [0, length]
    inner = range(part.tile[axis] - part.offset[axis] % part.tile[axis], length, part.tile[axis])
    return [0, *(cut for cut in inner if 0 < cut < length), length]
