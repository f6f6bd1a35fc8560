"""tiny-llava: the shipped weights answer as their card says, and the way it is trained is sound."""

from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ocvtp.data.questions import KINDS, POST_PROMPT, ask, write_benchmarks
from ocvtp.data.scenes import make_scenes
from pipelines.tiny import language
from pipelines.tiny.loop import Schedule, fit
from pipelines.tiny.model import make_model, make_tokenizer
from pipelines.tiny.pool import make_pool

FOLDER = Path(__file__).parents[2] / "ocvtp/vlms/tiny_llava"
PROMISED = {"existence": 0.90, "color": 0.85, "shape": 0.80}


@pytest.fixture(scope="module")
def shipped():
    """Loaded as any user would."""
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(FOLDER)


def test_the_files_are_small_and_in_bfloat16() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size < 8_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_it_answers_questions_about_unseen_scenes(shipped) -> None:
    model, processor = shipped
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for start in range(0, 320, 64):
        asked, images = [], []
        for scene in make_scenes(11, "benchmark", start + 64):
            if scene.index < start:
                continue
            for kind in KINDS:
                question = ask(scene, kind, np.random.default_rng([5, scene.index]))
                if question is not None:
                    asked.append(question)
                    images.append(Image.fromarray(scene.pixels_HW3))
        texts = [f"USER: <image>\n{q.text}\n{POST_PROMPT} ASSISTANT:" for q in asked]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, answer in zip(asked, said, strict=True):
            right[question.kind].append(answer.strip() == question.answer)
            answers[question.kind][question.answer] += 1
    found = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    for kind, promised in PROMISED.items():
        sampling = 2 * (promised * (1 - promised) / len(right[kind])) ** 0.5
        assert found[kind] >= promised - sampling, found
    for kind in ("count", "digit"):
        constant = max(answers[kind].values()) / sum(answers[kind].values())
        assert found[kind] > constant + 0.25, (kind, found[kind], constant)


def test_every_word_of_the_benchmarks_is_in_its_vocabulary(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_benchmarks(tmp_path, 40, seed=9)
    tokenizer = make_tokenizer()
    for name in ("gqa", "mme", "pope", "textvqa"):
        for row in pq.read_table(tmp_path / f"{name}.parquet", columns=["question"]).to_pylist():
            text = row["question"].replace(" Please answer yes or no.", "").capitalize()
            ids = tokenizer(f"USER: <image>\n{text}\n{POST_PROMPT} ASSISTANT:").input_ids
            assert tokenizer.unk_token_id not in ids, row["question"]


def test_a_packed_question_stands_as_if_it_were_alone() -> None:
    pool = make_pool(0, "vlm", 4, workers=1)
    torch.manual_seed(0)
    model, asker = make_model(), language.Asker(make_tokenizer(), 5)
    words = language.TextScenes(asker.tokenizer)
    rng, indices = np.random.default_rng(0), np.arange(4)
    chosen_BV = language.choose_tokens(pool, indices, 20, rng)
    packed = asker.pack(list(pool.scenes), rng)
    with torch.no_grad():
        vision_BVD = words(model.get_input_embeddings(), pool, indices, chosen_BV)
        _, together = language.answer_losses(model, vision_BVD, packed, (1, 5))
        for q in range(5):
            alone = language.Packed(packed.ids_BQL[:, q : q + 1], packed.labels_BQL[:, q : q + 1])
            _, single = language.answer_losses(model, vision_BVD, alone, (1, 5))
            torch.testing.assert_close(together[:, q], single[:, 0], atol=1e-5, rtol=1e-5)


def test_kept_tokens_are_ascending_and_favour_objects() -> None:
    pool = make_pool(0, "vlm", 60, workers=1)
    chosen_BV = language.choose_tokens(pool, np.arange(60), 16, np.random.default_rng(1))
    assert (chosen_BV.diff(dim=1) > 0).all()
    centres = pool.center_SP.gather(1, chosen_BV).sum() / pool.center_SP.sum()
    assert 0.7 < centres < 0.98, "three images in four keep the middle of each object"


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tiny.loop.CHECKPOINT_EVERY", 3)

    def run(folder: Path, steps: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        part = nn.Linear(4, 4)

        def losses(step: int) -> dict[str, torch.Tensor]:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            if step == steps:
                raise KeyboardInterrupt
            return {"loss": (part(x) - x.flip(1)).square().mean()}

        with suppress(KeyboardInterrupt):
            fit("part", nn.ModuleDict({"part": part}), losses, Schedule(9, 1e-2), folder, device="cpu")
        return {name: tensor.detach().clone() for name, tensor in part.named_parameters()}

    calm = run(tmp_path / "calm", 99)
    run(tmp_path / "cut", 5)
    resumed = run(tmp_path / "cut", 99)
    assert all(torch.equal(calm[name], resumed[name]) for name in calm)
