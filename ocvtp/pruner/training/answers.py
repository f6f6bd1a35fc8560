"""The loss `answers`: eq. 2-3 taken literally. What a frozen VLM answers with all tokens, it must answer with the kept.

Here are the kept tokens and how gradients reach the attention that chose them; the VLM is behind `Teacher`, which
`ocvtp.answers` implements.

Letters: B images, N tokens, K slots, S kept tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.provenance import TrainedFor
from ocvtp.pruner.seeding import generator
from ocvtp.pruner.select import Selection, choose
from ocvtp.pruner.span import over_tokens
from ocvtp.selection.proposals import sample

NEEDS: Final = "loss is answers, which needs a VLM that teaches (`ocvtp.answers.Teacher`)"


class Teacher(Protocol):
    """A frozen VLM, its images and the prompts that are put to it."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that determines what it teaches, as JSON."""

    @property
    def width(self) -> int:
        """Numbers a token in its tower."""

    @property
    def weights(self) -> str:
        """What tells its weights from others, as in `TrainedFor`."""

    def check(self, images: Sequence[str]) -> None:
        """`BadInput` names images that it has no picture or no prompt of."""

    def divergence(self, images: Sequence[str], kept_BS: Tensor, weights_BSN: Tensor, draw: int | None) -> Tensor:
        """KL of the answers with the kept tokens from those with all, [B], mean over prompts and places of answers.

        Args:
            images: ids.
            kept_BS: kept tokens, ascending; -1 at the end for none.
            weights_BSN: of all tokens in each kept one: what the language model reads in its place.
            draw: from which the prompts of a step follow; None for all prompts of each image.
        """


def check(teacher: Teacher | None, config: PrunerConfig, trained_for: TrainedFor, images: Sequence[str]) -> Teacher:
    """The teacher, if it can teach this pruner about these images.

    Raises:
        BadInput: there is none; images without a prompt or a picture.
        Incompatible: its tokens are of another width, or its weights others than those behind the tokens on disk.
    """
    if teacher is None:
        raise BadInput(f"{NEEDS}: none is given")
    if teacher.width != config.token_dim:
        raise Incompatible(f"the VLM that teaches has tokens {teacher.width} wide, the pruner's token_dim is "
                           f"{config.token_dim}: another VLM?")  # fmt: skip
    if trained_for.weights not in (None, teacher.weights):
        raise Incompatible(f"the tokens are those of {trained_for.vlm} with weights {trained_for.weights}, but the VLM "
                           f"that teaches has weights {teacher.weights}")  # fmt: skip
    teacher.check(images)
    return teacher


def kept(
    pruner_config: PrunerConfig,
    attention_BKN: Tensor,
    tokens_BNC: Tensor,
    mask_BN: Tensor | None,
    given_BK: Tensor | None = None,
) -> Selection:
    """What a pruned model keeps with as many tokens as slots (`OCPruner.select_details`), with each slot's pick.

    `given_BK` are picks in place of those that the config's `assignment` finds.
    """
    batch, slots, count = attention_BKN.shape
    exist_B1 = torch.full((batch, 1), count, device=attention_BKN.device)
    if mask_BN is not None:
        exist_B1 = mask_BN.sum(1, keepdim=True)
    # Scores of a tower, or random ones, are not there in training.
    fill = "slot_mass" if pruner_config.fill in ("attention", "random") else pruner_config.fill
    return choose(attention_BKN.detach().float(), exist_B1.clamp(max=slots), min(slots, count),
                  assignment=pruner_config.assignment, fill=fill, mask_BN=mask_BN, tokens_BNC=tokens_BNC,
                  given_BKk=None if given_BK is None else given_BK[:, :, None],
                  mass_power=pruner_config.mass_power)  # fmt: skip


def sampled_loss(
    pruner_config: PrunerConfig,
    attention_BKN: Tensor,
    tokens_BNC: Tensor,
    mask_BN: Tensor | None,
    teacher: Teacher,
    names: Sequence[str],
    draw: int,
    *,
    samples: int,
    temperature: float,
) -> Tensor:
    """Mean divergence of kept sets drawn around the pruner's; its gradient is that of their expected divergence.

    The score function: what a set's divergence is above the mean of the image's others, times the gradient of the
    logarithm of the set's probability (REINFORCE with a leave-one-out baseline: Kool, van Hoof and Welling 2019). No
    gradient passes through the language model. What is drawn of an image depends on `draw` and its id alone.
    """
    count = attention_BKN.shape[2]
    exists_BN = torch.ones_like(tokens_BNC[:, :, 0], dtype=torch.bool) if mask_BN is None else mask_BN
    shape = (samples, attention_BKN.shape[1], count)
    noise_MBKN = torch.stack([_gumbel(shape, draw, name) for name in names], 1).to(attention_BKN.device)
    errors, logarithms = list[Tensor](), list[Tensor]()
    for noise_BKN in noise_MBKN:
        picks_BK, logarithm_B = sample(attention_BKN, tokens_BNC, exists_BN, noise_BKN, pruner_config.assignment,
                                       temperature, pruner_config.mass_power)  # fmt: skip
        with torch.no_grad():
            selection = kept(pruner_config, attention_BKN, tokens_BNC, mask_BN, picks_BK)
            hard_BSN = torch.nn.functional.one_hot(selection.indices_BS.clamp(min=0), count).float()
            errors.append(teacher.divergence(names, selection.indices_BS, hard_BSN, draw))
        logarithms.append(logarithm_B)
    error_MB, logarithm_MB = torch.stack(errors), torch.stack(logarithms)
    others_MB = (error_MB.sum(0, keepdim=True) - error_MB) / (samples - 1)
    score = ((error_MB - others_MB) * logarithm_MB).mean()
    return error_MB.mean() + score - score.detach()


def _gumbel(shape: tuple[int, int, int], draw: int, name: str) -> Tensor:
    """Standard Gumbel noise of an image."""
    uniform = torch.rand(shape, generator=generator("ocvtp samples", draw, name))
    return -(-uniform.clamp(min=1e-9).log()).clamp(min=1e-9).log()


def soft_weights(attention_BKN: Tensor, selection: Selection, temperature: float) -> Tensor:
    """Weights of all tokens in each kept one, [B, S, N]: one at itself, and the gradient of its slot's attention.

    A kept token belongs to the slot that picked it, of several to the one with most attention for it. What was filled
    in belongs to none and has no gradient. Rows of -1 are zero.
    """
    assert selection.picks_BKk is not None  # noqa: S101 - of a selection by slots
    kept_BS, picks_BK = selection.indices_BS, selection.picks_BKk[:, :, 0]
    count, attention_BKN = attention_BKN.shape[2], attention_BKN.float()
    there_BS1 = (kept_BS >= 0)[:, :, None]
    token_BS1 = kept_BS.clamp(min=0)[:, :, None]
    pull_BKS = attention_BKN.detach().gather(2, kept_BS.clamp(min=0)[:, None].expand(-1, picks_BK.shape[1], -1))
    pull_BKS = pull_BKS.masked_fill(picks_BK[:, :, None] != kept_BS[:, None], -1)
    most_BS, owner_BS = pull_BKS.max(1)
    soft_BSN = over_tokens(attention_BKN, temperature).gather(1, owner_BS[:, :, None].expand(-1, -1, count))
    soft_BSN = soft_BSN * (most_BS >= 0)[:, :, None]
    hard_BSN = torch.zeros_like(soft_BSN).scatter(2, token_BS1, 1.0)
    return (hard_BSN + (soft_BSN - soft_BSN.detach())) * there_BS1
