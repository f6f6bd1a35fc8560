"""Stage (a): the CLIP tower on scenes, by labels for each patch and tags for the whole picture.

Letters: B images, P patches, C tower width, T tags.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from ocvtp.data.scenes import DIGITS
from pipelines.tiny.loop import Losses, autocast
from pipelines.tiny.pool import COLOR_NAMES, SHAPE_NAMES, SIZE_NAMES, Pool

FEATURE_LAYER = -2


class Heads(nn.Module):
    """Linear read-outs that exist in training only: of the patches of layer -2, and of CLS for the tags."""

    def __init__(self, width: int, tags: int) -> None:
        super().__init__()
        self.color = nn.Linear(width, 1 + len(COLOR_NAMES))
        self.shape = nn.Linear(width, 1 + len(SHAPE_NAMES))
        self.size = nn.Linear(width, 1 + len(SIZE_NAMES))
        self.digit = nn.Linear(width, 1 + len(DIGITS))
        self.center = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 2)
        self.tags = nn.Linear(width, tags)
        self.tags_last = nn.Linear(width, tags)


def tower_losses(
    tower: CLIPVisionModel, heads: Heads, pool: Pool, *, batch: int, seed: int, device: str
) -> Callable[[int], Losses]:
    """The losses of a step over a random batch of the pool."""
    counts = torch.stack([(label > 0).float().mean() for label in (pool.color_SP, pool.digit_SP)])
    digit_weight = float((counts[0] / counts[1]).clamp(1, 2))

    def losses(step: int) -> Losses:
        indices = np.random.default_rng([seed, 1, step]).integers(0, len(pool), batch)
        features_BPC, cls_BC, last_BC = _features(tower, pool.pixels(indices).to(device))
        target = {
            n: getattr(pool, f"{n}_SP")[indices].to(device) for n in ("color", "shape", "size", "digit", "center")
        }
        shown = (target["shape"] + target["digit"]) > 0
        offset_BP2 = pool.offset_SP2[indices].to(device)
        tags_BT = pool.tags_ST[indices].to(device)
        missed_BP = (heads.offset(features_BPC).float() - offset_BP2).abs().sum(-1)
        return {
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
            "tags": 2 * F.binary_cross_entropy_with_logits(heads.tags(cls_BC).float(), tags_BT),
            "tags_last": 2 * F.binary_cross_entropy_with_logits(heads.tags_last(last_BC).float(), tags_BT),
            # The projector of LLaVA has no norm of its own: tokens of about unit size suit it.
            "norm": 0.05 * (features_BPC.float().pow(2).mean(-1).add(1e-6).log() ** 2).mean(),
        }

    return losses


@torch.inference_mode()
def tower_accuracy(tower: CLIPVisionModel, heads: Heads, pool: Pool, device: str) -> Mapping[str, float]:
    """Share of the patches of each kind that a linear read-out of layer -2 names rightly."""
    right: dict[str, list[Tensor]] = {}
    for start in range(0, len(pool), 128):
        indices = list(range(start, min(start + 128, len(pool))))
        with autocast(device):
            features_BPC, _, last_BC = _features(tower, pool.pixels(indices).to(device))
        for name in ("color", "shape", "size", "digit"):
            target_BP = getattr(pool, f"{name}_SP")[indices]
            found_BP = getattr(heads, name)(features_BPC.float()).argmax(-1).cpu()
            right.setdefault(name, []).append((found_BP == target_BP)[target_BP > 0])
            right.setdefault("background", []).append((found_BP == 0)[target_BP == 0])
        found_BT = heads.tags_last(last_BC.float()).cpu() > 0
        right.setdefault("tags", []).append((found_BT == (pool.tags_ST[indices] > 0))[pool.tags_ST[indices] > 0])
    return {f"{name} accuracy": float(torch.cat(hits).float().mean()) for name, hits in right.items()}


@torch.inference_mode()
def all_features(tower: CLIPVisionModel, pool: Pool, device: str) -> Tensor:
    """Tokens of layer -2 of every scene, [S, P, C] in bfloat16: the tower is frozen from now on."""
    parts = []
    for start in range(0, len(pool), 128):
        indices = list(range(start, min(start + 128, len(pool))))
        with autocast(device):
            parts.append(_features(tower, pool.pixels(indices).to(device))[0].bfloat16().cpu())
    return torch.cat(parts)


def _features(tower: CLIPVisionModel, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patch tokens of layer -2, CLS of layer -2, and the pooled CLS of the last layer."""
    output = tower(pixels_B3HW, output_hidden_states=True)
    chosen_BLC = output.hidden_states[FEATURE_LAYER]
    return chosen_BLC[:, 1:], chosen_BLC[:, 0], output.pooler_output


def _balanced(logits_BPK: Tensor, target_BP: Tensor) -> Tensor:
    """Cross-entropy in which object patches and background count alike."""
    each_BP = F.cross_entropy(logits_BPK.float().transpose(1, 2), target_BP, reduction="none")
    shown = target_BP > 0
    return 0.7 * each_BP[shown].mean() + 0.3 * each_BP[~shown].mean()
