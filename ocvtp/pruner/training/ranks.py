"""Training on several devices: each process takes its part of every batch, and all take the same step.

A batch is that of one device. What is drawn for it is drawn for all of it by every process, which then uses its part:
the curve of the loss does not depend on the number of processes (dropout aside, and but for the order of sums).

Letters: B images of the whole batch, b images of a process, N tokens.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ocvtp.errors import BadInput
from ocvtp.pruner.layout import TokenLayout, layout
from ocvtp.pruner.model import OCPruner
from ocvtp.pruner.slots import FromTokens
from ocvtp.pruner.training.answers import Teacher
from ocvtp.pruner.training.data import Batch
from ocvtp.pruner.training.train_config import TrainConfig
from ocvtp.pruner.training.validate import autocast, training_loss


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, and which of them this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """Those of `torch.distributed`, if it was begun (`begin`), else one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """It is the one that validates and writes."""
        return self.rank == 0

    def check(self, config: TrainConfig, images: int) -> None:
        """`BadInput` if a batch cannot be shared out."""
        if config.batch_size % self.world:
            raise BadInput(f"batch_size {config.batch_size} cannot be shared out evenly among {self.world} processes")
        rest = images % min(config.batch_size, images)
        if images < self.world or (0 < rest < self.world and not config.drop_last):
            raise BadInput(
                f"the last batch of an epoch has {rest or images} of {images} images, which is not one for each of "
                f"{self.world} processes: set drop_last=True, or start fewer"
            )

    def part(self, indices: list[int]) -> list[int]:
        """The images of a batch that are for this process."""
        return indices[self._rows(len(indices))]

    def wrapped(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are means over processes."""
        return module if self.world == 1 else DistributedDataParallel(module, broadcast_buffers=False)

    def mean(self, values: Tensor) -> Tensor:
        """Over processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def agreed(self, word: str) -> str:
        """What the first process says."""
        said = [word]
        if self.world > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def draws(
        self, pruner: OCPruner, batch: Batch, size: int, slots: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Noise of the initial slots [b, K, D], and what the decoder may see: this process's part of both.

        Args:
            pruner: whose they are.
            batch: of this process.
            size: B.
            slots: K.
            generator: of this step.
        """
        rows = self._rows(size)
        noise_BKD = torch.randn(size, slots, pruner.config.slot_dim, generator=generator)
        if pruner.decoder is None:
            return noise_BKD[rows], None
        where = layout(batch.tokens_BNC, batch.mask_BN, batch.grids, pruner.config)
        plan = pruner.decoder.plan(self._whole(where, size, rows), "random", generator)
        if plan is not None:
            plan = plan[rows]
            plan = plan[:, : where.tokens] if plan.ndim == 2 else plan
        return noise_BKD[rows], plan

    def _rows(self, size: int) -> slice:
        return slice(self.rank, size, self.world)

    def _whole(self, where: TokenLayout, size: int, rows: slice) -> TokenLayout:
        """The layout of the whole batch, as far as it concerns this process's images."""
        if self.world == 1:
            return where
        longest = torch.tensor(where.tokens, device=where.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        tokens = int(longest)
        if where.mask_BN is None and tokens == where.tokens:
            return TokenLayout(size, tokens, None, where.grids, where.device)
        mask_BN = torch.ones(size, tokens, dtype=torch.bool, device=where.device)
        mask_BN[rows, where.tokens :] = False
        if where.mask_BN is not None:
            mask_BN[rows, : where.tokens] = where.mask_BN
        return TokenLayout(size, tokens, mask_BN, where.grids, where.device)


class StepLoss(nn.Module):
    """The loss of one process's part of a batch: what gradients are taken of."""

    def __init__(self, pruner: OCPruner, config: TrainConfig, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.pruner, self.config = pruner, config
        self.teacher = teacher  # no module: its weights are none of this one's

    def forward(self, batch: Batch, slots: int, noise_bKD: Tensor, plan: Tensor | None, draw: int = 0) -> Tensor:
        """A scalar; `draw` is that of the prompts of `answers`."""
        device = batch.tokens_BNC.device
        with autocast(self.config, device):
            queries_bKD = None
            if not isinstance(self.pruner.queries, FromTokens):
                queries_bKD = self.pruner.queries(noise_bKD.to(device, self.pruner.dtype, non_blocking=True))
            decode = "none" if self.pruner.decoder is None else "random" if plan is None else plan
            out = self.pruner(
                batch.tokens_BNC, slots, queries_bKD, None, batch.mask_BN, batch.grids, decode, check_values=False
            )
            return training_loss(self.config, self.pruner, out, batch, self.teacher, draw)


def begin() -> torch.device:
    """Join the processes that `torchrun` started; returns the device of this one.

    Raises:
        BadInput: more processes on this machine than it has GPUs.
    """
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if gpus and local >= gpus:
        raise BadInput(f"process {local + 1} of this machine has no GPU, there are {gpus}: --nproc-per-node {gpus}")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    return device


def end() -> None:
    """Leave them, if they were joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
