"""`python -m pipelines.tiny train`: make tiny-llava from nothing, and go on where an earlier run stopped."""

import argparse
import logging
from pathlib import Path

from rich.logging import RichHandler

from pipelines.tiny.train import STAGES, Recipe, train


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
    train(
        Recipe(seed=arguments.seed),
        arguments.work,
        arguments.out,
        device=arguments.device,
        stages=tuple(arguments.stages),
    )


if __name__ == "__main__":
    main()
