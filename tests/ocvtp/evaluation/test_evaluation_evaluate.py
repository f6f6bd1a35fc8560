"""`evaluate` from a VLM on disk to score.json, and lmms-eval's own command line with our model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluation_data
import numpy as np
import pytest

from ocvtp.data.scenes import file_name, jpeg, make_scene, write_scenes
from ocvtp.errors import BadInput, Corrupt, NotAvailable
from ocvtp.evaluation import listing as files
from ocvtp.evaluation import setting
from ocvtp.evaluation.evaluate import EvaluationSetting, evaluate, forget
from ocvtp.evaluation.scores import score_of

FOUR = ("gqa", "mme", "pope", "textvqa")
RANDOM = {"method": "random", "keep": 16, "seed": 1}
POPE_SETS_128_TOKENS = 4
"""Questions of POPE that a random VLM, which never ends an answer, is asked here."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", FOUR)
def test_a_benchmark_from_end_to_end(name: str, vlm_folder: Path, question_sets: Path, tmp_path: Path) -> None:
    limit = POPE_SETS_128_TOKENS if name == "pope" else None
    heard: list[tuple[int, int]] = []
    pruned = EvaluationSetting(vlm=str(vlm_folder), **RANDOM, batch_size=8)
    score = evaluate(
        pruned, name, question_sets, tmp_path / "out", limit=limit, progress=lambda *both: heard.append(both)
    )
    n = limit or 12
    assert heard[-1] == (n, n)
    assert sorted(contents(tmp_path / "out")) == ["samples.jsonl", "score.json"]
    assert json.loads((tmp_path / "out/score.json").read_text()) == score
    samples = files.read_samples(tmp_path / "out")
    assert [sample["doc_id"] for sample in samples] == list(range(n))
    assert all(len(sample["kept"]) == 16 for sample in samples)
    assert all(sample["answer"] for sample in samples)
    assert any(sample["prediction"] for sample in samples)
    assert (score["n"], score["score"]) == (n, score_of(samples, name))
    assert score["tokens_kept"] == {"mean": 16, "min": 16, "max": 16}
    assert {key: score["setting"][key] for key in ("vlm", "method", "keep", "tokens", "seed", "fingerprint")} == {
        "vlm": vlm_folder.name, "method": "random", "keep": 16, "tokens": 16, "seed": 1, "fingerprint": None,
    }  # fmt: skip
    assert score["prompt_template"] == "USER: <image>\n{question} ASSISTANT:"
    assert (score["dtype"], score["attn_implementation"]) == ("float32", "sdpa")
    assert {"torch", "transformers", "lmms-eval", "ocvtp"} <= set(score["versions"])

    again = EvaluationSetting(vlm=str(vlm_folder), **RANDOM, batch_size=1)
    alone = evaluate(again, name, question_sets / f"{name}.parquet", tmp_path / "again", limit=limit)
    assert (alone.pop("batch_size"), score.pop("batch_size")) == (1, 8)
    assert alone == score
    assert files.read_samples(tmp_path / "again") == samples
    assert not any(str(place).encode() in b"".join(contents(tmp_path / "out").values())
                   for place in (tmp_path, vlm_folder, question_sets, Path.home()))  # fmt: skip


def test_kept_tokens_are_laid_on_the_masks_of_the_scenes(vlm_folder: Path, tmp_path: Path) -> None:
    rows = [{**evaluation_data.gqa(1)[0], "id": str(i), "image": {"bytes": jpeg(make_scene(0, "benchmark", i)),
             "path": file_name("benchmark", i)}} for i in (0, 1, 1)]  # fmt: skip
    data = evaluation_data.write_parquet(tmp_path / "gqa.parquet", rows)
    plain = evaluate(EvaluationSetting(vlm=str(vlm_folder), **RANDOM), "gqa", data, tmp_path / "plain")
    assert plain["object_coverage"] is None
    write_scenes(tmp_path, 2, 0, "benchmark").rename(tmp_path / "scenes.json")
    score = evaluate(EvaluationSetting(vlm=str(vlm_folder), **RANDOM), "gqa", data, tmp_path / "out")
    samples = files.read_samples(tmp_path / "out")
    once = {}
    for sample, index in zip(samples, (0, 1, 1), strict=True):
        lit = np.zeros((96, 96), bool)
        for number in sample["kept"]:
            top, left = 8 * (number // 12), 8 * (number % 12)
            lit[top : top + 8, left : left + 8] = True
        things = make_scene(0, "benchmark", index).objects
        small = [thing for thing in things if thing.area < 2 * 64]
        hits = [sum(bool((lit & thing.mask_HW).any()) for thing in some) for some in (things, small)]
        assert sample["objects"] == [len(things), hits[0], len(small), hits[1]]
        assert sample["image"] == file_name("benchmark", index)
        once[index] = sample["objects"]
    objects, covered, small_objects, small_covered = (sum(column) for column in zip(*once.values(), strict=True))
    assert score["object_coverage"]["objects"] == objects
    assert score["object_coverage"]["small_objects"] == small_objects
    assert score["object_coverage"]["all"] == pytest.approx(covered / objects)
    assert score["object_coverage"]["small"] == pytest.approx(small_covered / small_objects if small_objects else None)


def test_vanilla_and_shares_and_seeds(vlm_folder: Path, question_sets: Path, tmp_path: Path) -> None:
    def kept(number: int, **more: Any) -> tuple[dict[str, Any], list[Any]]:
        out = tmp_path / str(number)
        score = evaluate(EvaluationSetting(vlm=str(vlm_folder), **more), "gqa", question_sets, out, limit=3)
        return score, [sample["kept"] for sample in files.read_samples(out)]

    vanilla, counts = kept(0)
    assert counts == [144] * 3
    assert vanilla["setting"]["tokens"] == vanilla["tokens_kept"]["mean"] == 144
    share, indices = kept(1, method="random", keep="11.1%", seed=1)
    assert (share["setting"]["keep"], share["setting"]["tokens"]) == ("11.1%", 16)
    assert indices == kept(2, method="random", keep=16, seed=1)[1]
    assert indices != kept(3, method="random", keep=16, seed=2)[1]


def test_a_vlm_is_loaded_once_for_many_evaluations(
    vlm_folder: Path, question_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ocvtp.vlms.loading

    loaded = []
    load = ocvtp.vlms.loading.load
    monkeypatch.setattr(
        ocvtp.vlms.loading, "load", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs)
    )
    forget()
    for number, more in enumerate(({}, RANDOM, {"method": "oc-vtp-untrained", "keep": 9}, {})):
        for name in ("gqa", "textvqa"):
            out = tmp_path / f"{number}-{name}"
            evaluate(
                EvaluationSetting(vlm=str(vlm_folder), max_new_tokens=4, **more), name, question_sets, out, limit=2
            )
    assert len(loaded) == 1
    first, last = (contents(tmp_path / f"{n}-gqa") for n in (0, 3))
    assert first == last  # pruning leaves nothing behind


def test_a_failure_leaves_no_result_and_the_model_as_it_was(
    vlm_folder: Path, question_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = EvaluationSetting(vlm=str(vlm_folder))
    before = evaluate(plain, "gqa", question_sets, tmp_path / "before", limit=2)

    def broken(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            EvaluationSetting(vlm=str(vlm_folder), **RANDOM), "gqa", question_sets, tmp_path / "out", progress=broken
        )
    assert not (tmp_path / "out").exists()
    for wrong in ({"method": "randm", "keep": 16}, {**RANDOM, "keep": 145}, {**RANDOM, "options": {"temp": 1}}):
        with pytest.raises(BadInput):
            evaluate(EvaluationSetting(vlm=str(vlm_folder), **wrong), "gqa", question_sets, tmp_path / "out")
    assert evaluate(plain, "gqa", question_sets, tmp_path / "after", limit=2) == before
    with pytest.raises(BadInput, match="no-such-vlm"):
        evaluate(EvaluationSetting(vlm="no-such-vlm"), "gqa", question_sets, tmp_path / "out")
    monkeypatch.setattr("ocvtp.evaluation.lmms.tasks.find_spec", lambda name: None)
    with pytest.raises(NotAvailable, match="lmms-eval is not installed"):
        evaluate(EvaluationSetting(vlm="no-such-vlm"), "gqa", question_sets, tmp_path / "out")


def test_a_number_that_does_not_follow_from_the_answers_is_refused(
    vlm_folder: Path, question_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ocvtp.evaluation.lmms.outcome.primary_of", lambda benchmark, metrics: 0.25)
    with pytest.raises(Corrupt, match=r"lmms-eval scores gqa 0\.25, but 0\.0 follows from the 2 answers"):
        evaluate(EvaluationSetting(vlm=str(vlm_folder)), "gqa", question_sets, tmp_path / "out", limit=2)
    assert not (tmp_path / "out").exists()


def test_a_pruner_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = setting.pruner_fingerprint(tmp_path)
    (tmp_path / "curves.csv").write_text("step")
    assert setting.pruner_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert setting.pruner_fingerprint(tmp_path) != first
    assert setting.pruner_fingerprint(None) is None


def test_results_are_written_as_json_has_it(tmp_path: Path) -> None:
    import numpy as np

    line = dict.fromkeys(("doc_id", "unit", "question", "answer", "score", "category", "kept"), 0)
    line |= {"prediction": "a\u2028b\x85\ud800", "score": np.float32(0.5), "kept": np.arange(3), "unit": np.int64(7)}
    files.write(tmp_path, {"score": float("nan"), "metrics": {"a": float("inf"), "b": (1, None, True)}}, [line, line])
    assert json.loads((tmp_path / "score.json").read_text()) == {
        "score": None,
        "metrics": {"a": None, "b": [1, None, True]},
    }
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    read = files.read_samples(tmp_path)[1]
    assert (read["score"], read["kept"], read["unit"], read["prediction"]) == (0.5, [0, 1, 2], 7, line["prediction"])
    (tmp_path / "samples.jsonl").write_text('{"doc_id": 0}\n')
    with pytest.raises(Corrupt, match=r"samples.jsonl, line 1 has no 'unit'"):
        files.read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text("{}{\n")
    with pytest.raises(Corrupt, match="line 1 is not JSON"):
        files.read_samples(tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        files.read_samples(tmp_path / "nowhere")


@pytest.mark.slow
def test_lmms_eval_finds_the_model_by_its_own_command(vlm_folder: Path, question_sets: Path, tmp_path: Path) -> None:
    from ocvtp.evaluation.benchmarks import benchmark
    from ocvtp.evaluation.lmms.tasks import write_task

    task = write_task(tmp_path / "tasks", benchmark("gqa"), question_sets / "gqa.parquet", tmp_path / "cache")
    arguments = f"vlm={vlm_folder},method=random,keep=16,seed=1,record={tmp_path / 'record.jsonl'}"
    # The command reads the whole folder of official tasks; --tasks on ours alone needs no network.
    command = [sys.executable, "-m", "lmms_eval", "--model", "ocvtp", "--model_args", arguments, "--tasks", task,
               "--include_path", str(tmp_path / "tasks"), "--batch_size", "5", "--device", "cpu", "--limit", "7",
               "--output_path", str(tmp_path / "out"), "--log_samples"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    ours = tmp_path / "ours"
    evaluate(EvaluationSetting(vlm=str(vlm_folder), **RANDOM), "gqa", question_sets, ours, limit=7)
    expected = [(s["doc_id"], s["prediction"], [s["kept"]]) for s in files.read_samples(ours)]
    assert [(line["doc_id"], line["prediction"], line["kept"]) for line in lines] == expected
    results = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    assert results["results"][task]["exact_match,none"] == score_of(files.read_samples(ours), "gqa")
