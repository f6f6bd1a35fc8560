"""From images to what the language model reads of them: one pass of the tower, the method's choice, the projector.

Letters: I images, G images with equally many tokens, N tokens of an image, k tokens kept.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ocvtp.methods import Budget, Encoded, Kept, Method
from ocvtp.pruning.videos import VideoBudget
from ocvtp.vlms.family import Family, Vision
from ocvtp.vlms.images import Images, Layout, Placed


def choose(
    family: Family,
    method: Method,
    budget: Budget,
    images: Images,
    seeds: Sequence[int],
    prompts: Sequence[list[int]],
    videos: VideoBudget | None = None,
) -> list[Placed]:
    """What stays of each image. Images whose tokens stand alike go through the method together.

    `seeds` and `prompts` (token ids, without placeholders and padding) are one an image.
    """
    values: dict[int, Tensor] = {}
    indices: dict[int, Tensor] = {}
    for encoded in encode_groups(family, method, budget, images, seeds, prompts, videos=videos):
        with torch.no_grad():
            kept = method.choose(encoded)
        for member, (chosen, taken) in zip(encoded.members, _taken(kept, encoded), strict=True):
            indices[member], values[member] = chosen, taken
    order = range(len(images))
    features = family.project([values[i] for i in order])
    return [family.place(images, i, indices[i], features[i]) for i in order]


def slots(
    family: Family,
    method: Method,
    budget: Budget,
    images: Images,
    seeds: Sequence[int],
    prompts: Sequence[list[int]],
    videos: VideoBudget | None = None,
) -> list[Tensor | None]:
    """Attention of the slots by which tokens of each image are chosen, [K, N]; None where there are none."""
    found: dict[int, Tensor | None] = {}
    for encoded in encode_groups(family, method, budget, images, seeds, prompts, videos=videos):
        with torch.no_grad():
            attention_GKN = method.slots(encoded)
        for row, member in enumerate(encoded.members):
            found[member] = None if attention_GKN is None else attention_GKN[row]
    return [found[i] for i in range(len(images))]


def encode_groups(
    family: Family,
    method: Method,
    budget: Budget,
    images: Images,
    seeds: Sequence[int],
    prompts: Sequence[list[int]],
    vision: Vision | None = None,
    *,
    videos: VideoBudget | None = None,
) -> Iterator[Encoded]:
    """The images as the method sees them, in groups, after one pass of the tower, unless its `vision` is given."""
    keeps = _keeps(budget, videos or VideoBudget(budget), images, family.counts(images))
    vision = method.encode(family, images, keeps) if vision is None else vision
    for (_, keep), members in _groups(vision, keeps).items():
        seeds_G, prompts_G = [seeds[i] for i in members], [prompts[i] for i in members]
        grids_G = [vision.grids[i] for i in members]
        yield Encoded(vision, members, keep, seeds_G, grids_G, prompts_G, family.project)


def _keeps(budget: Budget, videos: VideoBudget, images: Images, counts: Sequence[int]) -> list[int]:
    """Tokens that stay of each image, and of each frame of videos."""
    keeps, done = [budget.at_most(count) for count in counts[: images.stills]], images.stills
    for number, frames in enumerate(images.videos):
        seconds = None if images.seconds is None else images.seconds[number]
        keeps += videos.keeps(counts[done : done + frames], seconds, number)
        done += frames
    return keeps


def _groups(vision: Vision, keeps: Sequence[int]) -> Mapping[tuple[Layout, int], list[int]]:
    groups: dict[tuple[Layout, int], list[int]] = {}
    for number, keep in enumerate(keeps):
        groups.setdefault((vision.layout(number), keep), []).append(number)
    return groups


def _taken(kept: Kept, encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Numbers, on the CPU, and values of what stays of each image."""
    values_GkV = kept.values_GkV
    if values_GkV is None:
        values_GNV = encoded.vision.values(encoded.members)
        indices_Gk = kept.indices_Gk.to(values_GNV.device).clamp(min=0)
        values_GkV = values_GNV.gather(1, indices_Gk[..., None].expand(-1, -1, values_GNV.shape[2]))
    indices_Gk = kept.indices_Gk.cpu()
    numbers_G = (indices_Gk >= 0).sum(1).tolist()
    return [(indices_Gk[i, :number], values_GkV[i, :number]) for i, number in enumerate(numbers_G)]
