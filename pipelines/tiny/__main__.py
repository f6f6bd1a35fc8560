"""`python -m pipelines.tiny train`: make tiny-llava or tiny-qwen, and go on where an earlier run stopped."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from rich.logging import RichHandler

from pipelines.tiny.architecture import Architecture
from pipelines.tiny.card import publish
from pipelines.tiny.llava import TinyLlava
from pipelines.tiny.maker import Curve, Maker
from pipelines.tiny.qwen import TinyQwen
from pipelines.tiny.recipe import STAGES, Recipe

ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in (TinyLlava(), TinyQwen())}


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.tiny", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("train", help="train all stages, or those that are missing")
    command.add_argument("--model", choices=ARCHITECTURES, default="tiny-llava", help="default %(default)s")
    command.add_argument("--work", type=Path, help="checkpoints (default .ocvtp/MODEL)")
    command.add_argument("--out", type=Path, help="the finished model (default its folder in ocvtp/vlms)")
    command.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these, in order")
    command.add_argument("--device", default="cpu")
    command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    architecture = ARCHITECTURES[arguments.model]
    train(
        architecture,
        replace(architecture.recipe, seed=arguments.seed),
        arguments.work or Path(".ocvtp") / architecture.name,
        arguments.out or Path("ocvtp/vlms") / architecture.name.replace("-", "_"),
        arguments.device,
        tuple(arguments.stages),
    )


def train(
    architecture: Architecture, recipe: Recipe, work: Path, out: Path, device: str, stages: tuple[str, ...]
) -> None:
    """Run the stages that are not finished; the first two do not need each other and may run side by side.

    `work` holds their checkpoints. With the last stage the model is written to `out`.
    """
    maker = Maker(architecture, recipe, work, device)
    curves: dict[str, Curve] = {name: getattr(maker, name)() for name in STAGES if name in stages}
    if stages == STAGES:
        publish(maker, curves, out)


if __name__ == "__main__":
    main()
