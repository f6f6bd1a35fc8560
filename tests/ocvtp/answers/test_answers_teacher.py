"""The VLM that teaches says what the pruned and the unpruned model say, whatever the batch and the family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp.answers import Prompt, Teacher
from ocvtp.errors import BadInput, Incompatible
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.training import answers
from ocvtp.vlms import load
from ocvtp.vlms.families.llava_next import paper_mode

SIZES = [(56, 56), (112, 56), (60, 170), (112, 112)]
TEMPLATE = (
    "{% for message in messages %}<s>{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    " MARK{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)
PROMPTS = (Prompt("what is this ?"), Prompt("how many red are there in the image ?", "blue square is red"),
           Prompt("is this blue : is this red", "red"))  # fmt: skip


@pytest.fixture
def folder(vlm: Any, tmp_path: Path) -> Path:
    """Of a model of each family."""
    mark = "<vision> <image> </vision>" if "Qwen" in type(vlm.model).__name__ else "<image>"
    vlm.processor.chat_template = TEMPLATE.replace("MARK", mark)
    vlm.model.save_pretrained(tmp_path / "vlm")
    vlm.processor.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


def loaded(folder: Path) -> Any:
    """LLaVA-NeXT as the papers have it: a model in another mode reads the same tokens with others beside them."""
    found = load(folder)
    if "Next" in type(found.model).__name__:
        paper_mode(found.model, found.processor)
    return found


def teacher_of(vlm: Any, picture_of: Callable[..., Image.Image], **options: Any) -> Teacher:
    return Teacher(vlm, lambda name: picture_of(int(name), *SIZES[int(name)]), lambda _: PROMPTS, **options)


def pruner_of(vlm: Any, **options: Any) -> OCPruner:
    torch.manual_seed(0)
    config = {"queries": "qr", "assignment": "residual", "truncation": "none", "decoder": None, **options}
    return OCPruner(PrunerConfig(vlm.width, **config))


def tokens_of(vlm: Any, picture_of: Callable[..., Image.Image], names: list[str]) -> tuple[Any, Any]:
    """Of layer 2, and their mask."""
    images = vlm.preprocess([picture_of(int(name), *SIZES[int(name)]) for name in names])
    counts = torch.tensor([rows * columns for rows, columns in vlm.grids(images)])
    tokens = vlm.tower(images, [2])[2].clone()
    return tokens, torch.arange(tokens.shape[1]) < counts[:, None]


def divergence(teacher: Teacher, pruner: OCPruner, tokens: Any, mask: Any, names: list[str], slots: int) -> Any:
    out = pruner(tokens, slots, mask=mask)
    chosen = answers.kept(pruner.config, out.attention, tokens, mask)
    return teacher.divergence(names, chosen.indices_BS, answers.soft_weights(out.attention, chosen, 1.0), None), chosen


def said(vlm: Any, picture: Image.Image, prompt: Prompt) -> Any:
    """The model's own distributions at the places of an answer, through its own forward."""
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.text}]}]
    text = vlm.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    answer = prompt.answer.split()
    text = " ".join([text, *answer[:-1]])
    picture = vlm.family.prepare(vlm.processor, picture)
    inputs = vlm.processor(text=[text], images=[picture], return_tensors="pt")
    with torch.no_grad():
        return vlm.model(**inputs).logits[0, -max(1, len(answer)) :].log_softmax(1)


@pytest.mark.parametrize("slots", [2, 5])
def test_it_is_the_divergence_of_the_pruned_model_from_the_whole_one(
    folder: Path, picture_of: Callable[..., Image.Image], slots: int
) -> None:
    """Of the stock model, called as anybody calls it; and each image of the batch has its own."""
    vlm = loaded(folder)
    teacher, pruner = teacher_of(vlm, picture_of), pruner_of(vlm)
    names = ["0", "1", "2", "3"]
    tokens, mask = tokens_of(vlm, picture_of, names)
    found, chosen = divergence(teacher, pruner, tokens, mask, names, slots)
    for b, name in enumerate(names):
        picture, errors = picture_of(int(name), *SIZES[int(name)]), []
        for prompt in PROMPTS:
            with ocvtp.prune(vlm.model, "oc-vtp", keep=1.0, pruner=pruner, layer=2):
                whole = said(vlm, picture, prompt)
            with ocvtp.prune(vlm.model, "oc-vtp", keep=slots, pruner=pruner, layer=2) as handle:
                pruned = said(vlm, picture, prompt)
                assert handle.last_kept == [chosen.indices_BS[b].tolist()]
            errors.append((whole.exp() * (whole - pruned)).sum(1).mean())
        assert found[b].item() == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3, abs=1e-6)
        assert found[b].item() > 1e-4


def test_batches_are_singles_and_all_tokens_are_no_divergence(
    folder: Path, picture_of: Callable[..., Image.Image]
) -> None:
    vlm = load(folder)
    teacher, pruner = teacher_of(vlm, picture_of), pruner_of(vlm)
    names = ["0", "1", "2", "3"]
    tokens, mask = tokens_of(vlm, picture_of, names)
    together, _ = divergence(teacher, pruner, tokens, mask, names, 3)
    for b, name in enumerate(names):
        count = int(mask[b].sum())
        alone, _ = divergence(teacher, pruner, tokens[b : b + 1, :count], None, [name], 3)
        torch.testing.assert_close(alone[0], together[b], rtol=1e-3, atol=1e-6)
        everything = torch.eye(count)[None]
        assert teacher.divergence([name], torch.arange(count)[None], everything, None).item() == pytest.approx(
            0, abs=1e-5
        )
    twice = teacher.divergence(["1", "1"], *[torch.stack([part, part]) for part in (torch.tensor([0, 3]),
                               torch.eye(int(mask[1].sum()))[[0, 3]])], None)  # fmt: skip
    torch.testing.assert_close(twice[0], twice[1])


def test_gradients_reach_the_pruner_alone_and_say_which_tokens_help(
    folder: Path, picture_of: Callable[..., Image.Image]
) -> None:
    """Backward it is the derivative by the rows that the language model reads, times the slots' weights over tokens."""
    vlm = load(folder)
    teacher, pruner = teacher_of(vlm, picture_of), pruner_of(vlm)
    names = ["0", "2"]
    tokens, mask = tokens_of(vlm, picture_of, names)
    loss, _ = divergence(teacher, pruner, tokens, mask, names, 3)
    loss.sum().backward()
    assert all(parameter.grad is None for parameter in vlm.model.parameters())
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
    gradients = [p.grad for p in (*pruner.project.parameters(), pruner.slot_attention.to_k.weight)]
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)

    kept = torch.tensor([[0, 4, 7]])
    weights = torch.eye(int(mask[0].sum()))[kept[0]][None].requires_grad_()
    teacher.divergence(["0"], kept, weights, None).sum().backward()
    step = torch.zeros_like(weights)
    step[0, 1, 9] = 1e-2
    with torch.no_grad():
        ahead, behind = (teacher.divergence(["0"], kept, weights + sign * step, None).item() for sign in (1, -1))
    assert weights.grad is not None
    assert weights.grad[0, 1, 9].item() == pytest.approx((ahead - behind) / 2e-2, rel=0.05, abs=1e-3)


def test_what_is_held_in_memory_changes_nothing(folder: Path, picture_of: Callable[..., Image.Image]) -> None:
    vlm = load(folder)
    pruner, names = pruner_of(vlm), ["0", "3"]
    tokens, mask = tokens_of(vlm, picture_of, names)
    held, none = teacher_of(vlm, picture_of), teacher_of(vlm, picture_of, memory_budget=0)
    first, _ = divergence(held, pruner, tokens, mask, names, 3)
    again, _ = divergence(held, pruner, tokens, mask, names, 3)
    anew, _ = divergence(none, pruner, tokens, mask, names, 3)
    assert torch.equal(first, again)
    assert torch.equal(first, anew)
    assert (len(held._seen), len(held._answers), len(none._seen)) == (2, 6, 0)


def test_a_step_draws_some_prompts_of_each_image(
    llava: Any, folder: Path, picture_of: Callable[..., Image.Image]
) -> None:
    teacher = teacher_of(load(folder), picture_of, prompts_a_step=2)
    drawn = [teacher._drawn("1", draw) for draw in range(40)]
    assert {len(one) for one in drawn} == {2}
    assert {tuple(one) for one in drawn} == {(0, 1), (0, 2), (1, 2)}
    assert drawn == [teacher._drawn("1", draw) for draw in range(40)]
    assert drawn != [teacher._drawn("2", draw) for draw in range(40)]
    assert teacher._drawn("1", None) == [0, 1, 2]


def test_what_cannot_be_taught_is_refused(folder: Path, picture_of: Callable[..., Image.Image]) -> None:
    vlm = load(folder)
    teacher = Teacher(vlm, lambda name: picture_of(int(name)), lambda name: PROMPTS if name == "0" else ())
    with pytest.raises(BadInput, match="no prompts or pictures for 2 of 3 training images: 1, 7"):
        teacher.check(["0", "1", "7"])
    with pytest.raises(Incompatible, match=r"image 0 has \d+ tokens here, but tokens on disk are 3"):
        teacher.divergence(["0"], torch.tensor([[1]]), torch.eye(3)[None, 1:2], None)
    with (
        ocvtp.prune(vlm.model, "random", keep=0.5),
        pytest.raises(BadInput, match="is pruned: call remove"),
    ):
        Teacher(vlm, lambda name: picture_of(int(name)), lambda _: PROMPTS)
