"""What the entry `ocvtp` of a served model's config says: which method, how many tokens, which pruner.

An engine sizes prompts before it looks at images, and looks at an image once for all prompts. So the number of tokens
that stay must follow from the number of tokens there are, and the choice from the image alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY, Budget, Entry, Method, entry_of, options_of
from ocvtp.methods.base import nearest
from ocvtp.vlms.families import family_class
from ocvtp.vlms.family import Family

SECTION = "ocvtp"
"""The entry of a model's config."""
_OWN = ("method", "keep", "pruner", "seed")
_FEWER = "may keep fewer tokens than it is asked for, but an engine counts them before it looks at an image"


@dataclass(frozen=True)
class Setting:
    """How a served model is pruned.

    Attributes:
        entry: of the method.
        budget: tokens of an image that stay.
        pruner: for `oc-vtp`: a folder in the model's, else one from the working directory, else an id on the hub.
        seed: of methods with randomness.
        options: of the method.
    """

    entry: Entry
    budget: Budget
    pruner: str | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Any) -> "Setting | None":
        """From a model's config; None where it has no such entry.

        Raises:
            BadInput: an entry that is wrong, or a method that no engine can serve; says why.
        """
        given = getattr(config, SECTION, None)
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise BadInput(f'{SECTION} is {given!r}: {{"method": "css", "keep": 64}} or the like is needed')
        for key in ("method", "keep"):
            if given.get(key) is None:
                raise BadInput(f'{SECTION} has no {key}: {{"method": "css", "keep": 64}} or the like is needed')
        entry = entry_of(given["method"])
        seed, pruner = given.get("seed", 0), given.get("pruner")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise BadInput(f"{SECTION}: seed is {seed!r}: a whole number is needed")
        if pruner is not None and not isinstance(pruner, str):
            raise BadInput(f"{SECTION}: pruner is {pruner!r}: a folder or an id on the hub is needed")
        for key in given:
            if key not in _OWN and key not in entry.options:
                raise BadInput(f"{SECTION} has no entry {key!r}{nearest(key, (*_OWN, *entry.options))}")
        _refuse(entry)
        options = {key: value for key, value in given.items() if key not in _OWN}
        for key, value in options.items():
            if value in entry.loses.get(key, ()):
                raise BadInput(f"{entry.name} with {key}={value!r} {_FEWER}: leave the option out")
        return cls(entry, Budget.parse(given["keep"]), pruner, seed, options)

    def check(self, architecture: str, config: Any) -> None:
        """`BadInput` for a VLM that is not supported, and for more tokens than each of its images has."""
        facts = family_class(architecture, _name(config)).facts_of(config)
        if facts.tokens is not None:
            self.budget.tokens(facts.tokens)

    def pruner_of(self, weights: str | Path) -> str | None:
        """Where the pruner is, or its id on the hub; `weights` is the folder of the model, or its id."""
        if self.pruner is None:
            return None
        beside = Path(weights) / self.pruner
        return str(beside) if beside.is_dir() else self.pruner

    def build(self, family: Family) -> Method:
        """The method for a loaded VLM.

        Raises:
            BadInput, Incompatible, NotAvailable: as `ocvtp.prune`.
        """
        pruner = self.pruner_of(getattr(family.model.config, "name_or_path", ""))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # engines set that of the model, in which no pruner is drawn
        try:
            with torch.device("cpu"):
                built = self.entry.build(family, pruner, options_of(self.entry, self.options))
        finally:
            torch.set_default_dtype(before)
        assert built is not None  # noqa: S101 - `_refuse` has seen to that
        if built.fewer and not self.entry.loses:
            raise BadInput(f"{self.entry.name} {_FEWER}, and its entry does not say with which options (`loses`)")
        built.name = built.name or self.entry.name
        return built


def family_in(architecture: str, config: Any, module: Any) -> Family:
    """The adapter of a VLM whose tower and projector lie in some module, under the names of transformers."""
    return family_class(architecture, _name(config))(SimpleNamespace(config=config, model=module))


def _name(config: Any) -> str:
    return str(getattr(config, "name_or_path", "") or "this model")


def _refuse(entry: Entry) -> None:
    """`BadInput` for methods that no engine can serve."""
    before = [name for name, each in REGISTRY.items() if each.acts == "before the LLM" and not each.needs_text]
    why = None
    if entry.acts == "nowhere":
        why = f"prunes nothing: leave {SECTION} out of the model's config"
    elif entry.acts == "inside the LLM":
        why = "drops tokens between layers of the LLM, where an engine lets nobody in: its caches have one length"
    elif entry.needs_text:
        why = "reads the prompt, but an engine looks at an image once, for all prompts that hold it"
    if why is not None:
        raise BadInput(f"{entry.name} cannot be served, for it {why}. What can: {', '.join(before)}")
