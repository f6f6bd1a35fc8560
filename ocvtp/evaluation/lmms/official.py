"""The questions of a benchmark, as lmms-eval's official task has them: loaded once, asked and scored many times."""

import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ocvtp.errors import BadInput, NotAvailable, OcvtpError
from ocvtp.evaluation.benchmarks import Benchmark
from ocvtp.evaluation.lmms.quiet import aloud, aside, import_lmms_eval, sandbox
from ocvtp.evaluation.lmms.tasks import write_task

Progress = Callable[[int, int], None]
ALONE = threading.RLock()
"""lmms-eval has settings of the whole process: one thread at a time asks or scores."""
_KEPT: dict[tuple[Any, ...], Any] = {}
_MOST = 16
"""Sets that stay loaded: more than there are benchmarks."""


@dataclass(frozen=True)
class Questions:
    """Of one benchmark.

    Attributes:
        benchmark: which.
        task: of lmms-eval.
        stamp: equal where the questions are, within one process.
        folder: for what official functions write; it goes when `opened` ends.
        streams: standard output and error as they were.
    """

    benchmark: Benchmark
    task: Any
    stamp: Hashable
    folder: Path
    streams: tuple[TextIO, TextIO]

    def __len__(self) -> int:
        return len(self.task.eval_docs)

    @property
    def options(self) -> Mapping[str, Any]:
        """How the official task wants answers to be generated."""
        return dict(self.task.config.generation_kwargs or {})

    @property
    def where(self) -> str:
        """Where they come from, for messages."""
        config = self.task.config
        return f"{config.task} ({config.test_split})"

    @property
    def units(self) -> list[int | str]:
        """Of each question what may not be torn apart, without looking at images."""
        docs = self.task.eval_docs_no_media
        if not self.benchmark.paired:
            return list(range(len(docs)))
        return [self._of(row, self.benchmark.unit_of, doc, row) for row, doc in enumerate(docs)]

    def length(self, row: int) -> int:
        """Letters of a question, without looking at its images. `BadInput` if it cannot be read."""
        return len(str(self._of(row, self.task.doc_to_text, self.task.eval_docs_no_media[row])))

    def _of(self, row: int, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except Exception as error:  # the official functions raise whatever they come across
            what = f"{type(error).__name__}: {error}"
            raise BadInput(f"question {row} of {self.where} cannot be read: {what}") from error

    def messages(self, row: int) -> Any:
        """The question of a row as chat messages; its images are decoded here. `BadInput` if it cannot be read."""
        return messages_of(self.task.doc_to_messages, self.task.eval_docs, row, self.where)

    def heard(self, progress: Progress | None, done: int, total: int) -> None:
        """Call `progress` where it may print."""
        if progress is not None:
            with aloud(self.streams):
                progress(done, total)


def messages_of(to_messages: Callable[[Any], Any], docs: Any, row: int, where: str) -> Any:
    """One question of a data set as chat messages; `BadInput` if it cannot be read."""
    try:
        return to_messages(docs[row])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise BadInput(f"question {row} of {where} cannot be read: {error}") from error


@contextmanager
def opened(benchmark: Benchmark, data: Path | None) -> Iterator[Questions]:
    """The questions of a benchmark; within the `with` lmms-eval prints nothing and has the process to itself.

    A data set is read once a process; those used last stay.

    Args:
        benchmark: which.
        data: a local parquet with the official columns; None: the official data set.

    Raises:
        NotAvailable: the official data set is neither here nor to be had.
    """
    with ALONE, tempfile.TemporaryDirectory(prefix="ocvtp-evaluate-") as name, aside() as streams:
        import_lmms_eval()
        folder = Path(name)
        with sandbox(folder / "cache", offline=data is not None):
            stamp = _stamp(benchmark, data)
            yield Questions(benchmark, _kept(benchmark, data, stamp, folder), stamp, folder, streams)


def _stamp(benchmark: Benchmark, data: Path | None) -> tuple[Hashable, ...]:
    if data is None:
        return (benchmark.name, benchmark.protocol)
    about = data.stat()
    return (benchmark.name, benchmark.protocol, data, about.st_ino, about.st_mtime_ns, about.st_size)


def _kept(benchmark: Benchmark, data: Path | None, stamp: tuple[Hashable, ...], folder: Path) -> Any:
    """The task, loaded once; of a local file as long as it stays as it is. Those used last are kept."""
    # What `datasets` converts stays mapped when its file goes with the folder.
    task = _KEPT.pop(stamp) if stamp in _KEPT else _load(benchmark, data, folder)
    _KEPT[stamp] = task
    while len(_KEPT) > _MOST:
        _KEPT.pop(next(iter(_KEPT)))
    return task


def _load(benchmark: Benchmark, data: Path | None, folder: Path) -> Any:
    from lmms_eval.tasks import TaskManager, get_task_dict
    from tenacity import RetryError

    name = write_task(folder / "tasks", benchmark, data, folder / "cache")
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False, model_name="ocvtp")
    try:
        return get_task_dict([name], manager, "chat")[name]
    except RetryError as error:
        raise cause_of(benchmark, error) from error


def cause_of(benchmark: Benchmark, error: Any) -> OcvtpError:
    """lmms-eval tries five times and then hides the reason: what it was."""
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError  # the latter of gated ones, too

    reason = error.last_attempt.exception()
    if isinstance(reason, ConnectionError | FileNotFoundError | LocalTokenNotFoundError | RepositoryNotFoundError):
        return NotAvailable(
            f"the data set of {benchmark.name} ({benchmark.hub}) is not here and cannot be fetched: {reason}. "
            f"`ocvtp prefetch {benchmark.name}` gets it where there is a network"
        )
    chain = [reason, reason.__cause__] if reason.__cause__ else [reason]
    what = ": ".join(f"{type(one).__name__}: {one}" for one in chain)
    return BadInput(f"lmms-eval failed on {benchmark.name} ({benchmark.task}): {what}")
