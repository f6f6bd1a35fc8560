"""Density peaks: a few clusters of tokens, and their means; as SparseVLM and AutoPrune use dropped tokens again.

Letters: G images of a group, r tokens that are clustered, c clusters, D width of a token.
"""

import torch
from torch import Tensor

from ocvtp.selection.ranking import ranked, rows

_NOISE = 1e-6
"""At most, where equal densities are told apart as the authors do."""


def merged(dropped_GdD: Tensor, scores_Gd: Tensor, number: int, *, noise: bool = False) -> tuple[Tensor, Tensor]:
    """The best of dropped tokens, clustered: means [G, number, D], and which of the dropped [G, number] are centres."""
    best_Gr = ranked(scores_Gd)[:, : recycled(dropped_GdD.shape[1])]
    tokens_GrD = rows(dropped_GdD, best_Gr)
    with torch.no_grad():
        centres_Gc, belongs_Gr = cluster(tokens_GrD, number, noise=noise)
    return means(tokens_GrD, belongs_Gr, number), best_Gr.gather(1, centres_Gc)


def recycled(dropped: int) -> int:
    """How many of the dropped tokens are used again: three tenths, and one."""
    return min(dropped, int(0.3 * dropped) + 1)


def clusters(dropped: int) -> int:
    """How many tokens they become: a tenth, and one; none if nothing is dropped."""
    return int(recycled(dropped) / 10) + 1 if dropped else 0


def cluster(tokens_GrD: Tensor, number: int, *, noise: bool = False) -> tuple[Tensor, Tensor]:
    """Centres [G, c], numbers of tokens with the strongest first, and the cluster [G, r] that each token falls to.

    A token's density is exp of minus the mean squared distance (divided by the root of D) to its c nearest, itself
    among them; its reach is the distance to the nearest denser token. Centres have the largest product of both. Of
    equals the first token is denser, and the first is taken.

    Args:
        tokens_GrD: r of each image, at least c.
        number: c.
        noise: tell equal densities apart as the authors do, by noise of up to 1e-6; from a generator of its own.
    """
    tokens_GrD = tokens_GrD.float()
    count, width = tokens_GrD.shape[1:]
    distance_Grr = torch.cdist(tokens_GrD, tokens_GrD, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    nearest_Grc = distance_Grr.topk(number, dim=2, largest=False).values
    density_Gr = (-nearest_Grc.square().mean(2)).exp()
    if noise:
        # In float32 the noise would be a few steps of rounding, and could leave densities equal.
        density_Gr = density_Gr.double()
        density_Gr = density_Gr + _NOISE * torch.rand(count, generator=torch.Generator().manual_seed(0)).to(density_Gr)
    order_r = torch.arange(count, device=tokens_GrD.device)
    first_rr = (order_r[None, :] < order_r[:, None]) & (not noise)
    equal_Grr = density_Gr[:, None, :] == density_Gr[:, :, None]
    denser_Grr = (density_Gr[:, None, :] > density_Gr[:, :, None]) | (equal_Grr & first_rr)
    farthest_G11 = distance_Grr.amax((1, 2), keepdim=True)
    reach_Gr = torch.where(denser_Grr, distance_Grr, farthest_G11).amin(2)
    centres_Gc = (reach_Gr * density_Gr).argsort(dim=1, descending=True, stable=True)[:, :number]
    to_centre_Grc = distance_Grr.gather(2, centres_Gc[:, None, :].expand(-1, count, -1))
    belongs_Gr = to_centre_Grc.argmin(2)
    ranks_c = torch.arange(number, device=tokens_GrD.device)
    return centres_Gc, belongs_Gr.scatter(1, centres_Gc, ranks_c.expand(len(tokens_GrD), -1))


def means(tokens_GrD: Tensor, belongs_Gr: Tensor, number: int) -> Tensor:
    """The mean of each cluster, [G, c, D], in the type of the tokens."""
    in_Gcr = torch.nn.functional.one_hot(belongs_Gr, number).transpose(1, 2).float()
    sums_GcD = in_Gcr @ tokens_GrD.float()
    return (sums_GcD / in_Gcr.sum(2, keepdim=True)).to(tokens_GrD.dtype)
