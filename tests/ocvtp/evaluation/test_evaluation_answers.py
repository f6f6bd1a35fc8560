"""Answers, shard by shard and kept through a kill: nothing is asked twice, and the bytes are those of one calm run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ocvtp.code_digest import sources
from ocvtp.errors import BadInput, Corrupt, Incompatible
from ocvtp.evaluation import journal as journals
from ocvtp.evaluation import listing
from ocvtp.evaluation.answered import Answer, Answered, Answers, Shard, joined
from ocvtp.evaluation.ask import ask
from ocvtp.evaluation.benchmarks import benchmarks
from ocvtp.evaluation.generate import Answerer, Prepared
from ocvtp.evaluation.lmms.official import Questions
from ocvtp.evaluation.score import score
from ocvtp.evaluation.setting import EvaluationSetting
from ocvtp.methods import REGISTRY
from ocvtp.methods.register import Registered

ABOUT = {"benchmark": "gqa", "data": {"sha256": "0"}, "setting": {"method": "random", "keep": 16}}


def one(row: int, text: str = "red") -> Answered:
    return Answered(row, f"{row:032d}", Answer(text, [[0, 1]], 9, 2))


@pytest.fixture
def pruned(vlm_folder: Path) -> EvaluationSetting:
    return EvaluationSetting(str(vlm_folder), "random", 16, seed=1, batch_size=4, max_new_tokens=4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> "Counter[str]":
    """How often each question was put to the VLM."""
    seen: Counter[str] = Counter()
    answer = Answerer.answer_prepared

    def counting(self: Answerer, batch: Prepared, options: Any = None) -> list[Answer]:
        seen.update(batch.digests)
        return answer(self, batch, options)

    monkeypatch.setattr(Answerer, "answer_prepared", counting)
    return seen


def scored(shards: list[Answers], data: Path, folder: Path) -> dict[str, bytes]:
    listing.write(folder, *score(shards, data))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["mme", "vizwiz", "seedbench"])
def test_shards_give_the_bytes_of_one(
    name: str, pruned: EvaluationSetting, question_sets: Path, tmp_path: Path
) -> None:
    whole = scored([ask(pruned, name, question_sets)], question_sets, tmp_path / "1")
    for count in (3, 7, 13):  # of 13 one has no question
        shards = []
        for number in reversed(range(count)):  # in any order
            ask(pruned, name, question_sets, shard=Shard(number, count)).write(tmp_path / f"{count}-{number}")
            shards.append(Answers.read(tmp_path / f"{count}-{number}"))
        assert [len(shard.answered) for shard in shards] == [len(Shard(n, count).rows(12)) for n in range(count)][::-1]
        assert scored(shards, question_sets, tmp_path / str(count)) == whole
    with pytest.raises(BadInput, match=rf"{name}: question \d+ has no answer; \d+ answers to 12 questions"):
        joined(shards[1:])
    with pytest.raises(BadInput, match="a question is answered twice"):
        joined([*shards, shards[0]])


def test_what_was_answered_before_a_kill_is_not_asked_again(
    pruned: EvaluationSetting, question_sets: Path, tmp_path: Path, asked: "Counter[str]"
) -> None:
    calm = scored([ask(pruned, "gqa", question_sets)], question_sets, tmp_path / "calm")
    asked.clear()
    path = tmp_path / "journal"
    for last in (4, 8):  # killed after the first batch, then after the second

        def killed(done: int, total: int, last: int = last) -> None:
            assert total == 12
            if done == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ask(pruned, "gqa", question_sets, journal=path, progress=killed)
        assert len(path.read_bytes().splitlines()) == 1 + last
    answers = ask(pruned, "gqa", question_sets, journal=path)
    assert sorted(asked.values()) == [1] * 12
    assert scored([answers], question_sets, tmp_path / "again") == calm
    for other in ({"seed": 2}, {"keep": 8}, {"dtype": "bfloat16"}, {"max_new_tokens": 5}):
        with pytest.raises(Incompatible, match=next(iter(other))):
            ask(replace(pruned, **other), "gqa", question_sets, journal=path)
    with pytest.raises(Incompatible, match=r"holds answers that something else made \(benchmark, data.sha256\)"):
        ask(pruned, "pope", question_sets, journal=path)


@pytest.mark.parametrize("method", ["mine", "mine+fastv"])
def test_what_another_version_of_a_method_answered_is_not_gone_on_with(
    method: str, vlm_folder: Path, question_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plug-in whose method calls a module of its own: that one is edited between two runs."""
    name = f"a_plug_in_of_mine_{len(method)}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helps.py").write_text("def first(keep):\n    return range(keep)\n")
    (folder / "picks.py").write_text(f"from {name}.helps import first\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = Registered(replace(REGISTRY["random"], name="mine"), f"{name}.picks", "me")
    monkeypatch.setitem(REGISTRY._all, "mine", mine)
    setting, path = EvaluationSetting(str(vlm_folder), method, 16, max_new_tokens=2), tmp_path / "journal"
    before = ask(setting, "gqa", question_sets, limit=2, journal=path).about
    (folder / "helps.py").write_text("# A comment does not count.\ndef first(keep):\n    return range(keep)\n")
    ask(setting, "gqa", question_sets, limit=2, journal=path)
    (folder / "helps.py").write_text("def first(keep):\n    return range(1, keep + 1)\n")
    with pytest.raises(Incompatible, match=r"holds answers that something else made \(code\)"):
        ask(setting, "gqa", question_sets, limit=2, journal=path)
    assert ask(setting, "gqa", question_sets, limit=2).about == before, "what is published does not say it"


def test_the_code_of_a_method_is_also_that_of_selecting_and_of_asking() -> None:
    found = sources(["ocvtp.evaluation.ask", *REGISTRY.modules("visionzip").values()])
    assert {"ocvtp.methods.picking", "ocvtp.selection.merging", "ocvtp.pruning.handle", "ocvtp.vlms.families.llava",
            "ocvtp.evaluation.generate"} <= set(found)  # fmt: skip
    assert not {"ocvtp.methods.fastv", "ocvtp.evaluation.results"} & set(found)


@pytest.fixture
def official(question_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets of scenes in place of the official ones: the same tasks, with no parquet of ours to look into."""
    from ocvtp.evaluation.lmms import official as loader

    load = loader._load
    monkeypatch.setattr(loader, "_KEPT", {})
    monkeypatch.setattr(
        loader, "_load", lambda entry, data, folder: load(entry, question_sets / f"{entry.name}.parquet", folder)
    )


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize(("name", "limit", "asked_"), [("mme", 5, 4), ("gqa", 5, 5), ("gqa", None, 12)])
def test_a_limit_on_official_data_leaves_whole_what_is_scored_together(
    name: str, limit: int | None, asked_: int, vlm_folder: Path
) -> None:
    answers = ask(EvaluationSetting(str(vlm_folder), max_new_tokens=1), name, None, limit=limit)
    assert (answers.total, len(answers.answered)) == (asked_, asked_)


@pytest.mark.usefixtures("official")
def test_official_data_that_is_unfit_is_named_before_the_vlm_is_loaded() -> None:
    with pytest.raises(BadInput, match="limit 1 leaves no whole unit of mme"):
        ask(EvaluationSetting("no-such-vlm"), "mme", None, limit=1)


def test_a_benchmark_that_is_killed_goes_on_behind_its_last_batch(
    pruned: EvaluationSetting, question_sets: Path, tmp_path: Path, asked: "Counter[str]"
) -> None:
    """SIGKILL while questions are asked: none is answered twice, and the files are those of a calm run."""
    path, alone = tmp_path / "journal", replace(pruned, batch_size=1)
    calm = scored([ask(alone, "gqa", question_sets)], question_sets, tmp_path / "calm")
    code = (
        "from pathlib import Path; from ocvtp.evaluation.ask import ask\n"
        "from ocvtp.evaluation.setting import EvaluationSetting\n"
        f"ask(EvaluationSetting(**{vars(alone)!r}), 'gqa', Path({str(question_sets)!r}), journal=Path({str(path)!r}),\n"
        "    progress=lambda done, total: print(done, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 3:
            pass
        os.kill(process.pid, signal.SIGKILL)
        said = [3, *(int(line) for line in process.stdout.read().splitlines())]
    assert process.returncode == -signal.SIGKILL
    before = [json.loads(line[17:])["row"] for line in path.read_bytes().split(b"\n")[1:-1]]
    assert max(said) <= len(before) < 12
    asked.clear()
    answers = ask(alone, "gqa", question_sets, journal=path)
    assert list(asked.values()) == [1] * (12 - len(before))
    rows = [json.loads(line[17:])["row"] for line in path.read_bytes().split(b"\n")[1:-1]]
    assert rows[: len(before)] == before
    assert sorted(rows) == list(range(12))
    assert scored([answers], question_sets, tmp_path / "again") == calm


def test_what_there_is_memory_for_is_found_once_and_recorded(
    pruned: EvaluationSetting, question_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(pruned, batch_size=12)
    calm, _ = score([ask(wide, "gqa", question_sets)], question_sets)
    tried: list[int] = []
    answer = Answerer.answer_prepared

    def small(self: Answerer, batch: Prepared, options: Any = None) -> list[Answer]:
        tried.append(len(batch.images))
        if len(batch.images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, batch, options)

    def killed(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "answer_prepared", small)
    path = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        ask(wide, "gqa", question_sets, journal=path, progress=killed)
    assert tried == [12, 6, 3]
    header, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([header, *lines, b"torn"]))  # so that it is written anew
    ask(wide, "gqa", question_sets, journal=path).write(tmp_path)
    assert tried == [12, 6, 3, 3, 3, 3], "the next run tries no more than what was found"
    answers = Answers.read(tmp_path)
    found, _ = score([answers], question_sets)
    assert (calm.pop("batch_size"), found.pop("batch_size"), answers.batch_size) == (12, 3, 3)
    assert found == calm


@pytest.mark.parametrize("name", benchmarks())
def test_answers_do_not_depend_on_the_batch(
    name: str, pruned: EvaluationSetting, question_sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A VLM with random weights says something else to each question, and never ends.
    monkeypatch.setattr(Questions, "options", {"max_new_tokens": 4})
    one_by_one, together = (ask(replace(pruned, batch_size=size), name, question_sets).answered for size in (1, 12))
    assert one_by_one == together
    assert len({one.answer.text for one in together}) > 3


def test_an_answer_to_another_question_than_that_of_its_row_is_refused(
    pruned: EvaluationSetting, question_sets: Path, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    ask(pruned, "gqa", question_sets, journal=path, shard=Shard(0, 6))
    header, first, second = path.read_bytes().splitlines()
    changed = json.loads(second[17:]) | {"digest": json.loads(first[17:])["digest"]}
    path.write_bytes(b"\n".join([header, first, journals._line(changed)]))
    with pytest.raises(Incompatible, match=f"question {changed['row']} of gqa is not the one that was answered"):
        ask(pruned, "gqa", question_sets, journal=path)


def test_answers_to_other_data_are_not_scored(pruned: EvaluationSetting, question_sets: Path, tmp_path: Path) -> None:
    answers = ask(pruned, "gqa", question_sets, limit=2)
    other = tmp_path / "gqa.parquet"
    other.write_bytes((question_sets / "textvqa.parquet").read_bytes())
    with pytest.raises(Incompatible, match=r"gqa.parquet is not the question set that was answered"):
        score([answers], other)


def test_shards_that_were_made_in_other_ways_do_not_join() -> None:
    first = Answers(ABOUT, 2, [one(0)], 8)
    assert [found.row for found in joined([Answers(ABOUT, 2, [one(1)], 4), first]).answered] == [0, 1]
    assert joined([Answers(ABOUT, 2, [one(1)], 4), first]).batch_size == 4
    with pytest.raises(Incompatible, match="setting differ"):
        joined([first, Answers({**ABOUT, "setting": {}}, 2, [one(1)], 8)])
    with pytest.raises(Incompatible, match="total differ"):
        joined([first, Answers(ABOUT, 3, [one(1)], 8)])
    with pytest.raises(BadInput, match="shard 3 of 3"):
        Shard(3, 3)


def test_files_of_answers_are_read_as_they_were_written_or_named(tmp_path: Path) -> None:
    answers = Answers(ABOUT, 2, [one(0, "a\u2028b\ud800\n"), one(1, "")], 8)
    answers.write(tmp_path)
    assert Answers.read(tmp_path) == answers
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    for wrong, said in ((lines[1][:-4], "line 2"), ('{"row": 1}', "line 2: it is no answer"), ("[]", "line 2")):
        (tmp_path / "answers.jsonl").write_text(f"{lines[0]}\n{wrong}\n")
        with pytest.raises(Corrupt, match=said):
            Answers.read(tmp_path)
    (tmp_path / "asked.json").unlink()
    with pytest.raises(BadInput, match=r"asked.json does not exist"):
        Answers.read(tmp_path)


def rows_in(path: Path, about: Any = ABOUT) -> list[int]:
    with journals.opened(path, about) as journal:
        return sorted(journal.known)


def filled(path: Path) -> list[bytes]:
    with journals.opened(path, ABOUT) as journal:
        journal.add([one(0), one(1)])
        journal.add([one(2)])
    return path.read_bytes().splitlines(keepends=True)


def test_every_cut_of_a_journal_keeps_what_is_whole(tmp_path: Path) -> None:
    lines = filled(tmp_path / "journal")
    data = b"".join(lines)
    ends = [len(b"".join(lines[: count + 1])) for count in range(len(lines))]
    for length in range(0, len(data) + 1, 7):
        (tmp_path / "cut").write_bytes(data[:length])
        whole = sum(end <= length for end in ends)
        assert rows_in(tmp_path / "cut") == list(range(whole - 1 if whole else 0))
        with journals.opened(tmp_path / "cut", ABOUT) as journal:
            journal.add([one(7)])
        assert rows_in(tmp_path / "cut") == [*range(whole - 1 if whole else 0), 7]


def test_a_damaged_line_is_named_and_its_question_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal"
    lines = filled(path)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"red", b"rod"), lines[3]]))
    assert rows_in(path) == [0, 2]
    assert "journal, line 3 is damaged" in caplog.text
    assert path.read_bytes() == b"".join([*lines[:2], lines[3]])
    path.write_bytes(b"".join([lines[0].replace(b"gqa", b"gqb"), *lines[1:]]))
    assert rows_in(path) == []
    assert "it is begun anew" in caplog.text


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with (
        journals.opened(path, ABOUT),
        pytest.raises(BadInput, match=f"another process is writing {path}"),
        journals.opened(path, ABOUT, patience=0.1),
    ):
        pass
    assert rows_in(path) == []


def test_a_process_that_is_killed_leaves_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    code = (
        "import sys, itertools; from pathlib import Path; from ocvtp.evaluation import journal\n"
        "from ocvtp.evaluation.answered import Answer, Answered\n"
        f"with journal.opened(Path({str(path)!r}), {ABOUT!r}) as found:\n"
        "    for batch in itertools.count():\n"
        "        found.add([Answered(8 * batch + k, '', Answer('x' * 500, [[0]], 1, 1)) for k in range(8)])\n"
        "        print(8 * batch + 8, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 80:
            pass
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().splitlines()]
    kept = rows_in(path)
    assert kept[: len(kept)] == list(range(len(kept)))
    assert len(kept) >= max([80, *said]), "what was reported as answered is there"
