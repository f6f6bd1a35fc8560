"""Which methods there are: those of this package, those of others, and any two of them one after the other.

Each module of this package that says `ENTRY`, or `ENTRIES`, adds methods. Other packages add theirs by an entry point
of the group `ocvtp.methods`, which names an `Entry` or several. `visionzip+fastv` is the first before the LLM and the
second inside it (`ocvtp.methods.combined`).
"""

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from ocvtp.errors import BadInput
from ocvtp.methods.base import Entry, Method, nearest, no_pruner
from ocvtp.methods.combined import combined
from ocvtp.methods.inside import Inside
from ocvtp.vlms.family import Family

GROUP = "ocvtp.methods"
AUTHORS = "-authors"
_REFERENCE = {"budget": "reference"}
_ORDER = ("nowhere", "before the LLM", "inside the LLM")


class Registered(NamedTuple):
    """A method, the module that its code is in, and who brought it."""

    entry: Entry
    module: str
    owner: str


class Register(Mapping[str, Entry]):
    """Methods by name: first the unpruned model, then those before the LLM, then those inside it, each by the alphabet.

    What other packages bring is loaded when the first method is looked up. Pairs such as `visionzip+fastv` can be
    looked up but are not listed. Of a method inside the LLM that has the option `budget` there is a second one,
    `fastv-authors`, with `budget="reference"`: it keeps what its authors' setting of that number keeps, whatever the
    layers then truly read, and stands in tables beside the one of equal cost.
    """

    def __getitem__(self, name: str) -> Entry:
        """`KeyError` for an unknown name; `BadInput` for a pair that cannot be."""
        first, plus, second = str(name).partition("+")
        if plus and first in self._all and second in self._all:
            return combined(self[first], self[second])
        return self._all[name].entry

    def __contains__(self, name: object) -> bool:
        """Whether a method has the name, or is such a pair."""
        parts = str(name).split("+")
        return isinstance(name, str) and len(parts) <= 2 and all(part in self._all for part in parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def modules(self, name: str) -> dict[str, str]:
        """The module that the code of a method is in, by its name; of a pair both, and what makes one of them."""
        parts = name.split("+")
        found = {part: self._all[part].module for part in parts}
        return {**found, "+": combined.__module__} if len(parts) > 1 else found

    @cached_property
    def _all(self) -> dict[str, Registered]:
        found: dict[str, Registered] = {}
        single = [*_own(), *_of_others()]
        for one in (*single, *filter(None, map(_as_authors_count, single))):
            before = found.setdefault(one.entry.name, one)
            if before is not one:
                raise BadInput(
                    f"two methods have the name {one.entry.name!r}: that of {before.owner} and that of {one.owner}; "
                    "uninstall one of them, or have its package choose another name"
                )
        ordered = sorted(found.values(), key=lambda one: (_ORDER.index(one.entry.acts), one.entry.name))
        return {one.entry.name: one for one in ordered}


REGISTRY = Register()


def entry_of(name: str | Method) -> Entry:
    """The method of a name, `BadInput` offers the nearest; or an entry made for a method that is given itself."""
    if isinstance(name, Method):
        return _of_instance(name)
    if name not in REGISTRY:
        raise BadInput(f"no method {name!r}{nearest(str(name), REGISTRY)}")
    return REGISTRY[name]


def describe() -> list[dict[str, Any]]:
    """Of each method its name, where it acts, whether it reads the prompt, its source, and what it does without CLS."""
    return [
        {"name": e.name, "acts": e.acts, "needs_text": e.needs_text, "source": e.source, "without_cls": e.without_cls}
        for e in REGISTRY.values()
    ]


def _of_instance(method: Method) -> Entry:
    """An entry for a method that is given itself."""

    def build(family: Family, pruner: Any, options: Any) -> Method:
        no_pruner(name, pruner)
        return method

    name, inside = method.name or type(method).__name__, isinstance(method, Inside)
    return Entry(
        name=name,
        build=build,
        source="given to ocvtp.prune",
        acts="inside the LLM" if inside else "before the LLM",
        needs_text=inside or method.needs_text,
        random=method.random,
        positions=method.positions if isinstance(method, Inside) else "compact",
    )


def _as_authors_count(one: Registered) -> Registered | None:
    """The second entry of a method inside the LLM; None of others."""
    entry = one.entry
    if entry.acts != "inside the LLM" or "budget" not in entry.options:
        return None
    per_layer = entry.per_layer
    made = replace(
        entry,
        name=f"{entry.name}{AUTHORS}",
        source=f"{entry.source}, budgets as its authors count",
        options={option: value for option, value in entry.options.items() if option != "budget"},
        build=lambda family, pruner, options: entry.build(family, pruner, {**options, **_REFERENCE}),
        per_layer=None
        if per_layer is None
        else lambda tokens, keep, depth, options: per_layer(tokens, keep, depth, {**options, **_REFERENCE}),
    )
    return one._replace(entry=made)


def _own() -> Iterator[Registered]:
    for module in pkgutil.iter_modules(import_module(__package__).__path__):
        loaded = import_module(f"{__package__}.{module.name}")
        entries = getattr(loaded, "ENTRIES", None) or (getattr(loaded, "ENTRY", None),)
        yield from (Registered(entry, loaded.__name__, "ocvtp") for entry in entries if entry is not None)


def _of_others() -> Iterator[Registered]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        owner = point.dist.name if point.dist is not None else point.module
        where = f"entry point {point.name} = {point.value} of {owner} (group {GROUP})"
        try:
            loaded = point.load()
        except Exception as error:
            raise BadInput(
                f"{where} cannot be loaded: {type(error).__name__}: {error}; mend or uninstall it"
            ) from error
        entries = loaded if isinstance(loaded, list | tuple) else (loaded,)
        for entry in entries:
            if not isinstance(entry, Entry):
                raise BadInput(f"{where} is a {type(entry).__name__}: an ocvtp.methods.Entry, or a tuple, is needed")
            if "+" in entry.name or not entry.name.strip():
                raise BadInput(f"{where} has the name {entry.name!r}: it may neither be empty nor have a + in it")
            if entry.acts not in _ORDER:
                raise BadInput(f"{where} acts {entry.acts!r}: one of {', '.join(_ORDER)} is needed")
            yield Registered(entry, point.module, owner)
