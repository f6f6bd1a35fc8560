"""One call of lmms-eval: one benchmark, one VLM that is loaded and pruned already."""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput, NotAvailable, OcvtpError
from ocvtp.evaluation.benchmarks import Benchmark
from ocvtp.evaluation.generate import Answerer
from ocvtp.evaluation.lmms.outcome import image_tokens, metrics_of, primary_of, samples_of
from ocvtp.evaluation.lmms.quiet import aloud, aside, import_lmms_eval, sandbox
from ocvtp.evaluation.lmms.tasks import write_task


@dataclass(frozen=True)
class Scored:
    """Of one benchmark: lmms-eval's metrics, its primary number, our lines of samples.jsonl, tokens kept an image."""

    metrics: dict[str, Any]
    primary: float
    samples: list[dict[str, Any]]
    image_tokens: list[int]


def ask(
    benchmark: Benchmark,
    answerer: Answerer,
    *,
    data: Path | None,
    batch_size: int,
    limit: int | None = None,
    progress: Any = None,
) -> Scored:
    """Ask all questions of a benchmark, or the first `limit`, and have lmms-eval score the answers.

    Raises:
        BadInput: a question cannot be read.
        NotAvailable: the official data set is neither here nor to be had.
    """
    with tempfile.TemporaryDirectory(prefix="ocvtp-evaluate-") as name, aside() as streams:
        import_lmms_eval()
        folder = Path(name)
        with sandbox(folder / "cache", offline=data is not None):
            task = write_task(folder / "tasks", benchmark, data, folder / "cache")
            model = _model(answerer, batch_size, progress, streams)
            results = _evaluate(benchmark, model, task, folder, limit)
            metrics = metrics_of(results["results"][task])
            samples = samples_of(benchmark, results["samples"][task], model.answers, task)
            kept = image_tokens(model.answers.values())
            return Scored(metrics, primary_of(benchmark, metrics), samples, kept)


def _model(answerer: Answerer, batch_size: int, progress: Any, streams: Any) -> Any:
    from ocvtp.evaluation.lmms.adapter import OcvtpModel

    def heard(done: int, total: int) -> None:
        with aloud(streams):
            progress(done, total)

    return OcvtpModel.around(answerer, batch_size, heard if progress else None)


def _evaluate(benchmark: Benchmark, model: Any, task: str, folder: Path, limit: int | None) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from tenacity import RetryError

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False, model_name="ocvtp")
    # Submission files and the like go to the temporary folder; documents are scored without decoding images again.
    arguments = argparse.Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None)
    try:
        found: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            batch_size=model.batch_size,
            device=str(model.device),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            cli_args=arguments,
            # Some tasks draw where an answer cannot be read: in one thread, from a fixed seed, always the same.
            process_docs_parallel=1,
            random_seed=0,
            numpy_random_seed=None,
            torch_random_seed=None,
            distributed_executor_backend="torchrun",
        )
    except RetryError as error:
        raise _cause(benchmark, error) from error
    return found


def _cause(benchmark: Benchmark, error: Any) -> OcvtpError:
    """lmms-eval tries five times and then hides the reason: what it was."""
    reason = error.last_attempt.exception()
    if isinstance(reason, ConnectionError | FileNotFoundError):
        return NotAvailable(
            f"the data set of {benchmark.name} ({benchmark.hub}) is not here and cannot be fetched: {reason}. "
            f"`ocvtp prefetch {benchmark.name}` gets it where there is a network"
        )
    return BadInput(f"lmms-eval failed on {benchmark.name} ({benchmark.task}): {type(reason).__name__}: {reason}")
