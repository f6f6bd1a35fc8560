"""From images to what the language model reads of them: one pass of the tower, the method's choice, the projector.

Letters: I images, G images with equally many tokens, N tokens of an image, k tokens kept.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ocvtp import streams
from ocvtp.errors import BadInput
from ocvtp.methods import Budget, Encoded, Kept, Method
from ocvtp.phases import phase
from ocvtp.pruning.videos import Grouped, VideoBudget
from ocvtp.vlms.family import Family, Vision
from ocvtp.vlms.images import Images, Layout, Placed
from ocvtp.vlms.tower import device_of


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

    Raises:
        BadInput: the method chose what cannot be; names it.
    """
    values: dict[int, Tensor] = {}
    indices: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}
    counts, groups = family.counts(images), (videos or VideoBudget(budget)).groups(images)
    encode = partial(encode_groups, family, method, budget, images, seeds, prompts, videos=videos)
    for encoded, kept in _chosen(family, method, images, encode):
        with phase("method"):
            taken = _taken(kept, encoded, method)  # with gradients
        for row, (member, (chosen_k, values_kV)) in enumerate(zip(encoded.members, taken, strict=True)):
            edges = list(accumulate((counts[number] for number in groups[member]), initial=0))
            cuts = torch.searchsorted(chosen_k, torch.tensor(edges)).tolist()
            for number, first, (start, end) in zip(groups[member], edges[:-1], pairwise(cuts), strict=True):
                indices[number], values[number] = chosen_k[start:end] - first, values_kV[start:end]
                if kept.scores_Gk is not None:
                    scores[number] = kept.scores_Gk[row, start:end]
    order = range(len(images))
    features = family.project([values[i] for i in order])
    placed = [family.place(images, i, indices[i], features[i]) for i in order]
    return [
        _scored(each, indices[i], scores[i]) if i in scores and len(indices[i]) else each
        for i, each in zip(order, placed, strict=True)
    ]


def _chosen(
    family: Family, method: Method, images: Images, encode: Callable[..., Iterator[Encoded]]
) -> Iterator[tuple[Encoded, Kept]]:
    """Images in groups, and the method's choice: after the tower, or beside its later blocks (`ocvtp.streams`)."""
    if not _early(family, method, images):
        yield from ((encoded, _choice(method, encoded)) for encoded in encode())
        return
    beside, found = streams.Beside(device_of(family.tower, images.pixels.device)), list[Kept]()

    def choose_now(vision: Vision) -> None:
        with beside.running():
            found.extend(_choice(method, encoded) for encoded in encode(vision))

    with phase("tower"):
        vision = family.encode(images, method.layers(), ready=choose_now)
    beside.join(*(made for kept in found for made in (kept.indices_Gk, kept.scores_Gk)))
    yield from zip(encode(vision), found, strict=True)


def _early(family: Family, method: Method, images: Images) -> bool:
    """Whether a method is asked to choose before the tower is done, and can."""
    if not (streams.wanted() and method.by_states) or images.videos or type(method).encode is not Method.encode:
        return False
    return max(method.layers()) < family.facts.feature_layer


def _choice(method: Method, encoded: Encoded) -> Kept:
    with phase("method"), torch.no_grad():
        return method.choose(encoded)


def _scored(placed: Placed, indices_k: Tensor, scores_k: Tensor) -> Placed:
    """With the numbers of the tokens that stay, in their places."""
    numbers_X = placed.numbers_X.to(scores_k.device)
    places_X = torch.searchsorted(indices_k.to(numbers_X), numbers_X.clamp(min=0))
    return replace(placed, scores_X=scores_k[places_X].masked_fill(numbers_X < 0, 0))


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
    counts, groups = family.counts(images), (videos or VideoBudget(budget)).groups(images)
    for encoded in encode_groups(family, method, budget, images, seeds, prompts, videos=videos):
        with torch.no_grad():
            attention_GKN = method.slots(encoded)
        for row, member in enumerate(encoded.members):
            sizes = [counts[number] for number in groups[member]]
            parts = [None] * len(sizes) if attention_GKN is None else attention_GKN[row].split(sizes, 1)
            found |= dict(zip(groups[member], parts, strict=True))
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
    """The images as the method sees them, in groups, after one pass of the tower, unless its `vision` is given.

    Members are numbers of images; with frames that go together (`VideoBudget.group`) numbers of such groups.
    """
    videos = videos or VideoBudget(budget)
    keeps, groups = _keeps(budget, videos, images, family.counts(images)), videos.groups(images)
    if vision is None:
        with phase("tower"):  # of methods that run it block by block, the tower knows nothing
            vision = method.encode(family, images, keeps)
    if len(groups) < len(keeps):
        vision, keeps = Grouped(vision, groups), [sum(keeps[number] for number in group) for group in groups]
    for (_, keep), members in _alike(vision, keeps).items():
        first = [groups[i][0] for i in members]
        seeds_G, prompts_G = [seeds[i] for i in first], [prompts[i] for i in first]
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


def _alike(vision: Vision, keeps: Sequence[int]) -> Mapping[tuple[Layout, int], list[int]]:
    groups: dict[tuple[Layout, int], list[int]] = {}
    for number, keep in enumerate(keeps):
        groups.setdefault((vision.layout(number), keep), []).append(number)
    return groups


def _taken(kept: Kept, encoded: Encoded, method: Method) -> list[tuple[Tensor, Tensor]]:
    """Numbers, on the CPU, and values of what stays of each image."""
    indices_Gk = _checked(kept, encoded, method)
    values_GkV = kept.values_GkV
    if values_GkV is None:
        values_GNV = encoded.vision.values(encoded.members)
        on_device_Gk = kept.indices_Gk.to(values_GNV.device).clamp(min=0)
        values_GkV = values_GNV.gather(1, on_device_Gk[..., None].expand(-1, -1, values_GNV.shape[2]))
    numbers_G = (indices_Gk >= 0).sum(1).tolist()
    return [(indices_Gk[i, :number], values_GkV[i, :number]) for i, number in enumerate(numbers_G)]


def _checked(kept: Kept, encoded: Encoded, method: Method) -> Tensor:
    """The numbers, on the CPU; `BadInput` names a method that chose what cannot be."""

    def refuse(what: str) -> BadInput:
        return BadInput(f"method {method.name or type(method).__name__} {what}")

    images, count, keep = len(encoded.members), encoded.count, encoded.keep
    indices, values = kept.indices_Gk, kept.values_GkV
    if not isinstance(indices, Tensor) or indices.ndim != 2 or len(indices) != images or indices.is_floating_point():
        what = (
            f"{indices.dtype} of shape {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        )
        raise refuse(f"chose {what} for {images} images: whole numbers [{images}, {keep}] are needed")
    if values is not None and (values.ndim != 3 or values.shape[:2] != indices.shape):
        raise refuse(f"gave values {list(values.shape)} for tokens {list(indices.shape)}: a row for each is needed")
    if kept.scores_Gk is not None and kept.scores_Gk.shape != indices.shape:
        raise refuse(f"gave scores {list(kept.scores_Gk.shape)} for tokens {list(indices.shape)}: one each is needed")
    indices_Gk = indices.cpu()
    there_Gk = indices_Gk >= 0
    if indices_Gk.numel() and (int(indices_Gk.max()) >= count or int(indices_Gk.min()) < -1):
        strange = int(indices_Gk.max()) if int(indices_Gk.max()) >= count else int(indices_Gk.min())
        raise refuse(f"chose token {strange} of an image that has {count}: 0 to {count - 1}, or -1 for none, are legal")
    if (there_Gk[:, 1:] & ~there_Gk[:, :-1]).any():
        raise refuse("has -1, which stands for none, before other tokens: it belongs at the end")
    if (there_Gk[:, 1:] & (indices_Gk[:, 1:] <= indices_Gk[:, :-1])).any():
        row = indices_Gk[(there_Gk[:, 1:] & (indices_Gk[:, 1:] <= indices_Gk[:, :-1])).any(1)][0]
        twice = len(set(row[row >= 0].tolist())) < int((row >= 0).sum())
        raise refuse(f"chose {'a token twice' if twice else 'tokens that do not rise'}: {row[:12].tolist()}")
    numbers_G = there_Gk.sum(1)
    wrong = numbers_G > keep if method.fewer else numbers_G != keep
    if wrong.any():
        number = int(numbers_G[wrong][0])
        raise refuse(
            f"keeps {number} of {count} tokens of an image, but was asked for {keep}"
            + ("" if number > keep else " (it may say `fewer = True`)")
        )
    return indices_Gk


_NAMING = 1 << 16
"""Numbers of a picture that are read for its name."""


def name_of(pixels: Tensor) -> str:
    """A name for a picture that the caller gave none, from its pixels.

    They are rounded to bfloat16, so that a caller who casts them to the type of the model gets the same. Of a large
    picture every so many are read: all of five tiles would take longer than a good method.
    """
    some = pixels.detach().flatten()[:: max(1, pixels.numel() // _NAMING)]
    rounded = some.to(torch.bfloat16).contiguous().cpu().view(torch.uint8)
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()
