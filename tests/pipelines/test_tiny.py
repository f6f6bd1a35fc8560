"""tiny-llava and tiny-qwen: the shipped weights answer as their cards say, and the way they are trained is sound."""

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

from ocvtp.data.question_sets import write_benchmarks
from ocvtp.data.questions import KINDS, POST_PROMPT, ask
from ocvtp.data.scenes import make_scenes
from ocvtp.vlms import resolve
from pipelines.tiny import language, tower
from pipelines.tiny.__main__ import ARCHITECTURES
from pipelines.tiny.architecture import Architecture
from pipelines.tiny.loop import fit
from pipelines.tiny.maker import encoder
from pipelines.tiny.pool import Pool, label, make_scenes_by_size
from pipelines.tiny.recipe import Schedule

PROMISED = {
    "tiny-llava": {"existence": 0.90, "color": 0.85, "shape": 0.80},
    "tiny-qwen": {"existence": 0.88, "color": 0.87, "shape": 0.75},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Each in turn."""
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def shipped(architecture: Architecture):
    """Loaded as any user would."""
    folder = resolve(architecture.name).folder
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pool(architecture: Architecture) -> Pool:
    """Scenes of one size, labelled token by token."""
    scenes = max(make_scenes_by_size(0, "vlm", 250, architecture.style, workers=1), key=len)
    return label(scenes, architecture.patch * architecture.merge)


def test_the_files_are_small_and_in_bfloat16(architecture: Architecture) -> None:
    path = resolve(architecture.name).folder / "model.safetensors"
    assert path.stat().st_size < 8_000_000
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) < 3_000_000


def test_it_answers_questions_about_unseen_scenes(architecture: Architecture, shipped) -> None:
    model, processor = shipped
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    scenes = list(make_scenes(11, "benchmark", 320, architecture.style))
    for start in range(0, len(scenes), 64):
        asked, images = [], []
        for scene in scenes[start : start + 64]:
            for kind in KINDS:
                question = ask(scene, kind, np.random.default_rng([5, scene.index]))
                if question is not None:
                    asked.append(question)
                    images.append(Image.fromarray(scene.pixels_HW3))
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{q.text}\n{POST_PROMPT}"}]}
                for q in asked]  # fmt: skip
        texts = [processor.apply_chat_template([one], add_generation_prompt=True) for one in said]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, answer in zip(asked, said, strict=True):
            right[question.kind].append(answer.strip() == question.answer)
            answers[question.kind][question.answer] += 1
    found = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    for kind, promised in PROMISED[architecture.name].items():
        sampling = 2 * (promised * (1 - promised) / len(right[kind])) ** 0.5
        assert found[kind] >= promised - sampling, found
    for kind in ("count", "digit"):
        constant = max(answers[kind].values()) / sum(answers[kind].values())
        assert found[kind] > constant + 0.25, (kind, found[kind], constant)


def test_every_word_of_the_benchmarks_is_in_its_vocabulary(architecture: Architecture, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_benchmarks(tmp_path, 40, seed=9)
    tokenizer = architecture.make_processor().tokenizer
    for name in ("gqa", "mme", "pope", "textvqa"):
        for row in pq.read_table(tmp_path / f"{name}.parquet", columns=["question"]).to_pylist():
            text = row["question"].replace(" Please answer yes or no.", "").capitalize()
            ids = tokenizer(f"{architecture.lead}{architecture.tail}{text}\n{POST_PROMPT} ASSISTANT:").input_ids
            assert tokenizer.unk_token_id not in ids, row["question"]


def test_a_packed_question_stands_as_if_it_were_alone(architecture: Architecture, pool: Pool) -> None:
    torch.manual_seed(0)
    model, asker = architecture.make_model().eval(), language.Asker(architecture, 5)
    rng, indices = np.random.default_rng(0), np.arange(4)
    chosen_BV = language.choose_tokens(pool, indices, 9, rng)
    packed = asker.pack(list(pool.scenes[:4]), rng)
    with torch.no_grad():
        words = language.TextScenes(asker.tokenizer)
        said_BVD = words(model.get_input_embeddings(), pool, indices, chosen_BV)
        shown = language.Shown(said_BVD, chosen_BV, pool.grid)
        _, together = language.answer_losses(architecture, model, shown, packed, asker)
        for q in range(5):
            alone = language.Packed(packed.ids_BQL[:, q : q + 1], packed.labels_BQL[:, q : q + 1])
            _, single = language.answer_losses(architecture, model, shown, alone, asker)
            torch.testing.assert_close(together[:, q], single[:, 0], atol=1e-5, rtol=1e-5)


def test_training_computes_what_the_saved_model_does(architecture: Architecture, pool: Pool, shipped) -> None:
    """Features of a batch of one size, projected and packed, against transformers' own forward with its processor."""
    model, processor = shipped
    asker, indices = language.Asker(architecture, 1), np.arange(3)
    packed = asker.pack(list(pool.scenes[:3]), np.random.default_rng(0))
    torch.manual_seed(0)
    ours = architecture.make_model().eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        features = tower.all_features(architecture, ours, (pool,), "cpu")
        features[0] = architecture.features(ours, pool.pixels(indices))  # as they are, not in bfloat16
        chosen_BV = torch.arange(pool.center_SP.shape[1]).expand(3, -1)
        shown_BVX = encoder(architecture, ours, features, "cpu")(0, indices, chosen_BV)
        shown = language.Shown(shown_BVX, chosen_BV, pool.grid)
        _, found_B1LK = language.answer_losses(architecture, ours, shown, packed, asker)
        image = processor.image_token
        for b in range(3):
            inputs = processor(
                text=f"{architecture.lead}{image}{architecture.tail}",
                images=Image.fromarray(pool.scenes[b].pixels_HW3),
                return_tensors="pt",
            )
            more = packed.ids_BQL[b]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
            wanted_1NK = model(**inputs).logits
            torch.testing.assert_close(found_B1LK[b], wanted_1NK[:, -more.shape[1] :], atol=2e-4, rtol=2e-4)


def test_kept_tokens_are_ascending_and_favour_objects(pool: Pool) -> None:
    tokens = pool.center_SP.shape[1]
    draws = [
        language.choose_tokens(pool, np.arange(len(pool)), tokens // 4, np.random.default_rng(n)) for n in range(9)
    ]
    for chosen_BV in draws:
        assert (chosen_BV.diff(dim=1) > 0).all()
    kept = sum(int(pool.center_SP.gather(1, chosen_BV).sum()) for chosen_BV in draws)
    assert 0.6 < kept / (len(draws) * int(pool.center_SP.sum())) < 0.98, "three images in four keep middles of objects"


def test_a_drawn_number_of_tokens_lies_between_the_fewest_and_all() -> None:
    rng = np.random.default_rng(0)
    found = [language.draw_kept(36, rng, most=1.0, all_share=0.3) for _ in range(500)]
    assert (min(found), max(found)) == (2, 36)
    assert 0.25 < np.mean(np.array(found) == 36) < 0.4


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
