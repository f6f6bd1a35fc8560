"""lmms-eval on local data: official functions ask and score, and nothing of it leaks."""

import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_data import MAKERS, Parrot, gqa, mme, right_answers, write_parquet
from PIL import Image, ImageFile

from ocvtp.errors import BadInput, NotAvailable
from ocvtp.evaluation.answered import Answer
from ocvtp.evaluation.ask import answers_to
from ocvtp.evaluation.benchmarks import benchmark, benchmarks
from ocvtp.evaluation.generate import finish
from ocvtp.evaluation.lmms.official import cause_of, opened
from ocvtp.evaluation.lmms.outcome import primary_of, scored
from ocvtp.evaluation.lmms.quiet import import_lmms_eval
from ocvtp.evaluation.lmms.tasks import write_task
from ocvtp.evaluation.preflight import check
from ocvtp.evaluation.scores import score_of

TOP = {"mmbench": 100.0, "mme": 600.0}
"""The score of all right answers; 1 for the others. MME: three categories of 200 points."""


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Before anything here imports lmms-eval as it is: that would change the process for other tests."""
    import_lmms_eval()


@dataclass
class Scored:
    primary: float
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]


def run(
    name: str, rows: list[dict[str, Any]], answers: list[str], folder: Path, limit: int | None = None,
    progress: Any = None,
) -> tuple[Scored, Parrot]:  # fmt: skip
    parrot = Parrot(answers)
    path = write_parquet(folder / f"{name}.parquet", rows)
    with opened(benchmark(name), path) as questions:
        count = min(limit or len(questions), len(questions))
        answered, _ = answers_to(questions, parrot, range(count), 4, None, progress)  # type: ignore[arg-type]
        metrics, samples = scored(questions, [one.answer for one in answered])
    return Scored(primary_of(benchmark(name), metrics), metrics, samples), parrot


@pytest.mark.parametrize("name", MAKERS)
def test_right_answers_score_everything_and_wrong_ones_nothing(name: str, tmp_path: Path) -> None:
    rows = MAKERS[name](12)
    right = right_answers(name, rows)
    best, parrot = run(name, rows, right, tmp_path)
    assert best.primary == pytest.approx(TOP.get(name, 1.0))
    assert [sample["score"] for sample in best.samples] == [1.0] * 12
    assert [sample["doc_id"] for sample in best.samples] == list(range(12))
    assert [sample["prediction"] for sample in best.samples] == right
    assert all(row["question"].split("?")[0].split()[-1] in parrot.text(i) for i, row in enumerate(rows))
    assert score_of(best.samples, name) == pytest.approx(best.primary)

    swapped = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes", "A": "B", "B": "A", "C": "A", "D": "A"}
    worst, _ = run(name, rows, [swapped.get(answer, "nonsense") for answer in right], tmp_path)
    assert worst.primary == 0.0
    assert [sample["score"] for sample in worst.samples] == [0.0] * 12
    assert score_of(worst.samples, name) == 0.0


@pytest.mark.parametrize("name", MAKERS)
def test_questions_about_scenes_are_asked_and_scored_by_the_official_functions(name: str, question_sets: Path) -> None:
    path = question_sets / f"{name}.parquet"
    assert check(benchmark(name), path) == 12
    rows = pq.read_table(path).to_pylist()
    with opened(benchmark(name), path) as questions:
        for row, doc in enumerate(rows):
            parts = questions.messages(row)[0]["content"]
            said = "".join(part["text"] for part in parts if part["type"] == "text")
            assert said.lower().count(
                doc["question"].rsplit("> ")[-1].removesuffix(" Please answer yes or no.").lower()
            )
            images = [doc.get("image") or [doc[f"image_{k}"] for k in (1, 2) if doc[f"image_{k}"]]]
            flat = images[0] if isinstance(images[0], list) else images
            assert [part["type"] for part in parts].count("image") == len(flat)
        answers = [Answer(text, [[0]], 1, 1) for text in right_answers(name, rows)]
        metrics, samples = scored(questions, answers)
    top = {"mmbench": 100.0, "mme": 200.0 * len({row.get("category") for row in rows})}.get(name, 1.0)
    assert primary_of(benchmark(name), metrics) == pytest.approx(top)
    assert {sample["score"] for sample in samples} == {1.0}


@pytest.mark.parametrize("name", MAKERS)
def test_scores_of_mixed_answers_follow_from_the_lines(name: str, tmp_path: Path) -> None:
    rows = MAKERS[name](24)
    right = right_answers(name, rows)
    rng = np.random.default_rng(0)
    # Some that end lines, that no file takes, that spreadsheets refuse or take for a formula; and nothing at all.
    odd = ["", "\x07", "\u2028", "\ud800", "yes\nno", "=A1", "a\x00b"]
    guesses = 3 * ["yes", "No"] + ["A", "B.", "maybe", "cat", "red", "7", *map(finish, odd)]
    said = [answer if rng.random() < 0.6 else guesses[rng.integers(len(guesses))] for answer in right]
    found, _ = run(name, rows, said, tmp_path)
    assert 0.0 < found.primary < TOP.get(name, 1.0)
    assert score_of(found.samples, name) == pytest.approx(found.primary, abs=1e-5)
    assert score_of(json.loads(json.dumps(found.samples)), name) == score_of(found.samples, name)


@pytest.mark.parametrize("name", MAKERS)
def test_a_vlm_that_says_nothing_is_scored(name: str, tmp_path: Path) -> None:
    found, _ = run(name, MAKERS[name](12), [""] * 12, tmp_path)
    assert found.primary == pytest.approx(score_of(found.samples, name), abs=1e-5)
    # Where it can read no option MMMU's official function draws one.
    assert found.primary == 0 if name != "mmmu" else 0 < found.primary < 1


def test_what_is_drawn_for_a_question_does_not_depend_on_other_answers(tmp_path: Path) -> None:
    rows = MAKERS["mmmu"](12)
    nothing, _ = run("mmmu", rows, [""] * 12, tmp_path)
    one_read, _ = run("mmmu", rows, [right_answers("mmmu", rows)[0], *[""] * 11], tmp_path)
    assert one_read.samples[0]["score"] == 1
    assert one_read.samples[1:] == nothing.samples[1:]


def test_questions_are_asked_as_lmms_eval_does(tmp_path: Path) -> None:
    rows = mme(4)
    _, parrot = run("mme", rows, right_answers("mme", rows), tmp_path)
    assert parrot.text(1) == "Is it 1?\nAnswer the question using a single word or phrase."
    image = parrot.asked[1][0]["content"][0]
    assert (image["type"], image["url"].size, image["url"].mode) == ("image", (40, 30), "RGB")
    assert parrot.options[0]["max_new_tokens"] == 16
    limited, parrot = run("mme", rows, right_answers("mme", rows), tmp_path, limit=2)
    assert len(limited.samples) == len(parrot.asked) == 2


class Small(Parrot):
    """Has memory for so many questions at once."""

    def __init__(self, most: int) -> None:
        super().__init__([])
        self.most, self.tried = most, list[int]()

    def answer(self, conversations: Sequence[Any], options: Any = None) -> list[Answer]:
        self.tried.append(len(conversations))
        if len(conversations) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Answer(one[0]["content"][-1]["text"], [[0]], 1, 1) for one in conversations]


def test_a_batch_that_does_not_fit_is_halved_once_for_each_power_of_two(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_parquet(tmp_path / "gqa.parquet", gqa(12))
    with opened(benchmark("gqa"), path) as questions:
        wide, small = Small(12), Small(3)
        whole = answers_to(questions, wide, range(12), 8, None, None)  # type: ignore[arg-type]
        found = answers_to(questions, small, range(12), 8, None, None)  # type: ignore[arg-type]
        assert (wide.tried, small.tried) == ([8, 4], [8, 4, 2, 2, 2, 2, 2, 2])
        assert found == (whole[0], 2)
        assert whole[1] == 8
        assert [one.row for one in found[0]] == list(range(12))
        assert "8 questions at once need more memory than there is: 4 from here on" in caplog.text
        with pytest.raises(NotAvailable, match="question 0 of gqa alone needs more memory"):
            answers_to(questions, Small(0), range(12), 8, None, None)  # type: ignore[arg-type]


def test_questions_of_one_length_are_asked_together(tmp_path: Path) -> None:
    rows = [row | {"question": "What is it?" + " Really?" * (i % 3)} for i, row in enumerate(gqa(12))]
    path = write_parquet(tmp_path / "gqa.parquet", rows)
    with opened(benchmark("gqa"), path) as questions:
        parrot = Parrot(["red"] * 12)
        answers_to(questions, parrot, range(12), 4, None, None)  # type: ignore[arg-type]
    said = [parrot.text(number).count("Really") for number in range(12)]
    assert said == [0] * 4 + [1] * 4 + [2] * 4


def test_pope_counts_answers_that_go_on_as_wrong_like_lmms_eval(tmp_path: Path) -> None:
    rows = MAKERS["pope"](4)
    found, _ = run("pope", rows, ["Yes", "no", "Yes, there is", "No."], tmp_path)
    assert [sample["score"] for sample in found.samples] == [1.0, 1.0, 0.0, 0.0]
    assert found.metrics["pope_accuracy"] == 0.5
    assert found.primary == found.metrics["pope_f1_score"] == 1.0  # one true positive, no "no" to a yes


@pytest.mark.parametrize("broken", [b"not an image at all", None])
def test_an_image_that_cannot_be_read_is_named(broken: bytes | None, tmp_path: Path) -> None:
    rows = gqa(6)
    whole = rows[4]["image"]["bytes"]
    rows[4]["image"] = {"bytes": broken or whole[: len(whole) // 2], "path": "4.png"}
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(BadInput, match=r"question 4 of gqa_local \(test\) cannot be read"):
        run("gqa", rows, ["red"] * 6, tmp_path)
    assert before == ImageFile.LOAD_TRUNCATED_IMAGES
    found, _ = run("gqa", gqa(6), ["red"] * 6, tmp_path)  # the next evaluation in this process is none the worse
    assert found.primary == 0.5


def test_a_scorer_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.api import task

    monkeypatch.setattr(task.ConfigurableTask.process_results.retry, "wait", lambda state: 0.0)
    rows = MAKERS["pope"](4)
    rows[2]["answer"] = "perhaps"  # preflight would have said so
    with pytest.raises(BadInput, match=r"lmms-eval failed on pope \(pope\): AssertionError"):
        run("pope", rows, ["yes"] * 4, tmp_path)


def test_a_question_or_a_score_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.evaluator_utils import TaskOutput

    rows = MAKERS["mmmu"](4)
    rows[2]["options"] = "no list"  # preflight would have said so
    with pytest.raises(
        BadInput, match=r"question 2 of mmmu_val_local \(test\) cannot be read: (ValueError|SyntaxError)"
    ):
        run("mmmu", rows, ["A"] * 4, tmp_path)

    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(TaskOutput, "calculate_aggregate_metric", fails)
    with pytest.raises(BadInput, match=r"no score of the 2 answers to gqa_local \(test\): ZeroDivisionError"):
        run("gqa", gqa(2), ["red"] * 2, tmp_path)


def test_it_is_quiet_and_leaves_the_process_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    run("gqa", gqa(2), ["red"] * 2, tmp_path)  # imports
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a job that this process is part of
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    capfd.readouterr()

    def state() -> list[Any]:
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        return [
            dict(os.environ), list(warnings.filters), random.getstate(), ImageFile.LOAD_TRUNCATED_IMAGES,
            sys.stdout, sys.stderr, datasets.config.HF_HUB_OFFLINE, datasets.is_progress_bar_enabled(),
            sorted(cache.rglob("*")) if cache.exists() else None, sorted(Path.cwd().iterdir()),
        ]  # fmt: skip

    before = state()
    heard: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        print("heard")
        heard.append((done, total))

    with caplog.at_level(logging.DEBUG, "ocvtp"):
        run("mmbench", MAKERS["mmbench"](6), ["B"] * 6, tmp_path, progress=progress)
    assert state() == before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert heard == [(4, 6), (6, 6)]
    printed = capfd.readouterr()
    assert printed.out == "heard\nheard\n"
    assert printed.err == ""
    assert "Static Eval" in caplog.text  # what lmms-eval printed is in the log
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


@pytest.mark.parametrize("protocol", ["native", "paper"])
def test_official_tasks_are_included_unchanged(protocol: Any, tmp_path: Path) -> None:
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    from ocvtp.evaluation.lmms.tasks import package

    for name, entry in benchmarks(protocol).items():
        task = write_task(tmp_path / name, entry)
        paths = (tmp_path / name / f"{task}.yaml", package() / "tasks" / entry.yaml)
        config, official = ({**load_yaml_config(str(path), mode="simple")} for path in paths)
        for one in (config, official):  # functions are nodes of YAML here
            one |= {key: value.value for key, value in one.items() if hasattr(value, "value")}
        changed = {key for key in config if key != "metric_list" and config[key] != official.get(key)}
        with_ocr = protocol == "paper" and name == "textvqa"
        assert changed == ({"task", "lmms_eval_specific_kwargs"} if with_ocr else {"task"})
        if with_ocr:
            ours, theirs = (one["lmms_eval_specific_kwargs"]["default"] for one in (config, official))
            assert ours == {**theirs, "ocr": True}
        metrics = [[metric["metric"] for metric in one["metric_list"]] for one in (config, official)]
        assert metrics[0] == [metric for metric in metrics[1] if metric != "submission"]
        assert (config["dataset_path"], config["test_split"].strip()) == (entry.hub, entry.split)
        assert config.get("dataset_name") == entry.config
        assert config["task"] == f"{official['task']}_official"
        assert task in TaskManager(include_path=str(tmp_path / name), include_defaults=False).all_tasks


def test_paths_may_hold_anything(tmp_path: Path) -> None:
    folder = tmp_path / "a [b] *c* {d} 'e' ü, f"
    found, _ = run("gqa", gqa(2), ["red", "blue"], folder)
    assert found.primary == 1.0


def test_two_models_of_one_vlm_are_pruned_each_in_its_own_way(vlm_folder: Path) -> None:
    from lmms_eval.models import get_model

    kind = get_model("ocvtp")  # by the entry point
    first = kind.create_from_arg_string(f"vlm={vlm_folder},method=random,keep=16,seed=1", {"batch_size": 2})
    second = kind.create_from_arg_string(
        f"vlm={vlm_folder},method=oc-vtp-untrained,keep=11.1%,top_k=2", {"device": "cpu"}
    )
    question = [{"role": "user", "content": [{"type": "image", "url": Image.new("RGB", (96, 96))}]}]
    kept = [model.answerer.answer([question], {"max_new_tokens": 1})[0].kept[0] for model in (first, second)]
    assert kept[0] != kept[1]
    assert [len(indices) for indices in kept] == [16, 16]
    assert (first.batch_size, second.batch_size) == (2, 1)
    with pytest.raises(BadInput, match="batch_size 'auto' is not a whole number"):
        kind.create_from_arg_string(f"vlm={vlm_folder}", {"batch_size": "auto"})


def test_what_is_not_offered_says_so(vlm_folder: Path) -> None:
    from ocvtp.evaluation.lmms.adapter import OcvtpModel

    model = OcvtpModel(str(vlm_folder))
    with pytest.raises(NotAvailable, match="generates answers"):
        model.loglikelihood([])
    with pytest.raises(NotAvailable, match="in one"):
        model.generate_until_multi_round([])


def test_an_official_data_set_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants
    from lmms_eval.api import task

    monkeypatch.setattr(task.ConfigurableTask.download.retry, "wait", lambda state: 0.0)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    with (
        pytest.raises(NotAvailable, match=r"lmms-lab-encoder/POPE.*ocvtp prefetch pope"),
        opened(benchmark("pope"), None),
    ):
        pass


@pytest.mark.parametrize("name", ["LocalTokenNotFoundError", "GatedRepoError", "RepositoryNotFoundError"])
def test_without_a_token_it_says_how_to_get_the_data(name: str) -> None:
    from huggingface_hub import errors
    from tenacity import Future, RetryError

    kind = getattr(errors, name)
    last = Future(5)
    last.set_exception(kind.__new__(kind, "Token is required"))
    error = cause_of(benchmark("mme"), RetryError(last))
    assert isinstance(error, NotAvailable)
    assert "lmms-lab-encoder/MME" in str(error)
    assert "`ocvtp prefetch mme` gets it" in str(error)
