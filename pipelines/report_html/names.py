"""How methods, benchmarks, losses and numbers are written for people."""

from typing import Any

DASH = "–"
"""What stands for a missing result: never 0."""
METHODS = {
    "vanilla": "Vanilla",
    "random": "Random",
    "oc-vtp": "OC-VTP",
    "oc-vtp-untrained": "OC-VTP, untrained",
    "qr": "Pivoted QR",
    "css": "Column subset",
    "fps": "Farthest point",
    "medoids": "Medoids",
    "visionzip": "VisionZip",
    "hiprune": "HiPrune",
    "downsample": "Downsample",
    "fastv": "FastV",
    "sparsevlm": "SparseVLM",
    "pyramiddrop": "PyramidDrop",
    "trim": "TRIM",
    "tome": "ToMe",
    "scope": "SCOPE",
    "prunesid": "PruneSID",
    "holov": "HoloV",
    "promprune": "PromPrune",
    "cdpruner": "CDPruner",
    "cdpruner-no-text": "CDPruner, no text",
    "divprune": "DivPrune",
    "vispruner": "VisPruner",
    "vscan": "VScan",
    "vscan-before": "VScan, before the LLM",
    "dart": "DART",
    "autoprune": "AutoPrune",
    "sparsevlm-plus": "SparseVLM+",
}
BENCHMARKS = {
    "gqa": "GQA",
    "mmbench": "MMB",
    "mme": "MME",
    "pope": "POPE",
    "scienceqa": "SQA",
    "textvqa": "TextVQA",
    "vqav2": "VQAv2",
    "vizwiz": "VizWiz",
    "mmmu": "MMMU",
    "seedbench": "SEED",
}
LOSSES = {"mse": "MSE", "aw_mse": "AW-MSE", "span": "span", "answers": "answers", "masks": "masks"}
CURVES = {
    "loss": "training loss",
    "val_loss": "validation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "val_mse": "validation, plain squared error",
    "distinct_picks": "distinct picks before filling",
    "kept_to_random": "variance left unexplained by kept tokens / by random ones",
    "span_error": "share of variance left unexplained by kept tokens",
    "handed_on_to_random": "the same of the layer that goes to the LLM",
    "prototype_error": "cosine distance to the nearest kept token",
    "kl": "divergence of answers",
    "cover": "objects with a kept token",
}
RATIOS = {
    "kept_to_random": ("span_error", "random_span_error"),
    "handed_on_to_random": ("handed_on_span_error", "random_handed_on_span_error"),
}
"""Curves that are ratios of two others."""


def method(name: str) -> str:
    """A method's name; of a pair, of both."""
    if name in METHODS:
        return METHODS[name]
    if "+" in name:
        return " + ".join(map(method, name.split("+")))
    single = name.removesuffix("-authors")
    return f"{METHODS.get(single, single)}, as its authors count" if single != name else name


def benchmark(name: str) -> str:
    """A benchmark's name as in the paper's tables."""
    return BENCHMARKS.get(name, name)


def percent(value: float | None) -> str:
    """`97.5%`, or a dash."""
    return DASH if value is None else f"{value:.1f}%"


def interval(low: float | None, high: float | None) -> str:
    """`[95.9, 98.6]`, or nothing."""
    return "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]"


def budget(tokens: float | None, share: float | None, *, whole: bool = False) -> str:
    """`48 Tokens (33.3%)`, or `33.3% Tokens` where images have different numbers of tokens."""
    part = "100%" if whole else DASH if share is None else f"{100 * share:.1f}%"
    return f"{part} Tokens" if tokens is None else f"{tokens:g} Tokens ({part})"


def flops(value: float | None) -> str:
    """`8.46 T`, or a dash."""
    if value is None:
        return DASH
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes: `318.8 MB`, or a dash."""
    if value is None:
        return DASH
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= unit_bytes:
            return f"{value / unit_bytes:.1f} {unit}"
    return f"{value:.0f} B"


def plain(value: Any) -> str:
    """A value of a JSON file in one line: lists with commas, null as a dash."""
    if value is None:
        return DASH
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
