"""`python -m pipelines.tiny train`: make tiny-llava from nothing, and go on where an earlier run stopped."""

import argparse
import logging
from pathlib import Path

from rich.logging import RichHandler

from pipelines.tiny.card import publish
from pipelines.tiny.maker import STAGES, Curve, Maker, Recipe


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.tiny", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("train", help="train all stages, or those that are missing")
    command.add_argument(
        "--work", type=Path, default=Path(".ocvtp/tiny-llava"), help="checkpoints (default %(default)s)"
    )
    command.add_argument("--out", type=Path, default=Path("ocvtp/vlms/tiny_llava"), help="the finished model")
    command.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these, in order")
    command.add_argument("--device", default="cpu")
    command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    train(Recipe(seed=arguments.seed), arguments.work, arguments.out, arguments.device, tuple(arguments.stages))


def train(recipe: Recipe, work: Path, out: Path, device: str, stages: tuple[str, ...]) -> None:
    """Run the stages that are not finished; the first two do not need each other and may run side by side.

    `work` holds their checkpoints. With the last stage the model is written to `out`.
    """
    maker = Maker(recipe, work, device)
    curves: dict[str, Curve] = {name: getattr(maker, name)() for name in STAGES if name in stages}
    if stages == STAGES:
        publish(maker, curves, out)


if __name__ == "__main__":
    main()
