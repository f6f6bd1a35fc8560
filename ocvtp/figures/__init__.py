"""Every picture: kept tokens and slots over an image, accuracy against tokens kept, training curves, phases of time.

All functions take plain arrays and dicts and return the bytes of a PNG or an SVG, equal for equal input: no
date, no name of a program, no random id. An SVG has text as text, and `INK`, `RULE` and `COLORS` in it stand where a
page may put colours of its own.
"""

from ocvtp.figures.charts import COLORS, STANDING, Series, accuracy, curves, looks, phases, times
from ocvtp.figures.style import INK, RULE, Format
from ocvtp.figures.tokens import Fit, Panel, kept_mask, kept_tokens, padded

__all__ = [
    "COLORS",
    "INK",
    "RULE",
    "STANDING",
    "Fit",
    "Format",
    "Panel",
    "Series",
    "accuracy",
    "curves",
    "kept_mask",
    "kept_tokens",
    "looks",
    "padded",
    "phases",
    "times",
]
