"""Outputs of all stages, made up: known numbers in the layout that the stages write."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ocvtp.data.scenes import jpeg, make_scene

WHOLE = 144
BENCHMARKS = ("gqa", "mme", "pope", "textvqa")
VANILLA = {"gqa": 0.85, "mme": 1500.0, "pope": 0.9, "textvqa": 0.8}
RELATIVE = {
    ("random", 48): 90.0, ("random", 32): 82.0, ("random", 16): 70.0,
    ("oc-vtp", 48): 98.0, ("oc-vtp", 32): 95.5, ("oc-vtp", 16): 92.5,
}  # fmt: skip
QUESTIONS = 24
SEEDS = (0, 1)
ABLATED: Sequence[tuple[dict[str, Any], float]] = (
    ({"loss": "mse"}, 3.0),
    ({"layer": 10}, 0.5),
    ({"train.steps": 50}, -2.0),
    ({"train.steps": 800}, 0.0),
    ({"layer": 11, "loss": "span", "train.steps": 800}, -2.5),
)
"""Entries with other values, and how many points that loses."""
LOSS_GAIN = {"aw_mse": 0.0, "mse": -3.0}


def write_results(
    root: Path,
    *,
    losses: Sequence[str] = ("aw_mse",),
    layers: Sequence[int] = (9,),
    top_ks: Sequence[int] = (1,),
    half_width: float = 1.5,
    ablated: bool = False,
) -> Path:
    """Write everything and return the root."""
    scores: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    none = {"layer": None, "loss": None, "slots": None, "top_k": None}
    ours = [
        {"layer": layer, "loss": loss, "slots": [16, 32, 48], "top_k": k}
        for layer in layers for loss in losses for k in top_ks
    ]  # fmt: skip
    _add(root, scores, summary, "vanilla", None, none, 100.0, 0.0)
    for (method, tokens), relative in RELATIVE.items():
        for axes in ours if method == "oc-vtp" else [none]:
            worse = LOSS_GAIN.get(axes["loss"] or "", 0.0) - (axes["layer"] or 9) % 9 - 2.0 * ((axes["top_k"] or 1) - 1)
            _add(root, scores, summary, method, tokens, axes, relative + worse, half_width)
    random = {row["tokens"]: row for row in summary if row["method"] == "random"}
    for row in summary:
        if row["method"] == "oc-vtp":
            row["against"] = {"random": _paired(row, random[row["tokens"]], half_width)}
    for tokens in (48, 32, 16):
        entrants = sorted((row for row in summary if row["tokens"] == tokens and row["keep"]),
                          key=lambda row: -row["average"]["relative"])  # fmt: skip
        for place, row in enumerate(entrants, start=1):
            row["rank"] = {"rank": place, "low": max(1, place - 1), "high": place, "of": len(entrants)}
            row["hard"] = {"share": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 77}
    if ablated:
        for tokens in (48, 32, 16):
            grid = {row["method"]: row for row in summary if row["tokens"] == tokens}
            for changes, worse in ABLATED:
                axes = {**ours[0], **{path: value for path, value in changes.items() if path in ours[0]}}
                _add(root, scores, summary, "oc-vtp", tokens, axes, RELATIVE["oc-vtp", tokens] - worse, half_width,
                     changes)  # fmt: skip
                summary[-1]["difference"] = _paired(summary[-1], grid["oc-vtp"], half_width)
                summary[-1]["against"] = {"random": _paired(summary[-1], grid["random"], half_width)}
    _json(root / "results/scores.json", scores)
    _json(root / "results/summary.json", summary)
    _json(root / "results/measures.json", [_measured(row) for row in summary if row["keep"] is not None])
    _json(root / "results/efficiency.json", _efficiency())
    _json(root / "data/sample/sample.json", {"source": "scenes", "images": 2048, "seed": 0})
    for layer in layers:
        for loss in losses:
            for seed in SEEDS:
                _pruner(root, layer, loss, seed)
    _images(root / "data/sample/benchmarks/gqa.parquet")
    return root


def _add(
    root: Path,
    scores: list[dict[str, Any]],
    summary: list[dict[str, Any]],
    method: str,
    tokens: int | None,
    axes: dict[str, Any],
    relative: float,
    half: float,
    changes: dict[str, Any] | None = None,
) -> None:
    share = None if tokens is None else tokens / WHOLE
    common = {
        "vlm": "tiny-llava",
        "method": method,
        "keep": tokens,
        "tokens": tokens or WHOLE,
        "share": share,
        **axes,
        "changes": changes or {},
    }
    benchmarks = {}
    for index, name in enumerate(BENCHMARKS):
        value = relative + index if tokens else 100.0
        low, high = (value - 2 * half, value + 2 * half) if tokens else (None, None)
        score = VANILLA[name] * value / 100
        benchmarks[name] = {"score": score, "relative": value, "ci_low": low, "ci_high": high, "n": 300}
        for seed in (None,) if tokens is None else SEEDS:
            setting = "-".join(map(str, (method, tokens, *axes.values(), *(changes or {}).items(), seed)))
            path = f"results/evaluate/tiny-llava/{setting}/{name}"
            _answers(root / path, name, method, tokens, seed)
            scores.append({
                **common, "benchmark": name, "seed": seed, "score": score, "relative": value, "n": 300,
                "ci_low": None, "ci_high": None, "kept_mean": tokens or WHOLE, "metrics": {}, "path": path,
                "fingerprint": f"{axes['layer']}{axes['loss']}{seed}" + "0" * 20 if method == "oc-vtp" else None,
            })  # fmt: skip
    mean = float(np.mean([found["relative"] for found in benchmarks.values()]))
    average = {"relative": mean, "ci_low": mean - half, "ci_high": mean + half} if tokens else {"relative": 100.0}
    summary.append({
        **common, "seeds": [] if tokens is None else list(SEEDS), "benchmarks": benchmarks, "average": average,
        "difference": None, "against": {}, "coverage": None if tokens is None else _coverage(mean),
    })  # fmt: skip


def _coverage(mean: float) -> dict[str, Any]:
    return {
        size: {"share": share, "ci_low": share - 0.01, "ci_high": share + 0.01, "objects": count}
        for size, share, count in (("all", mean / 120, 900), ("small", mean / 140, 400))
    }


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """What covers more answers better, what leaves more unexplained worse; the rest says nothing."""
    good = row["average"]["relative"] / 110
    axes = {name: row[name] for name in ("vlm", "method", "keep", "tokens", "share", "layer", "loss", "slots", "top_k")}
    numbers = {"cover": good, "small": None, "span": 0.5, "span_on": 1 - good, "near": 0.1, "distinct": row["tokens"]}
    return {**axes, "changes": row["changes"], "seeds": len(SEEDS), **numbers}


def _paired(a: dict[str, Any], b: dict[str, Any], half: float) -> dict[str, float]:
    points = a["average"]["relative"] - b["average"]["relative"]
    return {"points": points, "ci_low": points - half, "ci_high": points + half}


def _answers(folder: Path, benchmark: str, method: str, tokens: int | None, seed: int | None) -> None:
    _json(folder / "score.json", {
        "benchmark": benchmark, "dtype": "float32", "attn_implementation": "sdpa",
        "prompt_template": "USER: ... ASSISTANT:", "setting": {"vlm": "tiny-llava", "revision": "0123abcd"},
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
    })  # fmt: skip
    rng = np.random.default_rng([sum(method.encode()), tokens or 0, seed or 0])
    lines = []
    for doc in range(QUESTIONS):
        kept = sorted(rng.choice(WHOLE, tokens, replace=False).tolist()) if tokens else WHOLE
        right = bool(rng.random() < 0.8)
        lines.append({
            "doc_id": doc, "unit": doc, "question": "Is there a red circle in the image?\nAnswer with one word.",
            "answer": "yes", "prediction": "yes" if right else "no", "score": float(right),
            "kept": kept, "category": "",
        })  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _efficiency() -> dict[str, Any]:
    parts = {"tower": 300_000_000, "projector": 7_000_000, "llm": 230_000_000, "lm_head": 20_000}
    vanilla = {
        "vlm": "tiny-llava", "method": "vanilla", "keep": None, "tokens": WHOLE, "share": 1.0,
        "paper_flops": 200_000_000, "paper_pruner_flops": 0,
        "flops": {**parts, "pruner": 0, "total": 537_020_000}, "kv_cache_bytes": 720_896,
    }  # fmt: skip
    less = {**parts, "llm": 60_000_000, "pruner": 9_000_000, "total": 376_020_000}
    pruned = {
        "vlm": "tiny-llava", "method": "oc-vtp", "keep": 16, "tokens": 16, "share": 16 / WHOLE,
        "layers": [16] * 4, "paper_flops": 50_000_000, "paper_pruner_flops": 8_000_000, "flops": less,
        "kv_cache_bytes": 196_608,
    }  # fmt: skip
    return {"text_tokens": 32, "rows": [vanilla, pruned]}


def _pruner(root: Path, layer: int, loss: str, seed: int) -> None:
    folder = root / f"models/tiny-llava/layer_{layer}-{loss}-slots_16_32_48-seed_{seed}"
    _json(folder / "config.json", {"layer": layer, "loss": loss, "slots": [16, 32, 48], "seed": seed})
    _json(folder / "metrics.json", {"val_loss": 0.25, "steps": 400})
    rows = ["step,lr,loss,val_loss,distinct_picks"]
    for step in range(0, 400, 10):
        loss_now = 0.2 + 0.8 * np.exp(-step / 80) + 0.01 * np.cos(step + seed)
        rows.append(
            f"{step},0.001,{loss_now:.5f},{f'{loss_now + 0.05:.5f},{12 + step / 200}' if step % 50 == 0 else ','}"
        )
    (folder / "curves.csv").write_text("\n".join(rows) + "\n")


def _images(path: Path) -> None:
    path.parent.mkdir(parents=True)
    images = [{"bytes": jpeg(make_scene(0, "benchmark", index)), "path": f"{index}.jpg"} for index in range(QUESTIONS)]
    pq.write_table(pa.table({"image": images, "question": ["?"] * QUESTIONS}), path)


def _json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
