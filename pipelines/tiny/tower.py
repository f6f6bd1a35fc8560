"""Stage (a): the tower on scenes, by labels for each patch and tags for the whole picture.

Letters: B images, P patches, C tower width, T tags.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocvtp.data.scenes import DIGITS
from pipelines.tiny.architecture import Architecture
from pipelines.tiny.loop import Losses, autocast
from pipelines.tiny.pool import COLOR_NAMES, SHAPE_NAMES, SIZE_NAMES, Pool, Pools, draw


class Heads(nn.Module):
    """Linear read-outs that exist in training only: of patches, and of what stands for the whole picture its tags."""

    def __init__(self, width: int, tags: int, pooled: Iterable[str]) -> None:
        super().__init__()
        self.color = nn.Linear(width, 1 + len(COLOR_NAMES))
        self.shape = nn.Linear(width, 1 + len(SHAPE_NAMES))
        self.size = nn.Linear(width, 1 + len(SIZE_NAMES))
        self.digit = nn.Linear(width, 1 + len(DIGITS))
        self.center = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 2)
        self.pooled = nn.ModuleDict({name: nn.Linear(width, tags) for name in pooled})


def tower_losses(
    architecture: Architecture, model: Any, heads: Heads, pools: Pools, *, batch: int, seed: int, device: str
) -> Callable[[int], Losses]:
    """The losses of a step over a random batch of scenes."""
    counts = [sum((getattr(pool, name) > 0).sum() for pool in pools) for name in ("color_SP", "digit_SP")]
    digit_weight = float((counts[0] / counts[1]).clamp(1, 2))

    def losses(step: int) -> Losses:
        number, indices = draw(pools, batch, np.random.default_rng([seed, 1, step]))
        pool = pools[number]
        features_BPC, pooled = architecture.read(model, pool.pixels(indices).to(device))
        target = {
            n: getattr(pool, f"{n}_SP")[indices].to(device) for n in ("color", "shape", "size", "digit", "center")
        }
        shown = (target["shape"] + target["digit"]) > 0
        offset_BP2 = pool.offset_SP2[indices].to(device)
        tags_BT = pool.tags_ST[indices].to(device)
        missed_BP = (heads.offset(features_BPC).float() - offset_BP2).abs().sum(-1)
        found = {
            "color": _balanced(heads.color(features_BPC), target["color"]),
            "shape": _balanced(heads.shape(features_BPC), target["shape"]),
            "size": 0.5 * _balanced(heads.size(features_BPC), target["size"]),
            "digit": digit_weight * _balanced(heads.digit(features_BPC), target["digit"]),
            "center": F.binary_cross_entropy_with_logits(
                heads.center(features_BPC)[..., 0].float(),
                target["center"].float(),
                pos_weight=torch.tensor(8.0, device=device),
            ),
            "offset": (missed_BP * shown).sum() / shown.sum(),
        }
        for name, whole_BC in pooled.items():
            found[name] = 2 * F.binary_cross_entropy_with_logits(heads.pooled[name](whole_BC).float(), tags_BT)
        if architecture.norm_weight:
            sizes_BP = features_BPC.float().pow(2).mean(-1).add(1e-6)
            found["norm"] = architecture.norm_weight * (sizes_BP.log() ** 2).mean()
        return found

    return losses


@torch.inference_mode()
def tower_accuracy(
    architecture: Architecture, model: Any, heads: Heads, pools: Pools, device: str
) -> Mapping[str, float]:
    """Share of the patches of each kind that a linear read-out names rightly, and of the tags that are there."""
    right: dict[str, list[Tensor]] = {}
    for pool, indices in _chunks(pools):
        with autocast(device):
            features_BPC, pooled = architecture.read(model, pool.pixels(indices).to(device))
        for name in ("color", "shape", "size", "digit"):
            target_BP = getattr(pool, f"{name}_SP")[indices]
            found_BP = getattr(heads, name)(features_BPC.float()).argmax(-1).cpu()
            right.setdefault(name, []).append((found_BP == target_BP)[target_BP > 0])
            right.setdefault("background", []).append((found_BP == 0)[target_BP == 0])
        last = list(pooled)[-1]
        found_BT = heads.pooled[last](pooled[last].float()).cpu() > 0
        right.setdefault("tags", []).append((found_BT == (pool.tags_ST[indices] > 0))[pool.tags_ST[indices] > 0])
    return {f"{name} accuracy": float(torch.cat(hits).float().mean()) for name, hits in right.items()}


@torch.inference_mode()
def all_features(architecture: Architecture, model: Any, pools: Pools, device: str) -> list[Tensor]:
    """What the projector reads of every scene, [S, T, F] in bfloat16 for each pool: the tower is frozen from now on."""
    parts: dict[int, list[Tensor]] = {}
    for pool, indices in _chunks(pools):
        with autocast(device):
            features_BTF = architecture.features(model, pool.pixels(indices).to(device))
        parts.setdefault(id(pool), []).append(features_BTF.bfloat16().cpu())
    return [torch.cat(parts[id(pool)]) for pool in pools]


def _chunks(pools: Pools) -> Iterable[tuple[Pool, list[int]]]:
    for pool in pools:
        for start in range(0, len(pool), 128):
            yield pool, list(range(start, min(start + 128, len(pool))))


def _balanced(logits_BPK: Tensor, target_BP: Tensor) -> Tensor:
    """Cross-entropy in which object patches and background count alike."""
    each_BP = F.cross_entropy(logits_BPK.float().transpose(1, 2), target_BP, reduction="none")
    shown = target_BP > 0
    return 0.7 * each_BP[shown].mean() + 0.3 * each_BP[~shown].mean()
