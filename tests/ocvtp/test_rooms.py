"""ocvtp stays easy to find one's way in: small folders, and one meaning a file name."""

from collections import defaultdict
from pathlib import Path

import ocvtp

ROOT = Path(ocvtp.__file__).parent
COMMAND_OF = {"flops", "latency"}
"""`ocvtp.commands` has a file by the name of what a command runs."""


def test_no_folder_has_more_than_fifteen_modules() -> None:
    modules = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    assert len(modules) > 80
    folders = defaultdict(list)
    for path in modules:
        folders[path.parent.relative_to(ROOT).as_posix()].append(path.stem)
    del folders["methods"]  # one file a method
    assert {folder: len(names) for folder, names in folders.items() if len(names) > 15} == {}


def test_no_file_name_has_two_meanings() -> None:
    places = defaultdict(list)
    for path in ROOT.rglob("*.py"):
        places[path.stem].append(path.relative_to(ROOT).as_posix())
    twice = {name: sorted(found) for name, found in places.items() if len(found) > 1 and name != "__init__"}
    assert set(twice) == COMMAND_OF, twice
