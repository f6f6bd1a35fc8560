"""`ocvtp.prune`: pruning on a stock Hugging Face model, in place, and off again."""

from ocvtp.pruning.handle import Handle, prune

__all__ = ["Handle", "prune"]
