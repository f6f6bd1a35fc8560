"""Stage `efficiency`: what a prefill costs with each method and budget. Writes `results/efficiency.json`.

Closed forms: nothing is loaded or run. Where images have different numbers of tokens, the one that is counted is in the
middle, by tokens, of the first that were sampled (`efficiency.image_tokens: auto`), or has the number that is given.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ocvtp.efficiency.flops import kv_cache_bytes, paper_llm_flops, paper_pruner_flops, prefill_flops, pruner_flops
from ocvtp.efficiency.shapes import VlmShape, shape_of
from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY
from ocvtp.methods.budget import Budget
from ocvtp.methods.inside_tower import OPTION, begins
from ocvtp.vlms import CatalogEntry, resolve
from ocvtp.vlms.loading import ImageShape, image_shapes
from pipelines.grid import VANILLA
from pipelines.params.fitting import lacking
from pipelines.stage import command, outputs
from pipelines.stage.context import Stage
from pipelines.stage.dry_run import Plan

WITH_PRUNER = ("oc-vtp", "oc-vtp-untrained")
SAMPLED = 256
"""Images whose tokens are counted to find the one in the middle."""
log = logging.getLogger(__name__)


def work(run: Stage) -> None:
    """Count, and write the output."""
    rows = _rows(run)
    text_tokens = run.params.efficiency.text_tokens
    outputs.write_json(run.root / outputs.RESULTS / "efficiency.json", {"text_tokens": text_tokens, "rows": rows})


def plan(run: Stage) -> Plan:
    """What it would count."""
    return Plan([], last=[f"no tasks: {len(_rows(run))} rows are counted here, whenever the stage runs"])


def _rows(run: Stage) -> list[dict[str, Any]]:
    return [row for name in run.params.vlm for row in rows_of(run, resolve(name))]


def rows_of(run: Stage, vlm: CatalogEntry) -> list[dict[str, Any]]:
    """One row for the unpruned model, and one for each method that has a meaning on it, budget and top_k."""
    from transformers import AutoConfig

    params = run.params
    shape = shape_of(AutoConfig.from_pretrained(vlm.folder))
    whole = _image(run, vlm)
    rows: list[dict[str, Any] | None] = [_row(run, vlm, shape, whole, VANILLA, None)]
    for name in params.method:
        if name != VANILLA and not lacking(REGISTRY[name], vlm, params.evaluate.options.get(name, {})):
            top_ks = params.top_k if "top_k" in REGISTRY[name].options else (None,)
            rows += [_row(run, vlm, shape, whole, name, keep, top_k) for keep in params.keep for top_k in top_ks]
    return [row for row in rows if row is not None]


def _image(run: Stage, vlm: CatalogEntry) -> ImageShape:
    """The image that is counted."""
    asked = run.params.efficiency.image_tokens
    if vlm.tokens is not None or asked != "auto":
        return ImageShape(vlm.tokens or int(asked), None, None)
    images = run.sampled_images()[:SAMPLED]
    files: dict[Path, dict[str, str]] = {}
    for image in images:
        path = Path(image["path"])
        files.setdefault(run.store.root / path.parts[0] / path.parts[1], {})["/".join(path.parts[2:])] = image["sha256"]
    run.require(files, "sample")
    sizes = []
    for image in images:
        with Image.open(run.store.root / image["path"]) as opened:
            sizes.append(opened.size)
    return sorted(image_shapes(vlm, sizes), key=lambda image: image.tokens)[len(sizes) // 2]


def _row(
    run: Stage,
    vlm: CatalogEntry,
    shape: VlmShape,
    image: ImageShape,
    method: str,
    keep: Budget | None,
    top_k: int | None = None,
) -> dict[str, Any] | None:
    """None where the method cannot keep so few tokens."""
    whole = image.tokens
    kept = whole if keep is None else keep.tokens(whole)
    text_tokens, llm, entry = run.params.efficiency.text_tokens, shape.llm, REGISTRY[method]
    pruner = _pruner(run, vlm, whole, kept, top_k or 1) if method in WITH_PRUNER else 0
    try:
        layers = entry.by_layer(whole, kept, vlm.llm_layers, run.params.evaluate.options.get(method, {}))
    except BadInput as error:
        log.warning("efficiency: no row for %s with keep %s on %s: %s", method, keep and keep.written, vlm.name, error)
        return None
    read = [tokens + text_tokens for tokens in layers]
    flops = prefill_flops(
        shape, image_tokens=whole, kept=layers, text_tokens=text_tokens, pruner=pruner, text_asks=entry.text_asks,
        tiles=image.tiles, grid=image.grid, inside_tower=_inside_tower(run, vlm, method),
    )  # fmt: skip
    return {
        "vlm": vlm.name,
        "method": method,
        "keep": None if keep is None else keep.written,
        "tokens": kept,
        "share": kept / whole,
        "top_k": top_k,
        "layers": layers,
        "paper_flops": paper_llm_flops(read, width=llm.width, layers=llm.layers, mlp=llm.mlp),
        "paper_pruner_flops": paper_pruner_flops(whole, vlm.width) if method in WITH_PRUNER else 0,
        "flops": flops.as_dict(),
        "kv_cache_bytes": kv_cache_bytes(llm, read),
    }


def _inside_tower(run: Stage, vlm: CatalogEntry, method: str) -> int | None:
    """The layer of the tower from which on kept tokens are alone in it; None of a method that prunes after it."""
    given = run.params.evaluate.options.get(method, {})
    found = begins(REGISTRY[method], given, vlm.facts.depth)
    if found is None and given.get(OPTION):
        log.warning("efficiency: %s is counted with all of the tower: evaluate.options names no layer for it", method)
    return found


def _pruner(run: Stage, vlm: CatalogEntry, whole: int, kept: int, top_k: int) -> int:
    """Of the pruner that params.yaml describes, with the slots that this budget takes."""
    config = run.params.train.pruner_config(vlm.width, vlm.grid)
    return pruner_flops(
        whole,
        vlm.width,
        config.max_slots or max(1, (kept + config.extra_slot) // top_k),
        slot_dim=config.slot_dim,
        hidden=config.hidden_dim,
        ffn=config.ffn_dim,
        iterations=config.iterations,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return command.main("efficiency", __doc__ or "", work, plan, arguments)


if __name__ == "__main__":
    command.script("pipelines.efficiency")
