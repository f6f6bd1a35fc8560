"""`ocvtp export-vllm`: a folder that vLLM reads, pruned or not."""

import argparse
from typing import Any

from ocvtp.commands import common
from ocvtp.errors import BadInput


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "export-vllm", run, "write a VLM for vLLM",
        "Weights under the names of published checkpoints and, with --method, how they are pruned: `vllm serve FOLDER` "
        "then needs no more options, where ocvtp is installed beside vLLM.",
    )  # fmt: skip
    parser.add_argument("vlm", metavar="VLM", help="a VLM of the catalogue, or a folder")
    parser.add_argument("folder", metavar="FOLDER", help="to be made")
    parser.add_argument("--method", default=None, help="a method before the LLM (default: not pruned)")
    parser.add_argument("--keep", type=common.keep, default=None, metavar="N", help="tokens kept, a count or a share")
    parser.add_argument("--pruner", default=None, help="folder or hub id of a trained pruner, for oc-vtp; it is copied")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="options of the method, seed=1"
    )
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write and say what."""
    from ocvtp.serving.export import export

    if args.method is None and (args.keep is not None or args.pruner is not None or args.set):
        raise BadInput("--keep, --pruner and --set say how to prune: name a --method, or leave them out")
    section = None
    if args.method is not None:
        given = {"method": args.method, "keep": args.keep, "pruner": args.pruner}
        section = {name: value for name, value in given.items() if value is not None}
        options = common.named_values("--set", args.set, "layer=9")
        for name in ("method", "keep", "pruner"):
            if name in options:
                raise BadInput(f"--set {name}=...: say it with --{name}")
        section |= options
    written = export(args.vlm, args.folder, section)
    if args.json:
        common.print_json({"folder": args.folder, "files": written})
        return 0
    common.console().print(f"{args.folder}: {', '.join(written)}", markup=False, soft_wrap=True)
    return 0
