"""`ocvtp catalog`: the VLMs that have a name. And what can be fetched beforehand of them and of the benchmarks, and
whether it is here already.

A catalogue is a YAML file of ocvtp, name -> entry. What matters here of an entry is `hub` (an id on the
Hugging Face hub) and `revision` (a commit); an entry without `hub` ships with ocvtp or is made by it.
"""

import argparse
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from ocvtp.commands import common
from ocvtp.errors import BadInput, NotAvailable

Kind = Literal["model", "dataset"]
_WEIGHTS_AND_CONFIGS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Files of a model that are fetched: never pickled weights."""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "catalog", run, "list the VLMs that have a name",
        "Where their weights come from, the reference layers (layer 9 is hidden_states[9]) and the paper's budgets: "
        "tokens an image, or a share of them. Any other model of these families is named by its folder.",
    )  # fmt: skip
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the catalogue."""
    from ocvtp.vlms import catalog

    entries = catalog()
    if args.json:
        common.print_json([{"name": name, **entry} for name, entry in entries.items()])
        return 0
    table = common.table("", "name", "weights", "layers", "budgets")
    for name, entry in entries.items():
        weights = f"{entry['hub']} at {entry['revision'][:8]}" if "hub" in entry else "shipped with ocvtp"
        table.add_row(name, weights, _listed(entry["layers"]), _listed(entry["budgets"]))
    common.console().print(table)
    for name, entry in entries.items():
        if "settings" in entry:
            settings = ", ".join(f"{key} = {value}" for key, value in entry["settings"].items())
            common.console().print(f"{name} is loaded with {settings}", markup=False, soft_wrap=True)
    return 0


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{value:.1%}" if isinstance(value, float) else str(value) for value in values)


@dataclass(frozen=True)
class Item:
    """A VLM or a benchmark."""

    name: str
    kind: Kind
    repo: str
    revision: str | None

    @property
    def mend(self) -> str:
        """The command that fetches it."""
        return f"ocvtp prefetch {self.name}"

    def place(self) -> Path | None:
        """The folder in the cache that holds it at its revision; None if it was never fetched."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(self._snapshot(snapshot_download, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError):
            return None

    def fetch(self) -> Path:
        """Download it and return the folder.

        Raises:
            NotAvailable: the hub cannot be reached, or refuses.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(self._snapshot(snapshot_download))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise NotAvailable(
                f"{self.repo} could not be fetched: {reason}. Is there a network, and HF_HUB_OFFLINE unset? A gated "
                "repository needs `hf auth login`"
            ) from error

    def _snapshot(self, download: Any, **options: Any) -> str:
        patterns = _WEIGHTS_AND_CONFIGS if self.kind == "model" else ["*.parquet", "*.md", "*.json"]
        where: str = download(
            self.repo, repo_type=self.kind, revision=self.revision, allow_patterns=patterns, **options
        )
        return where


def vlms() -> list[Item]:
    """The VLMs that come from the hub."""
    return _read("ocvtp.vlms", "catalog.yaml", "model")


def datasets() -> list[Item]:
    """The benchmarks that come from the hub."""
    return _read("ocvtp.evaluation", "benchmarks.yaml", "dataset")


def find(names: list[str]) -> list[Item]:
    """The entries of these names.

    Raises:
        BadInput: a name that is in neither catalogue, with those that are.
    """
    known = {item.name: item for item in (*vlms(), *datasets())}
    for name in names:
        if name not in known:
            raise BadInput(f"{name!r} is not in the catalogues; there are: {', '.join(known) or 'none'}")
    return [known[name] for name in names]


def _read(package: str, file: str, kind: Kind) -> list[Item]:
    try:
        source = files(package).joinpath(file)
        entries = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise NotAvailable(f"{package}/{file} is not part of this installation") from error
    return [
        Item(name, kind, entry["hub"], entry.get("revision")) for name, entry in entries.items() if entry.get("hub")
    ]
