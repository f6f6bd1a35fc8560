"""Task files for lmms-eval, written when they are needed: the official task, on local data or on the hub's.

A generated task includes the installed official one, so that its own functions ask and score, and has another name,
since lmms-eval prefers its own tasks to others of the same name.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ocvtp.errors import NotAvailable
from ocvtp.evaluation.benchmarks import Benchmark

_FUNCTION = "!function "


class _Tagged(str):
    """The name of a function, written with YAML's tag."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Tagged, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def package() -> Path:
    """The folder of the installed lmms-eval, without importing it.

    Raises:
        NotAvailable: it is not installed.
    """
    spec = find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise NotAvailable("lmms-eval is not installed: pip install 'ocvtp[eval]'")
    return Path(next(iter(spec.submodule_search_locations)))


def write_task(folder: Path, benchmark: Benchmark, data: Path | None = None, cache: Path | None = None) -> str:
    """Write the task of a benchmark into a folder, for lmms-eval's `--include_path`, and return its name.

    Args:
        folder: where to.
        benchmark: which.
        data: a local parquet with the official columns; None: the official data set on the hub.
        cache: where `datasets` converts local data; None: its usual place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{benchmark.task}_{'local' if data else 'official'}"
    config: dict[str, Any] = {"include": str(package() / "tasks" / benchmark.yaml), "task": name}
    if data is not None:
        # A link, since `datasets` takes brackets and stars in a path for a pattern.
        link = folder / f"{name}.parquet"
        link.unlink(missing_ok=True)
        link.symlink_to(data.resolve())
        options = {"data_files": {"test": link.name}} | ({"cache_dir": str(cache)} if cache else {})
        config |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": options, "test_split": "test"}
        # GQA's own loads its images from the hub; local data has them in its rows.
        config["process_docs"] = None
    config |= benchmark.config_overrides
    (folder / f"{name}.yaml").write_text(yaml.dump(_tagged(config), Dumper=_Dumper, sort_keys=False))
    return name


def _tagged(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tagged(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if isinstance(value, str) and value.startswith(_FUNCTION):
        return _Tagged(value.removeprefix(_FUNCTION))
    return value
