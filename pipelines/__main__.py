"""`python -m pipelines COMMAND`: as `python -m cluster COMMAND`, for the store and the second place of params.yaml.

`clean` spares every published result to which an output of the repository, or of an experiment in a copy of it, refers.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cluster import ClusterError, CorruptResult, Manifest, Store
from cluster.__main__ import main as cluster_main
from cluster.task import canonical
from ocvtp.errors import OcvtpError
from pipelines.stage.command import explain
from pipelines.stage.context import home_of, open_stage
from pipelines.stage.outputs import MODELS, RESULTS, SAMPLE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__, add_help=False)
    parser.add_argument("command", nargs="?", default="--help")
    parser.add_argument("--store", type=Path)
    options, rest = parser.parse_known_args(arguments)
    try:
        stage = open_stage("report")
        store = Store(options.store or stage.config.store)
        given = ["--store", str(store.root)] if options.command != "--help" else []
        if options.command in ("push", "pull") and stage.config.remote:
            given += ["--remote", stage.config.remote]
        if options.command != "clean" or not store.root.is_dir():
            return cluster_main([options.command, *given, *rest])
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as names:
            names.write("\n".join(in_use(store, places(stage.root))))
            names.flush()
            return cluster_main(["clean", *given, "--in-use", names.name, *rest])
    except (OcvtpError, ClusterError, OSError) as error:
        return explain("pipelines", error)


def places(root: Path) -> list[Path]:
    """The repository, and the copies of it in which DVC runs experiments (`dvc exp run --temp`)."""
    home = home_of(root.resolve())
    return [home, *(file.parent for file in (home / ".dvc" / "tmp" / "exps").glob("**/dvc.yaml"))]


def in_use(store: Store, roots: Iterable[Path]) -> Iterator[str]:
    """`KIND/KEY` of every published result that an output of stages names, or of which one holds a file."""
    sums: set[str] = set()
    texts: list[str] = []
    for root in roots:
        for path in _outputs(root):
            with path.open("rb") as file:
                sums.add(hashlib.file_digest(file, "sha256").hexdigest())
            if path.suffix == ".json":
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
    if not sums:
        raise FileNotFoundError(f"{next(iter(roots))} holds no outputs of stages: run them, or `dvc checkout`, first")
    text = "\n".join(texts)
    scored: set[str] = set()
    # Scores come before answers, of which they hold what these are made of.
    for folder in sorted(store.published(), key=lambda folder: folder.parent.name != "scores"):
        try:
            manifest = Manifest.read(folder)
            held = any(file.sha256 in sums for file in manifest.files) or _asking(manifest) in scored
            if held and "answers" in manifest.about.spec and folder.parent.name == "scores":
                scored.add(canonical([manifest.about.spec["answers"], manifest.about.spec["answers_code"]]))
        except CorruptResult:
            held = True  # not ours to judge: `verify` names it
        if held or folder.name in text:
            yield f"{folder.parent.name}/{folder.name}"


def _asking(manifest: Manifest) -> str:
    """What a shard of answers is made of, whatever its size; nothing of another result."""
    spec = {key: value for key, value in manifest.about.spec.items() if key != "shard"}
    return canonical([spec, manifest.about.code]) if manifest.about.kind == "answers" else ""


def _outputs(root: Path) -> Iterator[Path]:
    for name in (SAMPLE.partition("/")[0], MODELS, RESULTS):
        for folder, _, files in os.walk(root / name):
            yield from (Path(folder) / file for file in files)


if __name__ == "__main__":
    sys.exit(main())
