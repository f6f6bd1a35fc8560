"""No pruning at all: what every other method is compared with."""

from collections.abc import Mapping
from typing import Any

from ocvtp.methods.base import Entry, no_pruner
from ocvtp.vlms.family import Family


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> None:
    no_pruner("vanilla", pruner)


ENTRY = Entry(
    name="vanilla",
    acts="nowhere",
    needs_text=False,
    source="the unpruned model",
    random=False,
    trained=False,
    options={},
    build=_build,
)
