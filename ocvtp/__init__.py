"""Object-Centric Vision Token Pruning for vision language models.

`prune(model, method=..., keep=...)` prunes a stock Hugging Face model; `OCPruner` is the trained pruner; `results()` is
everything that was evaluated, as a data frame.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ocvtp.evaluation.results import results
    from ocvtp.pruner.model import OCPruner
    from ocvtp.pruning import Handle, prune

__version__ = "0.1.0"
__all__ = ["Handle", "OCPruner", "__version__", "prune", "results"]
_HOMES = {
    "prune": "ocvtp.pruning",
    "Handle": "ocvtp.pruning",
    "OCPruner": "ocvtp.pruner.model",
    "results": "ocvtp.evaluation.results",
}


def __getattr__(name: str) -> Any:
    """Heavy parts are imported when they are first used."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
