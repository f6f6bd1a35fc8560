"""A pruned VLM on a real vLLM answers as `ocvtp.prune` does, and reads as few tokens as was promised."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import serving_models
import torch
from serving_engine import NEW_TOKENS, ROOT, Asked, Engine

import ocvtp
from ocvtp import vlms
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.serving.export import export

pytestmark = pytest.mark.nightly
CSS = {"method": "css", "keep": 16}
Serve = Callable[..., Engine]


@pytest.fixture(scope="session")
def vlm() -> vlms.VLM:
    return vlms.load("tiny-llava", dtype=torch.float32)


def pruned_answers(vlm: vlms.VLM, questions: Sequence[Asked], **how: Any) -> list[tuple[str, int]]:
    """Of `ocvtp.prune`: answers, and tokens of the prompts that the language model reads."""
    found, tokenizer = list[tuple[str, int]](), vlm.processor.tokenizer
    with ocvtp.prune(vlm.model, **how) as handle, torch.no_grad():
        for start in range(0, len(questions), 20):
            part = questions[start : start + 20]
            texts = [
                vlm.processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.text}]}],
                    add_generation_prompt=True,
                )
                for asked in part
            ]
            inputs = vlm.processor(
                text=texts, images=[asked.image for asked in part], return_tensors="pt", padding=True
            )
            output = vlm.model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=_visual(vlm.family) or None
            )
            new = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            whole = inputs["attention_mask"].sum(1).tolist()
            spans = vlm.family.spans(vlm.family.images(inputs))
            kept = [len(row) for row in handle.last_kept]
            found += [(t, n - span + k) for t, n, span, k in zip(new, whole, spans, kept, strict=True)]
    return found


def _visual(family: Any) -> list[int]:
    """Tokens that a model with random weights must not say."""
    return sorted(family.placeholders.values())


def told(answers: Sequence[Any]) -> list[tuple[str, int]]:
    return [(answer.text.strip(), answer.prompt_tokens) for answer in answers]


def stripped(answers: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(text.strip(), tokens) for text, tokens in answers]


def test_answers_and_prompt_tokens_are_those_of_prune(serve: Serve, vlm: vlms.VLM, questions: list[Asked]) -> None:
    expected = stripped(pruned_answers(vlm, questions, **CSS))
    assert len({text for text, _ in expected}) > 5, "questions that have different answers"
    found = told(serve(ocvtp=CSS).ask_all(questions, 8))
    assert found == expected


def test_32_requests_at_once(serve: Serve, questions: list[Asked]) -> None:
    engine = serve(ocvtp=CSS)
    alone = told(engine.ask_all(questions[:32], 1))
    assert told(engine.ask_all(questions[:32] * 3, 32)) == alone * 3


def test_bad_requests_are_told_and_harm_nobody(serve: Serve, questions: list[Asked]) -> None:
    engine = serve(ocvtp=CSS)
    before = told([engine.ask(questions[0])])
    words = questions[0].text
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    for wrong in (
        {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": words}]}]},
        {"messages": [{"role": "user", "content": words + " what" * 600}]},
        {"model": "another"},
        {"max_tokens": -1},
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            engine.ask(questions[0], **wrong)
        assert 400 <= refused.value.status_code < 500, refused.value
    text_only = engine.ask(questions[0], messages=[{"role": "user", "content": words}])
    assert text_only.prompt_tokens == before[0][1] - 16
    assert told([engine.ask(questions[0])]) == before


def test_another_engine_and_a_restarted_one(
    serve: Serve, questions: list[Asked], vlm: vlms.VLM, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    OCPruner(PrunerConfig(vlm.width, grid=(12, 12))).eval().save_pretrained(tmp_path / "pruner")
    how = {"method": "oc-vtp", "keep": 0.05, "pruner": str(tmp_path / "pruner"), "layer": 9, "seed": 3}
    first = told(serve(ocvtp=CSS).ask_all(questions[:20], 4))
    other = told(serve(ocvtp=how).ask_all(questions[:20], 4))
    assert other == stripped(pruned_answers(vlm, questions[:20], **how))
    assert [tokens - 9 for _, tokens in first] == [tokens for _, tokens in other], "16 of 144 tokens, and 7"
    assert told(serve(ocvtp=how, again=True).ask_all(questions[:20], 20)) == other


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (serving_models.llava, {"method": "css", "keep": 16, "layer": 9, "inside_tower": True}),
        (serving_models.llava_next, {"method": "visionzip", "keep": 64}),
        (serving_models.qwen2_5_vl, {"method": "random", "keep": 0.3, "seed": 1}),
        (serving_models.qwen2_5_vl, {"method": "css", "keep": 12, "layer": 3}),
        (serving_models.qwen3_vl, {"method": "css", "keep": 0.3}),
        (serving_models.qwen3_vl, {"method": "random", "keep": 9, "seed": 2}),
    ],
)
def test_other_families(
    serve: Serve, questions: list[Asked], tmp_path: Path, make: Callable[[Path], Path], how: dict[str, Any]
) -> None:
    """Images of several sizes, and so of several numbers of tokens and, for Qwen, places in a picture."""
    folder = make(tmp_path / "model")
    other = vlms.load(folder, dtype=torch.float32)
    sizes = [(96, 96), (192, 96), (80, 160), (64, 64), (176, 192), (48, 96)]
    asked = [Asked(q.image.resize(sizes[i % len(sizes)]), q.text) for i, q in enumerate(questions[:48])]
    expected = stripped(pruned_answers(other, asked, **how))
    bias = dict.fromkeys(map(str, _visual(other.family)), -100)
    engine = serve(folder, ocvtp=how)
    assert told(engine.ask_all(asked, 8, logit_bias=bias)) == expected
    assert told(engine.ask_all(asked * 2, 32, logit_bias=bias)) == expected * 2, "from caches, too"
    assert len({text for text, _ in expected}) > 3


def test_a_model_without_the_entry_is_vllms_own(
    serve: Serve, questions: list[Asked], vlm: vlms.VLM, tmp_path: Path
) -> None:
    export("tiny-llava", tmp_path / "served")
    whole = told(serve(tmp_path / "served").ask_all(questions[:10], 4))
    assert whole == stripped(pruned_answers(vlm, questions[:10], method="vanilla"))


def test_a_compiled_engine(
    stopped: None, vlm: vlms.VLM, questions: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM serves unless told `--enforce-eager`: the language model by torch.compile."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # nothing is compiled before
    expected = stripped(pruned_answers(vlm, questions[:40], **CSS))
    with Engine(vlms.resolve("tiny-llava").folder, {"ocvtp": CSS}, tmp_path / "log", eager=False) as engine:
        assert told(engine.ask_all(questions[:40], 8)) == expected
    for compiled in (
        "enforce_eager=False",
        "'backend': 'inductor'",
        "Warming up model for the compilation",
        "up done.",
    ):
        assert compiled in engine.said()


def test_the_benchmark_runs(stopped: None, environment: Path) -> None:
    command = [str(environment / "bin/python"), str(ROOT / "benchmarks/serving.py")]
    done = subprocess.run(
        [*command, "--quick", "--methods", "css", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout)["cases"]
    assert cases["vanilla"]["prompt_tokens"] - cases["css"]["prompt_tokens"] == 144 - 16
    assert all(case["requests_per_second"] > 0 < case["first_token_ms"] for case in cases.values())


@pytest.mark.parametrize(
    ("make", "section", "why"),
    [
        (
            serving_models.llava,
            {"method": "css", "keep": 145},
            "keep is 145, but an image has 144 tokens",
        ),
        (serving_models.onevision, CSS, "ocvtp does not prune LlavaOnevisionForConditionalGeneration in vLLM"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(
    stopped: None, tmp_path: Path, make: Callable[[Path], Path], section: dict[str, Any], why: str
) -> None:
    limits = ("--limit-mm-per-prompt", '{"image": 1, "video": 0}')  # no dummy video of OneVision's is made
    engine = Engine(make(tmp_path / "model"), {"ocvtp": section}, tmp_path / "log", *limits)
    engine.begin()
    try:
        assert engine.process.wait(600) != 0
    finally:
        engine.end()
    assert why in engine.said()
