"""Pruning methods, one file each, behind one small interface."""

from ocvtp.methods.base import Encoded, Entry, Kept, Method, options_of
from ocvtp.methods.budget import Budget, Keep
from ocvtp.methods.register import REGISTRY, describe, entry_of

__all__ = ["REGISTRY", "Budget", "Encoded", "Entry", "Keep", "Kept", "Method", "describe", "entry_of", "options_of"]
