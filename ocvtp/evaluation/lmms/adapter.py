"""Our model for lmms-eval: a VLM, pruned or not, that answers chat messages in batches."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from ocvtp.errors import BadInput, NotAvailable
from ocvtp.evaluation.answered import Answer
from ocvtp.evaluation.benchmarks import NATIVE, checked
from ocvtp.evaluation.lmms.official import messages_of
from ocvtp.evaluation.setting import EvaluationSetting, ready


class OcvtpModel(lmms):
    """A VLM of ocvtp, as `--model ocvtp --model_args vlm=tiny-llava,method=random,keep=16`.

    Args:
        vlm: name in ocvtp's catalogue, or a folder.
        method: as `ocvtp methods` lists.
        keep: tokens an image, a share in (0, 1], or a percentage such as 11.1%.
        pruner: folder of a trained pruner.
        seed: of methods with randomness.
        dtype: float32, bfloat16 or float16.
        batch_size: questions at once.
        max_batch_size: not used; lmms-eval passes it.
        device: cpu, cuda, ...
        max_new_tokens: of tasks that do not say.
        protocol: paper: asked by the template of the VLM's authors; native: by its own. The tasks are lmms-eval's.
        record: a file to which answers and kept tokens are appended as JSON lines.
        options: of the method, such as top_k=2.
    """

    is_simple = False

    def __init__(
        self,
        vlm: str = "tiny-llava",
        method: str = "vanilla",
        keep: int | float | str | None = None,
        pruner: str | None = None,
        seed: int = 0,
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_new_tokens: int = 16,
        protocol: str = NATIVE,
        record: str | None = None,
        **options: Any,
    ) -> None:
        setting = EvaluationSetting(
            vlm, method, keep, seed, pruner, options, dtype, _whole(batch_size, "batch_size"), max_new_tokens,
            checked(protocol),
        )  # fmt: skip
        stack = ExitStack()
        # A model of its own: it stays pruned for as long as this object lives.
        answerer = stack.enter_context(ready(setting, device or "cpu", shared=False))
        super().__init__()
        self.answerer, self.batch_size = answerer, setting.batch_size
        self.record = Path(record) if record else None
        self._stack = stack

    @property
    def device(self) -> Any:
        """Where the VLM is."""
        return self.answerer.device

    def clean(self) -> None:
        """Keep the VLM: it serves other tasks after this one. (lmms-eval's own deletes a model's modules.)"""

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers to requests, in their order."""
        results: list[GenerationResult] = []
        for options, group in groupby(requests, key=lambda request: request.args[2]):
            same = list(group)
            for start in range(0, len(same), self.batch_size):
                batch = same[start : start + self.batch_size]
                answers = self.answerer.answer([self._messages(request) for request in batch], options)
                for request, answer in zip(batch, answers, strict=True):
                    self._note(request, answer)
                    results.append(GenerationResult(answer.text, TokenCounts(answer.prompt_tokens, answer.new_tokens)))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: pruning is judged by what the VLM says."""
        raise NotAvailable(f"{_task(requests)} scores likelihoods of given answers; ocvtp's model generates answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: no benchmark of the paper has several rounds."""
        raise NotAvailable(f"{_task(requests)} asks in several rounds; ocvtp's model answers in one")

    def _messages(self, request: Any) -> Any:
        """The chat messages of a request; its images are decoded here."""
        _, to_messages, _, doc_id, task, split = request.args
        return messages_of(to_messages, self.task_dict[task][split], doc_id, f"{task} ({split})")

    def _note(self, request: Any, answer: Answer) -> None:
        _, _, _, doc_id, task, _ = request.args
        if self.record is not None and not (request.metadata or {}).get("__padding_only__"):
            line = {"task": task, "doc_id": doc_id, "prediction": answer.text, "kept": answer.kept}
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _task(requests: Sequence[Any]) -> str:
    return str(requests[0].task_name) if requests else "this task"


def _whole(value: int | str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise BadInput(f"{name} {value!r} is not a whole number") from None
