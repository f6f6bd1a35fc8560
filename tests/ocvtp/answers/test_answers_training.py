"""Training with the loss `answers`: weights of kept tokens, a short training of tiny-llava, resuming, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ocvtp.answers import Prompt, Teacher, generic, read_prompts, scene_questions, teacher_of
from ocvtp.answers.asking import digest
from ocvtp.data.question_sets import write_benchmarks
from ocvtp.data.questions import POST_PROMPT
from ocvtp.data.scenes import SceneSet, Style, file_name, make_scene, write_scenes
from ocvtp.errors import BadInput, Incompatible
from ocvtp.pruner import OCPruner, PrunerConfig, TrainedFor
from ocvtp.pruner.training import answers
from ocvtp.pruner.training.run import TrainConfig, train
from ocvtp.tokens.extract import ImageRecord, extract_tokens
from ocvtp.tokens.loader import TokenDataset
from ocvtp.vlms import load

RESIDUAL = {"assignment": "residual", "queries": "qr", "truncation": "none", "decoder": None}
FAST = {"loss": "answers", "slots": [4], "batch_size": 8, "steps": 6, "warmup_steps": 2, "eval_every": 3,
        "validation_share": 0.3, "precision": "fp32", "prompts_an_image": 2}  # fmt: skip


def drawn(seed: int, *shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Weights of kept tokens ---


def kept_of(config: dict[str, Any], attention: Any, tokens: Any, mask: Any = None) -> Any:
    return answers.kept(PrunerConfig(8, decoder=None, **config), attention, tokens, mask)


@pytest.mark.parametrize("assignment", ["shared", "distinct", "residual"])
def test_kept_tokens_are_those_of_the_pruned_model_each_with_its_slots_gradient(assignment: str) -> None:
    """Slots' attention is alike in part, so that they pick the same tokens where they may."""
    tokens, logits = drawn(0, 3, 10, 8), (0.3 * drawn(1, 3, 4, 10) + drawn(4, 3, 1, 10)).requires_grad_()
    attention = logits.sigmoid()
    chosen = kept_of({"assignment": assignment}, attention, tokens)
    weights = answers.soft_weights(attention, chosen, 0.5)
    assert chosen.picks_BKk is not None
    for b in range(3):
        kept, picks = chosen.indices_BS[b].tolist(), chosen.picks_BKk[b, :, 0].tolist()
        assert kept == sorted({*kept})
        assert len(kept) == 4
        assert torch.equal(weights[b].detach(), torch.eye(10)[kept])  # forward: itself, exactly
        for place, token in enumerate(kept):
            owners = [k for k, pick in enumerate(picks) if pick == token]
            other = drawn(2, 10)
            (found,) = torch.autograd.grad((weights[b, place] * other).sum(), logits, retain_graph=True)
            if not owners:
                assert not found.any()
                continue
            owner = max(owners, key=lambda k: float(attention[b, k, token].detach()))
            sharp = attention[b, owner] ** 2
            (expected,) = torch.autograd.grad((sharp / sharp.sum() * other).sum(), logits, retain_graph=True)
            torch.testing.assert_close(found, expected)
            assert found.any()
    if assignment == "shared":  # some were filled in
        assert any(len({*row}) < 4 for row in chosen.picks_BKk[:, :, 0].tolist())


def test_images_with_fewer_tokens_than_slots_keep_what_they_have() -> None:
    tokens, attention = drawn(0, 2, 6, 8), drawn(1, 2, 4, 6).softmax(1)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    chosen = kept_of({"assignment": "residual"}, attention * mask[:, None], tokens * mask[:, :, None], mask)
    assert chosen.indices_BS[1].tolist() == [0, 1, 2, -1]
    weights = answers.soft_weights(attention, chosen, 1.0)
    assert torch.equal(weights[1], torch.cat([torch.eye(6)[:3], torch.zeros(1, 6)]))
    assert weights[0].sum().item() == 4


# --- Prompts ---


def test_questions_are_about_the_training_scenes_alone(tmp_path: Path) -> None:
    of = scene_questions(SceneSet(5), 6)
    asked = of(Path(file_name("train", 3)).stem)
    assert len(asked) == 6
    assert all(prompt.text.endswith(f"\n{POST_PROMPT}") and prompt.answer for prompt in asked)
    assert asked == scene_questions(SceneSet(5), 6)("train-000003")
    assert asked != scene_questions(SceneSet(6), 6)("train-000003")
    assert asked != scene_questions(SceneSet(5, Style(small_share=1.0)), 6)("train-000003"), "other shapes are there"
    digit = make_scene(5, "train", 3).digit
    right = {p.answer for p in asked if p.text.startswith(("What number", "What is the number"))}
    assert right <= {digit}
    for other in ("benchmark-000003", "train-3", "photo", "train-"):
        assert of(other) == ()
    write_benchmarks(tmp_path, 4, 5)
    assert not any(of(path.stem) for path in (tmp_path / "images").iterdir())


def test_a_file_and_a_list_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"image": "a", "prompt": "what ?"}\n{"image": "a", "prompt": "who ?", "answer": "me"}\n')
    found = read_prompts(path)
    assert found("a") == [Prompt("what ?"), Prompt("who ?", "me")]
    assert found("b") == ()
    assert digest(found, ["a"]) != digest(generic(["what ?"]), ["a"])
    assert generic(["Describe it."])("anything") == (Prompt("Describe it."),)
    for line in ("[1]", '{"image": "a"}', '{"image": "a", "prompt": " "}', '{"image": 1, "prompt": "x"}', "no"):
        path.write_text('{"image": "a", "prompt": "what ?"}\n' + line + "\n")
        with pytest.raises(BadInput, match=r"asked.jsonl, line 2"):
            read_prompts(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="a list of texts"):
        generic([])


# --- Training ---


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenDataset, list[ImageRecord]]:
    """60 training scenes with tokens of tiny-llava's layer 11."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 60, 0, "train")
    records = [ImageRecord(path.stem, path) for path in sorted((folder / "images").iterdir())]
    shards = extract_tokens(load("tiny-llava"), records, [-2], folder / "tokens")
    return TokenDataset([shards[-2]]), records


@pytest.fixture(scope="module")
def teacher(scenes: Any) -> Teacher:
    """Holds what it has seen through all trainings."""
    return teacher_of(load("tiny-llava"), TrainConfig(**FAST), scenes[1], scenes=SceneSet(0))


def taught(scenes: Any, teacher: Teacher, folder: Path, **options: Any) -> tuple[Any, dict[str, bytes]]:
    dataset, _ = scenes
    config = TrainConfig(**{**FAST, **options})
    metrics = train(PrunerConfig(96, grid=(12, 12), **RESIDUAL), config, dataset, folder, resume=folder / "resume",
                    trained_for=TrainedFor(weights=dataset.meta.weights, layer=-2), teacher=teacher)  # fmt: skip
    return metrics, {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_short_training_lowers_the_divergence_on_images_held_out(scenes: Any, tmp_path: Path) -> None:
    """It is asked for the digit alone, and Gaussian slots learn to keep what shows it."""
    dataset, records = scenes
    config = TrainConfig(**{**FAST, "slots": [3], "steps": 40, "eval_every": 10, "batch_size": 16, "span_weight": 0.1,
                            "prompts": [f"What is the number?\n{POST_PROMPT}"]})  # fmt: skip
    metrics = train(PrunerConfig(96, grid=(12, 12), truncation="none"), config, dataset, tmp_path / "a",
                    resume=tmp_path / "a/resume", teacher=teacher_of(load("tiny-llava"), config, records))  # fmt: skip
    header, *rows = [line.split(",") for line in (tmp_path / "a/curves.csv").read_text().splitlines()]
    validated = [dict(zip(header, row, strict=True)) for row in rows if row[header.index("kl")]]
    assert [row["step"] for row in validated] == ["0", "10", "20", "30", "40"]
    assert metrics["best_step"] > 0
    assert metrics["kl"] < 0.6 * float(validated[0]["kl"])
    assert 0 < 10 * (metrics["val_loss"] - metrics["kl"]) < 1.1  # a tenth of the span error of what slots pick
    saved = OCPruner.from_pretrained(tmp_path / "a")
    assert saved.trained_for.loss == "answers"
    assert saved.decoder is None


class Stop(Exception):
    """Ends a training."""


def test_a_killed_training_that_goes_on_ends_in_the_same_bytes(scenes: Any, teacher: Teacher, tmp_path: Path) -> None:
    """Also with a teacher that has seen nothing yet."""
    _, whole = taught(scenes, teacher, tmp_path / "whole")
    dataset, records = scenes
    config = TrainConfig(**{**FAST, "checkpoint_every": 2})

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        train(PrunerConfig(96, grid=(12, 12), **RESIDUAL), config, dataset, tmp_path / "cut",
              resume=tmp_path / "cut/resume", progress=stop, teacher=teacher,
              trained_for=TrainedFor(weights=dataset.meta.weights, layer=-2))  # fmt: skip
    assert not (tmp_path / "cut/model.safetensors").exists()
    vlm = load("tiny-llava")
    _, again = taught(
        scenes, teacher_of(vlm, config, records, scenes=SceneSet(0)), tmp_path / "cut", checkpoint_every=2
    )
    assert again == whole
    asking = TrainConfig(**{**FAST, "prompts": ["What is the number?"]})
    with pytest.raises(Incompatible, match="another training"):  # by what is asked alone
        taught(scenes, teacher_of(vlm, asking, records), tmp_path / "cut", checkpoint_every=2)


def test_what_cannot_be_taught_is_refused_before_it_begins(scenes: Any, teacher: Teacher, tmp_path: Path) -> None:
    dataset, records = scenes
    config, vlm = TrainConfig(**FAST), load("tiny-llava")

    def begin(teacher: Any, pruner: PrunerConfig | None = None, config: TrainConfig = config, **about: Any) -> None:
        train(pruner or PrunerConfig(96, grid=(12, 12), **RESIDUAL), config, dataset, tmp_path / "no",
              resume=tmp_path / "no/resume", teacher=teacher, trained_for=TrainedFor(**about))  # fmt: skip

    with pytest.raises(BadInput, match=r"needs a VLM that teaches.*none is given"):
        begin(None)
    with pytest.raises(Incompatible, match="weights of another, but the VLM"):
        begin(teacher, vlm="other", weights="of another")
    with pytest.raises(BadInput, match="of use with loss=answers only, loss is span"):
        begin(teacher, config=TrainConfig(loss="span", slots=[4]))
    with pytest.raises(BadInput, match="no prompts or pictures for 59 of 60 training images: train-000001"):
        begin(teacher_of(vlm, config, records[:1], scenes=SceneSet(0)))
    with pytest.raises(BadInput, match="no synthetic scenes"):
        teacher_of(vlm, config, records)
    for given in ("sentences", [], [" "], 3):
        with pytest.raises(BadInput, match=r"prompts is .*Describe the image"):
            TrainConfig(**{**FAST, "prompts": given})
    with pytest.raises(BadInput, match="best_by is val_mse, but loss is answers"):
        TrainConfig(**{**FAST, "best_by": "val_mse"})
    assert not (tmp_path / "no").exists()


def test_a_vlm_of_another_width_is_refused(llava: Any, scenes: Any, tmp_path: Path) -> None:
    vlm = load("tiny-llava")
    entry = replace(vlm.entry, facts=replace(vlm.entry.facts, width=32))
    teacher = Teacher(replace(vlm, entry=entry), lambda _: Image.new("RGB", (96, 96)), generic(["what ?"]))
    with pytest.raises(Incompatible, match="tokens 32 wide, the pruner's token_dim is 96"):
        train(PrunerConfig(96, grid=(12, 12), **RESIDUAL), TrainConfig(**FAST), scenes[0], tmp_path / "no",
              resume=tmp_path / "no/resume", teacher=teacher)  # fmt: skip
