"""From pictures of all sizes to a pruned model that answers: load, extract, train, save, load, prune, ask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp.errors import Incompatible
from ocvtp.evaluation.generate import Answerer
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.provenance import TrainedFor
from ocvtp.pruner.training.run import TrainConfig, train
from ocvtp.tokens.extract import ImageRecord, extract_tokens
from ocvtp.tokens.loader import TokenDataset
from ocvtp.vlms import load

Picture = Callable[..., Image.Image]
SIZES = [(56, 56), (112, 56), (60, 170), (200, 90), (112, 112), (84, 140)]
GRIDS = {
    "llava": [(4, 4)] * 6,
    # Tiles of 4 x 4, one below the other: the whole image, then 2, 2, 4, 3, 4 and 4 of it.
    "llava_next": [(12, 4), (12, 4), (12, 4), (16, 4), (20, 4), (20, 4)],
    "qwen2_5_vl": [(4, 4), (3, 6), (7, 3), (3, 7), (4, 4), (6, 4)],
    "qwen3_vl": [(4, 4), (3, 6), (7, 3), (3, 7), (4, 4), (6, 4)],
    # Tiles of 2 x 2, one below the other, and a thumbnail where there are several.
    "internvl": [(2, 2), (6, 2), (8, 2), (6, 2), (10, 2), (6, 2)],
    "gemma3": [(4, 4)] * 6,
}
TEMPLATE = (
    "{% for message in messages %}<s>{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    " MARK{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)


@pytest.fixture(scope="module", params=["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def vlm(request: pytest.FixtureRequest, make_vlm: Any) -> Any:
    return make_vlm(request.param, 0)


@pytest.fixture
def folder(vlm: Any, tmp_path: Path) -> Path:
    vlm.processor.chat_template = TEMPLATE.replace(" MARK", vlm.mark)
    vlm.model.save_pretrained(tmp_path / "vlm")
    vlm.processor.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


@pytest.fixture
def records(tmp_path: Path, picture_of: Picture) -> list[ImageRecord]:
    found = []
    for number, size in enumerate(SIZES):
        path = tmp_path / f"{number}.png"
        picture_of(number, *size).save(path)
        found.append(ImageRecord(str(number), path))
    return found


def test_a_pruner_is_trained_on_a_family_and_prunes_it(
    vlm: Any, folder: Path, records: list[ImageRecord], tmp_path: Path, picture_of: Picture
) -> None:
    kind = vlm.model.config.model_type
    loaded = load(folder)
    shards = extract_tokens(loaded, records, [2, -2], tmp_path / "tokens", dtype="float32", batch_size=4)
    dataset = TokenDataset([shards[2]])
    assert dataset.grids == GRIDS[kind]
    assert dataset.meta.grid == ((4, 4) if kind in ("llava", "gemma3") else None)
    family = loaded.family.untrimmed()
    for number in (1, 3, 5):  # as the tower has them of the image alone
        images = family.preprocess(loaded.processor, [picture_of(number, *SIZES[number])], mode="pad")
        with torch.no_grad():
            expected = family.encode(images, [2], values=False).tokens(2, [0])[0]
        torch.testing.assert_close(dataset[number].tokens_NC, expected, atol=1e-5, rtol=1e-5)

    trained = TrainedFor(vlm=loaded.name, weights=loaded.weights, layer=2, tower_layer=2)
    config = TrainConfig(steps=3, batch_size=3, slots=(2, 4), validation_share=0.2, eval_every=3)
    metrics = train(
        PrunerConfig(32, grid=dataset.meta.grid or (4, 4), decoder_layers=1), config, dataset, tmp_path / "pruner",
        resume=tmp_path / "resume", trained_for=trained,
    )  # fmt: skip
    assert metrics["steps"] == 3
    assert metrics["bad_steps"] == 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = OCPruner(PrunerConfig(32, decoder=None))
    assert OCPruner.from_pretrained(tmp_path / "pruner", decoder=False).fingerprint != untrained.fingerprint

    kept = answers_of(loaded, tmp_path / "pruner", [picture_of(i, *size) for i, size in enumerate(SIZES)])
    counts = loaded.family.counts(
        loaded.family.preprocess(loaded.processor, [picture_of(i, *size) for i, size in enumerate(SIZES)], mode="pad")
    )
    assert [len(mine) for mine in kept] == [max(1, int(count * 0.3 + 0.5)) for count in counts]


def answers_of(loaded: Any, pruner: Path, pictures: list[Image.Image]) -> list[list[int]]:
    """Numbers of kept tokens of pictures; that a batch of questions has the answers of single ones is checked."""
    questions = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is this ?"}]}]
        for picture in pictures
    ]
    two = [{"type": "image", "image": picture} for picture in pictures[:2]]
    questions.append([{"role": "user", "content": [*two, {"type": "text", "text": "is this red"}]}])
    questions.append([{"role": "user", "content": [{"type": "text", "text": "how many"}]}])
    unpruned = Answerer(loaded, max_new_tokens=5).answer(questions)
    counts = [answer.kept for answer in unpruned]
    assert [len(count) for count in counts] == [1] * 6 + [2, 0]
    assert counts[6] == [*counts[0], *counts[1]]
    with ocvtp.prune(loaded.model, "oc-vtp", "30%", pruner) as handle:
        together = Answerer(loaded, handle, max_new_tokens=5).answer(questions)
        for question, answer in zip(questions, together, strict=True):
            (alone,) = Answerer(loaded, handle, max_new_tokens=5).answer([question])
            assert alone == answer
    assert [answer.text for answer in together[:7]] != [answer.text for answer in unpruned[:7]]
    assert together[7] == unpruned[7]
    for count, answer in zip(counts, together, strict=True):
        assert all(0 <= n < whole for whole, mine in zip(count, answer.kept, strict=True) for n in mine)
    return [answer.kept[0] for answer in together[:6]]


def test_a_pruner_of_another_model_is_refused_by_name(vlm: Any, folder: Path) -> None:
    loaded = load(folder)
    for trained, message in (
        (
            TrainedFor(vlm="llava-1.5-7b", weights="abc", layer=2, tower_layer=2),
            "trained for llava-1.5-7b with weights",
        ),
        (TrainedFor(vlm="llava-1.5-7b", layer=-2, tower_layer=9), r"layer -2, which was hidden_states\[9\]"),
    ):
        with pytest.raises(Incompatible, match=message):
            ocvtp.prune(loaded.model, "oc-vtp", 3, OCPruner(PrunerConfig(32, decoder=None), trained))
    with pytest.raises(Incompatible, match=r"reads tokens of width 48, but the vision tower .* has width 32"):
        ocvtp.prune(loaded.model, "oc-vtp", 3, OCPruner(PrunerConfig(48, decoder=None), TrainedFor(layer=2)))
    assert vlm.model.config.model_type == loaded.model.config.model_type
