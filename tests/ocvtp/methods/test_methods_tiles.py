"""Neighbours, tiles and shares, against plain loops over rows and columns."""

from typing import Any

import pytest
import torch

from ocvtp.methods.tiles import neighbours, share_evenly, share_out, tiles

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["square", "wide", "tiles", "cut"])
def test_neighbours_are_in_the_same_grid(tools: Any, name: str) -> None:
    layout = tools.layouts[name]
    table = neighbours(layout, CPU).tolist()
    wrapped = neighbours(layout, CPU, wrap=True).tolist()
    for part in layout:
        rows, columns = part.grid
        first, last = part.start, part.start + rows * columns - 1
        for row in range(rows):
            for column in range(columns):
                number = first + row * columns + column
                places = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
                inside = [first + y * columns + x for y, x in places if 0 <= y < rows and 0 <= x < columns]
                assert sorted(n for n in table[number] if n >= 0) == sorted(inside)
                beside = [number - 1, number + 1, number - columns, number + columns]
                assert wrapped[number] == [min(max(n, first), last) for n in beside]
    assert len(table) == sum(part.grid[0] * part.grid[1] for part in layout)


@pytest.mark.parametrize("name", ["square", "wide", "tiles", "cut"])
def test_tiles_hold_what_the_tower_saw_together(tools: Any, name: str) -> None:
    found = tiles(tools.layouts[name], CPU)
    assert [numbers.tolist() for numbers, _ in found] == tools.owners(tools.layouts[name])
    assert all(rows * columns == len(numbers) for numbers, (rows, columns) in found)
    if name == "cut":  # two rows are left of the upper tiles, three of the lower ones
        assert [grid for _, grid in found] == [(4, 4), (2, 4), (2, 4), (3, 4), (3, 4)]


def test_shares() -> None:
    assert share_out(640, [576, 2304]) == [128, 512]
    assert share_out(7, [10, 10, 10]) == [3, 2, 2]
    assert share_out(5, [1, 1, 8]) == [1, 0, 4]
    assert share_evenly(640, [576] * 5) == [128] * 5
    assert share_evenly(7, [10, 10, 10]) == [3, 2, 2]
    assert share_evenly(2, [10, 10, 10]) == [1, 1, 0]
    assert share_evenly(20, [3, 10, 10]) == [3, 9, 8]
    for keep in range(31):
        for sizes in ([10, 10, 10], [1, 4, 25], [30]):
            for split in (share_out, share_evenly):
                shares = split(keep, sizes)
                assert sum(shares) == keep
                assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
