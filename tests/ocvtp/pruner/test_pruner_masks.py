"""The loss `masks` and `assignment: mass`."""

import csv
import itertools
import json
import math

import pytest
import torch
from pruner_training import PRUNER, Source, files, run

from ocvtp.errors import BadInput
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.config import CHOICES
from ocvtp.pruner.training.coverage_loss import covered, missed
from ocvtp.pruner.training.run import TrainConfig, train
from ocvtp.selection import css
from ocvtp.selection.proposals import sample, slot_mass

SEGMENTED = PrunerConfig(**{**PRUNER.to_dict(), "assignment": "mass", "truncation": "none"})
SMALL = {"slots": [2, 4], "batch_size": 4, "steps": 6, "warmup_steps": 2, "eval_every": 2, "validation_share": 0.2}


class Regions:
    """The four regions of an image of `Source`, of which the last of every second image is no object."""

    @property
    def identity(self):
        return {"regions": 4}

    def check(self, images):
        if unknown := [image for image in images if not image.startswith("image-")]:
            raise BadInput(f"nothing is known of {unknown}")

    def touched(self, images, grids, count):
        found = torch.zeros(len(images), 4, count, dtype=torch.bool)
        for number, image in enumerate(images):
            for region in range(3 + int(image.rpartition("-")[2]) % 2):
                found[number, region, 4 * region : 4 * region + 4] = True
        return found


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segmented(tmp_path, name, pruner=SEGMENTED, source=None, **options):
    config = TrainConfig(**{**SMALL, "loss": "masks", **options})
    metrics = train(pruner, config, source or Source(), tmp_path / name, resume=tmp_path / f"{name}-r",
                    objects=Regions())  # fmt: skip
    return metrics, files(tmp_path / name)


# --- The loss ---


def test_it_is_the_expected_number_of_objects_without_a_pick():
    """Against all ways in which three slots can draw tokens."""
    attention = drawn(0, 2, 3, 5).softmax(1)
    touched = drawn(1, 2, 4, 5) > 0
    touched[1, 2:] = False  # an image with fewer objects
    expected = 0.0
    for image in range(2):
        odds = attention[image] / attention[image].sum(1, keepdim=True)
        for picks in itertools.product(range(5), repeat=3):
            chance = math.prod(float(odds[slot, token]) for slot, token in enumerate(picks))
            gone = sum(bool(mask.any()) and not any(mask[token] for token in picks) for mask in touched[image])
            expected += chance * gone / 2
    assert missed(attention, touched).item() == pytest.approx(expected, rel=1e-4)
    sharp = attention**4 / (attention**4).sum(2, keepdim=True)
    assert missed(attention, touched, temperature=0.25).item() == pytest.approx(missed(sharp, touched).item(), rel=1e-4)


def test_without_objects_nothing_is_missed_and_gradients_are_finite():
    logits = drawn(2, 2, 3, 5).requires_grad_()
    for touched in (torch.zeros(2, 0, 5, dtype=torch.bool), torch.ones(2, 1, 5, dtype=torch.bool)):
        loss = missed(logits.softmax(1), touched)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()


def test_an_object_is_covered_if_a_kept_token_lies_on_it():
    touched = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], [[0] * 4] * 3]).bool()
    assert covered(torch.tensor([[1, 3], [0, 1]]), touched).tolist() == [0.5, 1]
    assert covered(torch.tensor([[2, -1], [-1, -1]]), touched).tolist() == [0.5, 1]
    assert covered(torch.tensor([[0, 2], [0, 1]]), touched).tolist() == [1, 1]


# --- The choice ---


def test_slot_mass_is_how_often_slots_draw_a_token():
    attention = drawn(3, 2, 4, 6).softmax(1)
    attention[1, 3] = 0  # a slot that does not exist
    found = slot_mass(attention)
    expected = sum(attention[:, slot] / attention[:, slot].sum(1, keepdim=True).clamp(min=1e-30) for slot in range(4))
    torch.testing.assert_close(found, expected)
    assert found.sum(1).tolist() == pytest.approx([4, 3])


@pytest.mark.parametrize("power", [0.0, 0.1, 1.0])
def test_mass_is_column_subset_selection_with_weights(power):
    """Against the rule in plain loops: what least squares leave, after each token that could be next."""
    pruner = OCPruner(SEGMENTED).eval()
    tokens = drawn(4, 3, 16, 16)
    chosen = pruner.select_details(tokens, 5, mass_power=power)
    weights = slot_mass(chosen.attention_BKN).double() ** power

    def left(image, kept):
        centred = (tokens[image] - tokens[image].mean(0)).double()
        basis = torch.linalg.qr(centred[kept].T).Q if kept else centred.new_zeros(16, 0)
        return (centred - centred @ basis @ basis.T).square().sum()

    for image in range(3):
        kept = []
        while len(kept) < 5:
            gains = {n: (left(image, kept) - left(image, [*kept, n])) * weights[image, n] for n in range(16)
                     if n not in kept}  # fmt: skip
            kept.append(max(gains, key=gains.get))
        assert chosen.indices_BS[image].tolist() == sorted(kept)
    if power == 0:
        assert torch.equal(chosen.indices_BS, css(tokens, 5))
    assert chosen.distinct_B.tolist() == [5] * 3


def test_a_padded_batch_is_what_its_images_are_alone():
    pruner = OCPruner(SEGMENTED).eval()
    tokens = drawn(5, 3, 16, 16)
    mask = torch.arange(16) < torch.tensor([16, 9, 3])[:, None]
    together = pruner.select(tokens, 4, mask=mask, seeds=[1, 2, 3])
    for image, count in enumerate((16, 9, 3)):
        alone = pruner.select(tokens[image : image + 1, :count], 4, seeds=[image + 1])[0]
        assert together[image][together[image] >= 0].tolist() == alone.tolist()
    several = pruner.select(tokens, [4, 2, 6], seeds=[1, 2, 3])
    assert (several >= 0).sum(1).tolist() == [4, 2, 6]
    doubled = pruner.select(tokens, 6, top_k=2)
    assert [len({*row}) for row in doubled.tolist()] == [6] * 3


def test_tokens_that_say_nothing_more_are_kept_all_the_same():
    """Constant ones, and of a rank below the number of slots; NaN is refused."""
    pruner = OCPruner(SEGMENTED).eval()
    flat = drawn(12, 2, 1, 16).expand(2, 16, 16)
    low = drawn(13, 2, 16, 2) @ drawn(14, 2, 2, 16)
    for tokens in (flat, low):
        kept = pruner.select(tokens, 7)
        assert [sorted({*row}) for row in kept.tolist()] == kept.tolist()
        assert kept.shape == (2, 7)
    with pytest.raises(BadInput, match=r"image 1 .* NaN"):
        pruner.select(torch.stack((low[0], torch.full((16, 16), torch.nan))), 7)


def test_drawn_sets_follow_the_same_weights():
    attention, tokens = drawn(6, 4, 3, 9).softmax(1), drawn(7, 4, 9, 5)
    everywhere = torch.ones(4, 9, dtype=torch.bool)
    found, logarithm = sample(attention.requires_grad_(), tokens, everywhere, torch.zeros(4, 3, 9), "mass", 1e-3, 0.5)
    pruner = slot_mass(attention.detach()) ** 0.5
    assert found.sort(1).values.tolist() == _greedy(tokens, pruner, 3)
    (gradient,) = torch.autograd.grad(logarithm.sum(), attention)
    assert gradient.isfinite().all()


def _greedy(tokens, weights, keep):
    found = []
    for image, weight in zip(tokens.double(), weights.double(), strict=True):
        rest, kept = image - image.mean(0), []
        for _ in range(keep):
            inner = rest @ rest.T
            gains = inner.square().sum(1) / inner.diagonal().clamp(min=1e-12) * weight
            gains[kept] = -1
            kept.append(int(gains.argmax()))
            unit = rest[kept[-1]] / rest[kept[-1]].norm()
            rest = rest - (rest @ unit)[:, None] * unit
        found.append(sorted(kept))
    return found


@pytest.mark.parametrize("bad", [-1, math.nan, "much"])
def test_a_power_that_is_none_is_refused(bad):
    with pytest.raises(BadInput, match="mass_power is"):
        PrunerConfig(token_dim=16, assignment="mass", mass_power=bad)
    with pytest.raises(BadInput, match=r"mass_power is 0\.5, but assignment is gain: it is of mass alone"):
        PrunerConfig(token_dim=16, assignment="gain", mass_power=0.5)
    with pytest.raises(BadInput, match="mass_power is"):
        OCPruner(SEGMENTED).select(drawn(8, 1, 16, 16), 4, mass_power=bad)


def test_what_picks_leave_may_be_that_of_the_layer_that_goes_on():
    """Slots gather the one, residuals are those of the other."""
    config = PrunerConfig(**{**SEGMENTED.to_dict(), "residual_of": "handed_on"})
    pruner = OCPruner(config).eval()
    tokens, handed_on = drawn(9, 3, 16, 16), drawn(10, 3, 16, 24)
    chosen = pruner.select_details(tokens, 5, handed_on=handed_on, mass_power=0.5)
    assert chosen.indices_BS.tolist() == _greedy(handed_on, slot_mass(chosen.attention_BKN) ** 0.5, 5)
    assert torch.equal(pruner.select(tokens, 5, handed_on=handed_on, mass_power=0), css(handed_on, 5))
    assert torch.equal(
        pruner.select(tokens, 5, assignment="gain", handed_on=tokens),
        OCPruner.select(_own(pruner), tokens, 5, assignment="gain"),
    )
    pruner.select(tokens, 5, assignment="shared")  # looks at no residual
    with pytest.raises(BadInput, match="residual_of is handed_on: the same tokens in the layer"):
        pruner.select(tokens, 5)
    with pytest.raises(BadInput, match=r"handed_on \[2, 16, 24\] of tokens \[3, 16, 16\]"):
        pruner.select(tokens, 5, handed_on=handed_on[:2])


def _own(pruner):
    """The same weights, which judge by the tokens that they read."""
    made = OCPruner(SEGMENTED).eval()
    made.load_state_dict(pruner.state_dict())
    return made


# --- Training ---


def test_it_trains_without_a_decoder_and_resumes_to_the_same_bytes(tmp_path):
    metrics, expected = segmented(tmp_path, "whole")
    assert json.loads(expected["config.json"])["decoder"] is None
    assert 0 < metrics["cover"] <= 1
    assert metrics["val_loss"] > 0
    assert OCPruner.from_pretrained(tmp_path / "whole").trained_for.loss == "masks"

    class Killed(BaseException):
        pass

    def kill(done, total, note):
        if done == 3:
            raise Killed

    config = TrainConfig(**{**SMALL, "loss": "masks", "checkpoint_every": 3})
    with pytest.raises(Killed):
        train(SEGMENTED, config, Source(), tmp_path / "cut", resume=tmp_path / "r", progress=kill, objects=Regions())
    train(SEGMENTED, config, Source(), tmp_path / "cut", resume=tmp_path / "r", objects=Regions())
    assert files(tmp_path / "cut") == expected


def test_it_learns_to_give_each_object_a_slot(tmp_path):
    pruner = PrunerConfig(token_dim=16, grid=(4, 4), slot_dim=64, truncation="none")
    metrics, found = segmented(tmp_path, "a", pruner, Source(256), slots=[4], steps=120, batch_size=16, eval_every=60,
                               learning_rate=4e-3)  # fmt: skip
    rows = [line.split(",") for line in found["curves.csv"].decode().splitlines()]
    first = dict(zip(rows[0], rows[1], strict=True))
    assert metrics["val_loss"] < 0.8 * float(first["val_loss"])
    assert metrics["cover"] > float(first["cover"])


def test_what_it_needs_is_asked_for_before_it_begins(tmp_path):
    with pytest.raises(BadInput, match=r"needs the segmented objects of the training images .*: none are given"):
        run(tmp_path, "a", loss="masks")
    with pytest.raises(BadInput, match="segmented objects are of use with loss=masks only, loss is mse"):
        segmented(tmp_path, "b", PRUNER, loss="mse")

    class Others(Source):
        def __init__(self):
            super().__init__()
            self.image_ids = [f"other-{name}" for name in self.image_ids]

    with pytest.raises(BadInput, match="nothing is known of"):
        segmented(tmp_path, "c", source=Others())

    class Nameless(Source):
        def __init__(self):
            super().__init__()
            del self.image_ids

    with pytest.raises(BadInput, match="loss is masks, but the tokens do not say of which images they are"):
        segmented(tmp_path, "d", source=Nameless())


@pytest.mark.parametrize("assignment", CHOICES["assignment"])
def test_span_rebuilds_the_layer_that_goes_on_whatever_the_assignment_is(tmp_path, assignment):
    handed_on = Source()
    handed_on.tokens = drawn(11, 20, 16, 24).half()
    losses = []
    for residual_of in ("own", "handed_on"):
        pruner = PrunerConfig(**{**SEGMENTED.to_dict(), "residual_of": residual_of, "assignment": assignment})
        config = TrainConfig(**{**SMALL, "loss": "span"})
        folder = tmp_path / residual_of
        found = train(pruner, config, Source(), folder / "out", resume=folder / "resume", handed_on=handed_on)
        losses.append(found["val_loss"])
        learnt = "handed_on_span_error" if residual_of == "handed_on" else "span_error"
        if assignment != "shared":  # where picks that coincide are made up for
            assert found["val_loss"] == pytest.approx(found[learnt], rel=1e-3)
    assert losses[1] > losses[0] + 0.1, "noise is harder to rebuild than flat regions"


@pytest.mark.parametrize("loss", ["masks", "span"])
def test_both_layers_train(tmp_path, loss):
    pruner = PrunerConfig(**{**SEGMENTED.to_dict(), "residual_of": "handed_on", "assignment": "gain"})
    handed_on = Source()
    handed_on.tokens = drawn(11, 20, 16, 24).half()
    config = TrainConfig(**{**SMALL, "loss": loss})
    more = {"objects": Regions()} if loss == "masks" else {}
    metrics = train(pruner, config, Source(), tmp_path / "a", resume=tmp_path / "r", handed_on=handed_on, **more)
    if loss == "span":  # what least squares leave of the layer that goes on is what it learns, and is judged by
        assert metrics["val_loss"] == pytest.approx(metrics["handed_on_span_error"], rel=1e-3)
        rows = list(csv.DictReader((tmp_path / "a/curves.csv").open()))
        errors = {int(row["step"]): float(row["handed_on_span_error"]) for row in rows if row["handed_on_span_error"]}
        assert metrics["best_step"] == min(errors, key=lambda step: errors[step])
    assert 0 < metrics["handed_on_span_error"] < metrics["random_handed_on_span_error"]
    with pytest.raises(BadInput, match="residual_of is handed_on, but the tokens of the layer"):
        train(pruner, config, Source(), tmp_path / "b", resume=tmp_path / "r2", **more)
