"""The paper's protocol: prompts to the letter, OCR tokens, POPE's mean F1, and every result says so."""

import ast
import json
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
import pytest
from evaluation_data import MAKERS, write_parquet
from transformers import AutoModelForImageTextToText, AutoProcessor

import ocvtp
from ocvtp import cli
from ocvtp.errors import BadInput, Incompatible
from ocvtp.evaluation.ask import ask
from ocvtp.evaluation.benchmarks import benchmark, benchmarks
from ocvtp.evaluation.evaluate import EvaluationSetting, evaluate
from ocvtp.evaluation.generate import Answerer
from ocvtp.evaluation.lmms.official import opened
from ocvtp.evaluation.lmms.tasks import package
from ocvtp.evaluation.preflight import check
from ocvtp.evaluation.scores import interval, relative, score_of
from ocvtp.vlms import resolve
from ocvtp.vlms.conversations import OWN, VICUNA_V1, authors, written

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
IMAGE = {"type": "image"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def vicuna_folder(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose vocabulary has the words of the authors' system prompt, as Vicuna's has."""
    folder = tmp_path_factory.mktemp("vicuna")
    processor = AutoProcessor.from_pretrained(vlm_folder)
    processor.tokenizer.add_tokens([*SYSTEM.lower().replace(".", "").replace(",", "").split(), "'", "user", "s"])
    model = AutoModelForImageTextToText.from_pretrained(vlm_folder)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(vicuna_folder: Path) -> Any:
    return AutoProcessor.from_pretrained(vicuna_folder)


def test_the_prompt_is_the_authors_to_the_letter(processor: Any) -> None:
    asked = "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    assert written(processor, [user(IMAGE, text(asked))], VICUNA_V1) == f"{SYSTEM} USER: <image>\n{asked} ASSISTANT:"
    assert written(processor, [user(text("Hi"))], VICUNA_V1) == f"{SYSTEM} USER: Hi ASSISTANT:"
    assert written(processor, [{"role": "user", "content": "Hi"}], VICUNA_V1) == f"{SYSTEM} USER: Hi ASSISTANT:"
    several = written(processor, [user(IMAGE, IMAGE, text("Which?"))], VICUNA_V1)
    assert several == f"{SYSTEM} USER: <image> <image>\nWhich? ASSISTANT:"
    placed = written(processor, [user(text("Is"), IMAGE, text("or"), IMAGE, text("red?"))], VICUNA_V1)
    assert placed == f"{SYSTEM} USER: Is <image> or <image> red? ASSISTANT:"
    on = [user(IMAGE, text("Red?")), {"role": "assistant", "content": "No"}, user(text("Blue?"))]
    assert written(processor, on, VICUNA_V1) == (
        f"{SYSTEM} USER: <image>\nRed? ASSISTANT: No</s>USER: Blue? ASSISTANT:"
    )
    with pytest.raises(BadInput, match="none of 'system'"):
        written(processor, [{"role": "system", "content": "Be brief."}], VICUNA_V1)


def test_the_prompt_is_that_of_lmms_evals_own_llava(processor: Any) -> None:
    source = ast.parse((package() / "models/simple/llava_hf.py").read_text())
    (template,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VICUNA_CHAT_TEMPLATE"
    )
    theirs = jinja2.Template(template).render(
        messages=[{"role": "user", "content": "<image>\nRed?"}], add_generation_prompt=True
    )
    assert written(processor, [user(IMAGE, text("Red?"))], VICUNA_V1) == theirs


def test_only_llava_on_vicuna_is_asked_in_its_authors_words(processor: Any) -> None:
    assert authors(processor) == VICUNA_V1
    shipped = AutoProcessor.from_pretrained(resolve("tiny-llava").folder)
    assert authors(shipped) == OWN, "its vocabulary lacks most of these words"
    assert authors(AutoProcessor.from_pretrained(resolve("tiny-qwen").folder)) == OWN
    processor.chat_template, before = (
        "[INST] <image>\n{{ messages[0]['content'][1]['text'] }} [/INST]",
        (processor.chat_template),
    )
    try:
        assert authors(processor) == OWN, "LLaVA on Mistral"
    finally:
        processor.chat_template = before


def test_textvqa_is_asked_with_ocr_tokens(tmp_path: Path) -> None:
    rows = MAKERS["textvqa"](2)
    rows[1]["ocr_tokens"] = ["EXIT", "only"]
    path = write_parquet(tmp_path / "textvqa.parquet", rows)
    said = []
    for protocol in ("native", "paper"):
        with opened(benchmark("textvqa", protocol), path) as questions:  # type: ignore[arg-type]
            said.append([questions.messages(row)[0]["content"][-1]["text"] for row in range(2)])
    after = "\nAnswer the question using a single word or phrase."
    assert said[0] == [f"What is written?{after}"] * 2
    assert said[1] == [f"What is written?\nReference OCR token: {token}{after}" for token in ("0", "EXIT, only")]


@pytest.mark.parametrize(("name", "column"), [("textvqa", "ocr_tokens"), ("pope", "category")])
def test_what_the_protocol_reads_must_be_there(name: str, column: str, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != column} for row in MAKERS[name](4)]
    path = write_parquet(tmp_path / f"{name}.parquet", rows)
    assert check(benchmark(name), path) == 4
    with pytest.raises(BadInput, match=f"{name}.parquet has no column '{column}', which {name} reads"):
        check(benchmark(name, "paper"), path)


def test_the_protocol_changes_what_it_names_alone() -> None:
    changed = {
        name: {
            key
            for key, value in vars(benchmark(name, "paper")).items()
            if value != vars(entry)[key] and key != "protocol"
        }
        for name, entry in benchmarks().items()
    }
    assert {name: keys for name, keys in changed.items() if keys} == {
        "pope": {"primary", "rule", "columns", "differs"},
        "textvqa": {"columns", "config_overrides", "differs"},
    }
    assert all(benchmark(name, "paper").asking != entry.asking for name, entry in benchmarks().items())
    assert {name for name in benchmarks() if benchmark(name, "paper").differs} == {
        "mmbench", "vqav2", "vizwiz", "mmmu", "seedbench",
    }  # fmt: skip
    assert [metric["metric"] for metric in benchmark("textvqa", "paper").config_overrides["metric_list"]] == [
        "exact_match"
    ]
    with pytest.raises(BadInput, match="no protocol 'papr'; there are: native, paper"):
        benchmark("pope", "papr")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no protocol 'papr'"):
        EvaluationSetting(protocol="papr")  # type: ignore[arg-type]


def pope(counts: dict[str, tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Of each category: yes said rightly, yes said wrongly, no said wrongly."""
    said = [
        (category, *pair)
        for category, numbers in counts.items()
        for pair, number in zip((("yes", "yes"), ("no", "yes"), ("yes", "no")), numbers, strict=True)
        for _ in range(number)
    ]
    return [
        {"unit": unit, "answer": right, "prediction": told, "score": float(right == told), "category": category}
        for unit, (category, right, told) in enumerate(said)
    ]


def test_mean_f1_by_hand() -> None:
    samples = pope({"random": (8, 1, 1), "popular": (6, 2, 0), "adversarial": (3, 5, 4)})
    of_each = [16 / 18, 12 / 14, 6 / 15]
    assert score_of(samples, "pope", "paper") == pytest.approx(sum(of_each) / 3)
    assert score_of(samples, "pope") == pytest.approx(34 / (34 + 8 + 5))
    assert score_of(pope({"random": (0, 3, 0), "popular": (2, 0, 0)}), "pope", "paper") == 0.5
    low, high = interval(samples, "pope", "paper") or (0.0, 0.0)
    assert 0.5 < low < sum(of_each) / 3 < high < 0.9
    # A category that is always right adds no doubt: its questions are drawn among themselves.
    sure = interval(pope({"random": (9, 0, 0), "popular": (9, 0, 0)}), "pope", "paper")
    assert sure == (1.0, 1.0)
    assert relative(samples, [samples], "pope", "paper")["relative"] == pytest.approx(100)


def test_results_say_by_which_protocol(vicuna_folder: Path, question_sets: Path, tmp_path: Path) -> None:
    place = tmp_path / "evaluations"
    arguments = ["eval", "--vlm", str(vicuna_folder), "--benchmark", "pope,textvqa", "--data", str(question_sets),
                 "--limit", "4", "--out", str(place), "--max-new-tokens", "4", "--device", "cpu"]  # fmt: skip
    assert cli.main([*arguments, "--protocol", "papr"]) == 2
    for protocol in ("paper", "native"):
        assert cli.main([*arguments, "--protocol", protocol]) == 0
    frame = ocvtp.results(place, {"benchmark": "pope"}, intervals=True)
    assert dict(zip(frame["protocol"], frame["prompt_template"], strict=True)) == {
        "paper": f"{SYSTEM} USER: <image>\n{{question}} ASSISTANT:",
        "native": "USER: <image>\n{question} ASSISTANT:",
    }
    assert list(frame["ci_high"]) == [0, 0]
    for row in ocvtp.results(place).to_dict("records"):
        score = json.loads((Path(row["path"]) / "score.json").read_text())
        paper = row["protocol"] == "paper"
        assert score["conversation"] == (VICUNA_V1 if paper else OWN)
        assert score["differs_from_paper"] == benchmark(row["benchmark"], row["protocol"]).differs
        assert (score["differs_from_paper"] is None) == paper
        if row["benchmark"] == "pope":
            assert score["primary"] == ("pope_f1_mean" if paper else "pope_f1_score")
            assert score["score"] == score["metrics"][score["primary"]]


def test_answers_by_one_protocol_are_no_answers_by_the_other(
    vicuna_folder: Path, question_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    prepare = Answerer.prepare

    def heard(self: Answerer, conversations: Any) -> Any:
        prepared = prepare(self, conversations)
        read.append(self.vlm.processor.tokenizer.decode(prepared.inputs["input_ids"][0]))
        return prepared

    monkeypatch.setattr(Answerer, "prepare", heard)
    native, paper = (
        EvaluationSetting(str(vicuna_folder), max_new_tokens=2, protocol=protocol)  # type: ignore[arg-type]
        for protocol in ("native", "paper")
    )
    ask(native, "gqa", question_sets, limit=1, journal=tmp_path / "journal")
    with pytest.raises(Incompatible, match="conversation, prompt_template, protocol"):
        ask(paper, "gqa", question_sets, limit=1, journal=tmp_path / "journal")
    ask(paper, "gqa", question_sets, limit=1)
    assert ["curious" in one for one in read] == [False, True], "what was prepared for one is not read by the other"


def test_tiny_llava_is_asked_in_its_own_words(tmp_path: Path, question_sets: Path) -> None:
    found = {
        protocol: evaluate(EvaluationSetting(protocol=protocol), "gqa", question_sets, tmp_path / protocol)  # type: ignore[arg-type]
        for protocol in ("native", "paper")
    }
    assert found["paper"]["conversation"] == OWN
    assert found["paper"].pop("protocol") != found["native"].pop("protocol")
    assert found["paper"] == found["native"]
    assert len(pq.read_table(question_sets / "gqa.parquet")) == found["paper"]["n"]
