"""Asks a VLM the questions of a benchmark, or a shard of them; scoring is another step, which needs no VLM."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ocvtp.code_digest import code_digest
from ocvtp.errors import Incompatible, NotAvailable
from ocvtp.evaluation import journal as journals
from ocvtp.evaluation import preflight
from ocvtp.evaluation.answered import Answer, Answered, Answers, Shard, digest_of
from ocvtp.evaluation.benchmarks import Benchmark
from ocvtp.evaluation.benchmarks import benchmark as named
from ocvtp.evaluation.generate import Answerer, Prepared
from ocvtp.evaluation.setting import EvaluationSetting, pruner_fingerprint, ready
from ocvtp.methods import REGISTRY, entry_of

log = logging.getLogger(__name__)
_PACKAGES = ("ocvtp", "torch", "transformers", "tokenizers", "lmms-eval", "datasets", "numpy", "pillow", "torchvision")
WHOLE = Shard()
Progress = Callable[[int, int], None]


def ask(
    setting: EvaluationSetting,
    benchmark: str,
    data: Path | None,
    *,
    shard: Shard = WHOLE,
    limit: int | None = None,
    device: str = "cpu",
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Answers of a VLM to a shard of a benchmark's questions.

    Args:
        setting: the VLM and how it is pruned.
        benchmark: a name of benchmarks.yaml.
        data: a parquet with the official columns, or a folder with `<benchmark>.parquet`; None: the official data set.
        shard: which part of the questions.
        limit: ask at most so many of the first questions; what is scored together, such as pairs, stays whole.
        device: cpu, cuda, ...
        journal: a file that each batch is added to as soon as it is answered. What it holds already is not asked again.
        progress: called with (questions answered, questions) after each batch.

    Raises:
        BadInput: unknown benchmark or method, unfit data or pruner; before the VLM is loaded where that can be known.
        Incompatible: the journal holds answers that something else made, or to other questions.
        NotAvailable: lmms-eval, the VLM or the official data set is not on this machine.
    """
    entry = named(benchmark, setting.protocol)
    preflight.check_limit(limit)
    path = None if data is None else preflight.locate(entry, data)
    if path is not None:
        preflight.check(entry, path, limit)
    entry_of(setting.method)
    fingerprint = pruner_fingerprint(setting.pruner)
    from ocvtp.evaluation.lmms.official import ALONE, opened
    from ocvtp.evaluation.lmms.tasks import package

    package()
    with ALONE, opened(entry, path) as questions:  # stays loaded: what is wrong with it is told before the VLM loads
        total = preflight.whole_units(entry, questions.units, limit)
        for row in shard.rows(total):
            questions.length(row)
    with ALONE, ready(setting, device) as answerer, opened(entry, path) as questions:
        about = {**_made_by(setting, answerer, fingerprint), "benchmark": benchmark, "data": _data(entry, path)}
        made_by = {**about, "device": answerer.device.type, "code": _code(setting.method)}
        if setting.dtype != "float32":  # in which an answer does not depend on its batch
            made_by["batch_size"] = setting.batch_size
        with nullcontext() if journal is None else journals.opened(journal, made_by) as kept:
            answered, fits = answers_to(questions, answerer, shard.rows(total), setting.batch_size, kept, progress)
    return Answers({**about, "limit": limit}, total, answered, fits)


def answers_to(
    questions: Any, answerer: Answerer, rows: Sequence[int], batch_size: int,
    journal: journals.Journal | None, progress: Progress | None,
) -> tuple[list[Answered], int]:  # fmt: skip
    """Answers to these rows, in their order: what the journal has, and the others batch by batch.

    A batch that does not fit into memory is halved, and so are those behind it: at most once for each power of two,
    also over several runs that share a journal. Returns with the answers the batch size in the end.

    Raises:
        Incompatible: the journal answers another question than that of its row.
        BadInput: a question cannot be read.
        NotAvailable: one question alone does not fit into memory.
    """
    found: dict[int, Answered] = {}
    if journal is not None:
        batch_size = min(batch_size, journal.fits or batch_size)
        found = {row: journal.known[row] for row in rows if row in journal.known}
        for row, one in found.items():
            if one.digest != digest_of(questions.messages(row)):
                raise Incompatible(
                    f"{journal.path}: question {row} of {questions.benchmark.name} is not the one that was answered: "
                    "its data has changed"
                )
    # Questions of one length stand together, so that little is padded; the same order for every setting.
    left = sorted((row for row in rows if row not in found), key=questions.length)
    while left:
        batch, left = left[:batch_size], left[batch_size:]
        make = partial(_prepared, questions, answerer, batch)
        prepared = answerer.prepared.get((questions.stamp, *batch), make)
        answers = _if_they_fit(answerer, prepared, questions.options)
        if answers is None:
            if len(batch) == 1:
                raise NotAvailable(f"question {batch[0]} of {questions.benchmark.name} alone needs more memory")
            batch_size, left = (len(batch) + 1) // 2, batch + left
            log.warning("%d questions at once need more memory than there is: %d from here on", len(batch), batch_size)
            if journal is not None:
                journal.note_fit(batch_size)
            continue
        new = [
            Answered(row, digest, answer) for row, digest, answer in zip(batch, prepared.digests, answers, strict=True)
        ]
        if journal is not None:
            journal.add(new)
        found |= {one.row: one for one in new}
        questions.heard(progress, len(found), len(rows))
    return [found[row] for row in rows], batch_size


def _if_they_fit(answerer: Answerer, batch: Prepared, options: Mapping[str, Any]) -> list[Answer] | None:
    """Answers to a batch; None if there is not memory enough for it, which is then free again."""
    try:
        return answerer.answer_prepared(batch, options)
    except torch.OutOfMemoryError:
        pass  # with the error goes what filled the memory: its frames hold that
    torch.cuda.empty_cache()
    return None


def _prepared(questions: Any, answerer: Answerer, rows: Sequence[int]) -> Prepared:
    return answerer.prepare([questions.messages(row) for row in rows])


def _made_by(setting: EvaluationSetting, answerer: Answerer, fingerprint: str | None) -> dict[str, Any]:
    """All but the questions that determines the answers."""
    vlm, name = answerer.vlm, setting.vlm
    return {
        "setting": {
            "vlm": Path(name).name if Path(name).is_dir() else name,
            "revision": vlm.revision or None,
            "weights": vlm.weights,
            "method": setting.method,
            "keep": setting.keep,
            "seed": setting.seed,
            "options": dict(setting.options),
            "fingerprint": fingerprint,
            "max_new_tokens": setting.max_new_tokens,
        },
        "protocol": setting.protocol,
        "conversation": answerer.conversation,
        "prompt_template": answerer.prompt_template,
        "dtype": setting.dtype,
        "attn_implementation": vlm.model.config._attn_implementation,
        "image_backend": _image_backend(vlm.processor.image_processor),
        "grid": None if vlm.entry.grid is None else list(vlm.entry.grid),
        "versions": _versions(),
    }


def _code(method: str) -> str:
    """Of asking, pruning and the method, which the register finds by itself. The store's keys hold as much.

    In a journal alone: of one and the same answers it does not matter which code gave them.
    """
    return code_digest([__name__, *REGISTRY.modules(method).values()])


def _image_backend(processor: Any) -> str:
    """Which library resizes images: the two differ in the last digits of a pixel."""
    return "pil" if type(processor).__name__.endswith("Pil") or find_spec("torchvision") is None else "torchvision"


def _data(entry: Benchmark, path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {"hub": entry.hub, "config": entry.config, "split": entry.split}
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
