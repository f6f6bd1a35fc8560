"""Downsampling against the area that each token has in each cell, and against PyTorch's average pooling."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods import entry_of
from ocvtp.methods.downsample import Downsample
from ocvtp.methods.tiles import cells, share_out
from ocvtp.vlms.images import Layout, Part


def overlap(low: float, high: float, unit: int) -> float:
    return max(0.0, min(high, unit + 1) - max(low, unit))


def slowly(layout: Layout, values_NV: Tensor, keep: int) -> tuple[list[int], Tensor]:
    centres, rows_out = [], []
    for part, share in zip(layout, share_out(keep, [math.prod(part.grid) for part in layout]), strict=True):
        if share == 0:
            continue
        rows, columns = part.grid
        bands = min(max(round(math.sqrt(share * rows / columns)), math.ceil(share / columns)), rows, share)
        for band in range(bands):
            here = (band + 1) * share // bands - band * share // bands
            top, bottom = rows * band / bands, rows * (band + 1) / bands
            for cell in range(here):
                left, right = columns * cell / here, columns * (cell + 1) / here
                total, area = torch.zeros(values_NV.shape[1], dtype=torch.float64), 0.0
                for y in range(rows):
                    for x in range(columns):
                        weight = overlap(top, bottom, y) * overlap(left, right, x)
                        total += weight * values_NV[part.start + y * columns + x].double()
                        area += weight
                rows_out.append(total / area)
                middle = (math.floor((top + bottom) / 2 + 1e-9), math.floor((left + right) / 2 + 1e-9))
                centres.append(part.start + middle[0] * columns + middle[1])
    return centres, torch.stack(rows_out).float()


@pytest.mark.parametrize("name", ["square", "wide", "tiles", "cut"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_cells_are_means_of_the_area_they_cover(tools: Any, name: str, share: float) -> None:
    vision = tools.numbers(tools.layouts[name])
    keep = max(1, int(share * vision.count))
    indices, values = tools.choose(Downsample(), vision, keep)
    given = vision.values([0, 1, 2])
    for image in range(3):
        centres, expected = slowly(tools.layouts[name], given[image], keep)
        assert indices[image].tolist() == centres
        torch.testing.assert_close(values[image], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("side", "keep", "pool"), [(24, 64, 3), (24, 144, 2), (24, 36, 4), (24, 576, 1), (12, 16, 3)])
def test_it_is_average_pooling_where_the_budget_is_a_square(tools: Any, side: int, keep: int, pool: int) -> None:
    vision = tools.numbers((Part(0, (side, side)),))
    _, values = tools.choose(Downsample(), vision, keep)
    given = vision.values([0, 1, 2]).view(3, side, side, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(given, pool).flatten(2).transpose(1, 2)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["square", "wide", "tiles", "cut"])
def test_every_budget_has_its_cells(tools: Any, name: str) -> None:
    layout = tools.layouts[name]
    total = sum(math.prod(part.grid) for part in layout)
    for keep in range(1, total + 1):
        weights, centres = cells(layout, keep, torch.device("cpu"))
        assert weights.shape == (keep, total)
        torch.testing.assert_close(weights.sum(1), torch.ones(keep))
        assert centres.tolist() == sorted(set(centres.tolist()))
        # The token in the middle of a cell has its share of it.
        assert bool((weights.gather(1, centres[:, None]) > 0).all())
    assert torch.equal(cells(layout, total, torch.device("cpu"))[0], torch.eye(total))


@pytest.mark.parametrize("keep", [1, 3, 5, 9, 12, 16])
def test_on_models(vlm: Any, pictures: Any, tools: Any, keep: int) -> None:
    seen = tools.prune(vlm, pictures, "downsample", keep)
    family = tools.family(vlm)
    vision = family.encode(family.images(pictures), ())
    for image in range(8):
        centres, expected = slowly(vision.layout(image), vision.values([image])[0], keep)
        assert seen.kept[image] == centres
        torch.testing.assert_close(seen.values[image], expected, atol=1e-5, rtol=1e-5)


def test_it_has_no_options_and_no_pruner(vlm: Any) -> None:
    with pytest.raises(BadInput, match="downsample uses no pruner"):
        entry_of("downsample").build(None, object(), {})  # type: ignore[arg-type]
