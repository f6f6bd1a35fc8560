"""A small training: tokens, options and what it leaves."""

from pathlib import Path

import torch

from ocvtp.pruner import PrunerConfig
from ocvtp.pruner.training.run import TrainConfig, train

PRUNER = PrunerConfig(token_dim=16, grid=(4, 4), slot_dim=16, decoder_layers=2)


FAST = {"slots": [2, 4], "batch_size": 4, "steps": 6, "warmup_steps": 2, "eval_every": 2, "validation_share": 0.2}


class Source:
    """Images of four flat regions: a token is its region's kind, its position's code and noise of variance 0.01."""

    def __init__(self, images: int = 20, count: int = 16, bad: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        kinds, places = torch.randn(5, 16, generator=generator), torch.randn(count, 16, generator=generator)
        region = torch.randint(5, (images, count // 4), generator=generator).repeat_interleave(4, 1)
        noise = 0.1 * torch.randn(images, count, 16, generator=generator)
        self.tokens = (kinds[region] + places + noise).half()
        for image in bad:
            self.tokens[image, 0, 0] = torch.nan
        self.image_ids = [f"image-{i}" for i in range(images)]
        self.asked: list[list[int]] = []

    def __len__(self):
        return len(self.tokens)

    def batch(self, indices):
        self.asked.append(list(indices))
        return self.tokens[list(indices)], None, [(4, 4)] * len(indices)

    def split(self, validation_share, seed):
        count = int(len(self) * validation_share)
        return list(range(count, len(self))), list(range(count))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def run(tmp_path, name, source=None, pruner=PRUNER, **options):
    config = TrainConfig(**{**FAST, **options})
    metrics = train(pruner, config, source or Source(), tmp_path / name, resume=tmp_path / f"{name}-resume")
    return metrics, files(tmp_path / name)
