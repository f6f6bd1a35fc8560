"""Vision language models: families, loading, the catalogue."""

from ocvtp.vlms.base import VLM, Entry, catalog, family_of, load, resolve
from ocvtp.vlms.images import Images

__all__ = ["VLM", "Entry", "Images", "catalog", "family_of", "load", "resolve"]
