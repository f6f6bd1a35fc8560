"""Vision language models: families, loading, the catalogue."""

from ocvtp.vlms.catalogue import CatalogEntry, catalog, resolve
from ocvtp.vlms.families import family_of
from ocvtp.vlms.images import Images
from ocvtp.vlms.loading import VLM, load

__all__ = ["VLM", "CatalogEntry", "Images", "catalog", "family_of", "load", "resolve"]
