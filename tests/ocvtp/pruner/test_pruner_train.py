"""Training: it learns, repeats itself bit for bit, goes on where it stopped, and stops bad numbers at the update."""

import json
import math
from dataclasses import replace
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from pruner_training import FAST, PRUNER, Source, files, run
from safetensors.torch import load_file

from ocvtp.errors import BadInput, Incompatible
from ocvtp.pruner import OCPruner, PrunerConfig, TrainedFor
from ocvtp.pruner.rebuilding import rebuilding
from ocvtp.pruner.training import run as run_module
from ocvtp.pruner.training.data import Order, with_room
from ocvtp.pruner.training.optimiser import learning_rate, make_optimizer
from ocvtp.pruner.training.run import NotFinite, TrainConfig, train
from ocvtp.selection import css, prototype_error, span_error


@pytest.mark.parametrize("loss", ["mse", "aw_mse"])
def test_it_learns(tmp_path, loss):
    """Regions differ by a variance of about 1, of which slots of them leave a fraction."""
    pruner = PrunerConfig(token_dim=16, grid=(4, 4), slot_dim=64, decoder_layers=2)
    metrics, found = run(
        tmp_path, "a", Source(1024), pruner, slots=[4, 6], steps=300, batch_size=16, learning_rate=3e-3, eval_every=100,
        loss=loss,
    )  # fmt: skip
    rows = [line.split(",") for line in found["curves.csv"].decode().splitlines()]
    header, first = rows[0], dict(zip(rows[0], rows[1], strict=True))
    assert header == ["step", "lr", "loss", "grad_norm", "val_loss", "val_mse", "distinct_picks", "span_error",
                      "random_span_error", "prototype_error", "kl", "cover", "handed_on_span_error",
                      "random_handed_on_span_error"]  # fmt: skip
    assert first["step"] == "0"
    assert metrics["val_mse"] < 0.25 < 0.5 * float(first["val_mse"])
    assert 0.2 < metrics["span_error"] < 0.4  # random tokens: 0.32
    assert metrics["steps"] == 300
    assert metrics["stopped"] == "finished"
    assert 4 <= metrics["distinct_picks"] <= 5
    assert metrics == json.loads(found["metrics.json"])
    best = OCPruner.from_pretrained(tmp_path / "a")
    assert best.fingerprint == metrics["fingerprint"]
    assert best.trained_for.slots == (4, 6)
    assert best.trained_for.loss == loss


def test_seeds_and_options_matter(tmp_path):
    base = run(tmp_path, "base")[1]["model.safetensors"]
    for name, options in {
        "seed": {"seed": 1}, "loss": {"loss": "mse"}, "slots": {"slots": [3, 4]}, "rate": {"learning_rate": 1e-2},
        "empty": {"ignore_empty": False, "slots": [8, 12]}, "decay": {"weight_decay": 0.5}, "clip": {"grad_clip": 0.01},
    }.items():  # fmt: skip
        assert run(tmp_path, name, **options)[1]["model.safetensors"] != base, name


def test_numbers_that_are_not_finite_stop_before_the_update(tmp_path, caplog):
    bad = Source(20, bad=(7,))
    metrics, found = run(tmp_path, "some", bad, steps=8)
    lines = [json.loads(line) for line in found["bad_batches.jsonl"].decode().splitlines()]
    assert metrics["bad_steps"] == len(lines) == 2  # two epochs, one batch each
    assert all("image-7" in line["images"] for line in lines)
    for tensor in OCPruner.from_pretrained(tmp_path / "some").state_dict().values():
        assert bool(tensor.isfinite().all())

    with pytest.raises(NotFinite, match="tolerated"):
        run(tmp_path, "many", Source(20, bad=tuple(range(4, 20))), steps=8, max_bad_steps=1, checkpoint_every=1)
    left = files(tmp_path / "many")
    assert sorted(left) == ["bad_batches.jsonl"]
    checkpoint = json.loads((tmp_path / "many-resume/step-00000001.json").read_text())
    assert checkpoint["state"]["bad_steps"] == 1


def test_a_left_out_step_changes_no_weight(tmp_path):
    """All batches bad and tolerated: the weights are the initial ones."""
    bad = Source(20, bad=tuple(range(4, 20)))
    one = run(tmp_path, "two", bad, steps=2, max_bad_steps=9)
    other = run(tmp_path, "five", bad, steps=5, max_bad_steps=9)
    assert one[1]["last.safetensors"] == other[1]["last.safetensors"]
    assert other[0]["bad_steps"] == 5


def test_early_stopping_keeps_the_best(tmp_path):
    metrics, found = run(tmp_path, "a", steps=200, learning_rate=1.0, grad_clip=1e6, warmup_steps=0, patience=3)
    assert metrics["stopped"] == "no better validation"
    assert metrics["steps"] == metrics["best_step"] + 3 * 2
    assert metrics["val_mse"] < float(found["curves.csv"].decode().splitlines()[-1].split(",")[5])
    assert found["model.safetensors"] != found["last.safetensors"]


def test_validation_is_held_out_and_always_the_same(tmp_path):
    source = Source()
    metrics, found = run(tmp_path, "a", source, learning_rate=1e-12, warmup_steps=0)
    rows = found["curves.csv"].decode().splitlines()
    losses = {line.split(",")[4] for line in rows[1:] if line.split(",")[4]}
    assert len(losses) == 1  # nothing is learnt, so nothing changes
    held_out = [asked for asked in source.asked if asked == [0, 1, 2, 3]]
    assert len(held_out) == 4
    assert all(not set(asked) & {0, 1, 2, 3} for asked in source.asked if asked not in held_out)
    assert metrics["validation_images"] == 4


def test_validation_of_the_reference_repeats_the_last_batch_with_fresh_noise(tmp_path, monkeypatch):
    """As often as there are held-out batches; of equal validations the later is the best."""
    seen = []

    def evaluate(pruner, config, batches, slots, teacher, *, draws):
        batches = list(batches)
        noise = [float(run_module.evaluate_(pruner, config, [b], slots, draws=[*draws, i])["val_loss"])
                 for i, b in enumerate(batches)]  # fmt: skip
        seen.append((len(batches), len({id(b) for b in batches}), len({*noise}), list(draws)))
        return {"val_loss": 1.0, "val_mse": 1.0, "distinct_picks": 1.0, "span_error": 0.5, "random_span_error": 0.5,
                "prototype_error": 0.5}  # fmt: skip

    monkeypatch.setattr(run_module, "evaluate_", run_module.evaluate, raising=False)
    monkeypatch.setattr(run_module, "evaluate", evaluate)
    metrics, _ = run(
        tmp_path, "a", Source(40), replace(PRUNER, query_noise="fresh"), validate_on="last_batch", batch_size=3
    )
    assert seen == [(3, 1, 3, [step]) for step in (2, 4, 6)]
    assert metrics["best_step"] == 6


def test_learning_rates_of_the_reference():
    """Rates of the authors' epochs, 3,167 steps each; the first step of an epoch has those of the epoch before."""
    config = TrainConfig(behaviour="reference")
    total = 30 * 3167
    listed = {0: 1e-6, 1: 2.5e-4, 2: 5.0e-4, 3: 7.5e-4, 4: 9.57e-4, 5: 9.33e-4, 10: 7.5e-4, 15: 5e-4, 20: 2.5e-4,
              29: 2.7e-6}  # fmt: skip
    for epoch, rate in listed.items():
        assert learning_rate(config, epoch * 3167 + 1, total, 3167) == pytest.approx(rate, rel=0.02), epoch
        assert learning_rate(config, epoch * 3167 + 3166, total, 3167) == pytest.approx(rate, rel=0.02)
        if epoch:
            before = learning_rate(config, (epoch - 1) * 3167 + 1, total, 3167)
            assert learning_rate(config, epoch * 3167, total, 3167) == before
    assert max(learning_rate(config, step, total, 3167) for step in range(0, total, 500)) < 1e-3


def test_default_learning_rates():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=2e-3)
    rates = [learning_rate(config, step, 100, 7) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[9] == rates[10] == pytest.approx(2e-3)
    assert rates[55] == pytest.approx(2e-3 * (0.01 + 0.99 * 0.5))
    assert rates[99] == pytest.approx(2e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * 89 / 90)) / 2))
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_what_decays():
    pruner = OCPruner(PRUNER)
    everything = make_optimizer(pruner, TrainConfig(behaviour="reference"))
    assert [g["weight_decay"] for g in everything.param_groups] == [0.01]
    groups = make_optimizer(pruner, TrainConfig()).param_groups
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0]
    assert all(p.ndim == 2 for p in groups[0]["params"])
    free = {id(p) for p in groups[1]["params"]}
    assert {id(pruner.queries.mean), id(pruner.decoder.positions.table), id(pruner.project.norm.weight)} <= free
    assert sum(len(g["params"]) for g in groups) == len(list(pruner.parameters()))


def test_bfloat16_reaches_every_weight_and_comes_near(tmp_path):
    """What runs without a graph under autocast must not rob the rest of its gradient."""
    torch.manual_seed(0)
    pruner = OCPruner(PRUNER)
    x = torch.randn(4, 16, 16)
    plan = torch.rand(4, 16) < 0.3
    grads = []
    for enabled in (False, True):
        pruner.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = pruner(x, 4, decode=plan)
            loss = (out.reconstruction.float() - x).square().mean()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in pruner.parameters()]))
        assert all(bool((p.grad != 0).any()) for p in pruner.parameters())
    assert float(torch.cosine_similarity(*grads, dim=0)) > 0.99
    assert out.slots.dtype == out.attention.dtype == torch.float32


def test_order_of_images():
    order = Order(range(100, 110), 4, drop_last=False, seed=0)
    assert order.steps_per_epoch == 3
    first = [order.indices(step) for step in range(3)]
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(chain(*first)) == list(range(100, 110))
    assert [order.indices(step) for step in range(3, 6)] != first
    assert [order.indices(step) for step in range(3)] == first
    assert Order(range(10), 4, drop_last=True, seed=0).steps_per_epoch == 2
    assert Order(range(3), 4, drop_last=True, seed=0).steps_per_epoch == 1
    assert Order(range(100, 110), 4, drop_last=False, seed=1).indices(0) != first[0]
    with pytest.raises(BadInput, match="no images"):
        Order([], 4, drop_last=True, seed=0)


def test_bad_input(tmp_path):
    where = {"folder": tmp_path / "a", "resume": tmp_path / "r"}
    with pytest.raises(Incompatible, match=r"16 wide.* 8"):
        train(PrunerConfig(token_dim=8, grid=(4, 4)), TrainConfig(**FAST), Source(), **where)
    with pytest.raises(BadInput, match="slots has 17, but an image has 16"):
        train(PRUNER, TrainConfig(**{**FAST, "slots": [4, 17]}), Source(), **where)
    with pytest.raises(BadInput, match="without decoder"):
        train(PrunerConfig(token_dim=16, decoder=None), TrainConfig(**FAST), Source(), **where)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("loss", "decoder"), [("aw_mse", "random_ar"), ("mse", "mlp"), ("mse", "ar"), ("span", None)])
def test_images_of_few_tokens_take_any_number_of_slots_where_sizes_differ(tmp_path, loss, decoder):
    class Native(Source):
        meta = SimpleNamespace(grid=None)

    pruner = PrunerConfig(**{**PRUNER.to_dict(), "decoder": decoder})
    found, _ = run(tmp_path, "a", Native(), pruner, slots=[4, 17], loss=loss)

    assert found["bad_steps"] == 0
    assert math.isfinite(found["val_loss"])


def test_room_for_slots_is_padding_that_changes_nothing():
    class Native(Source):
        meta = SimpleNamespace(grid=None)

    assert with_room(Source(), 20).batch([0])[0].shape[1] == 16
    tokens, mask, grids = with_room(Native(), 20).batch([0, 1])
    assert tokens.shape[1] == mask.shape[1] == 20
    assert not mask[:, 16:].any()
    torch.manual_seed(0)
    pruner, queries = OCPruner(PRUNER).eval(), torch.randn(2, 5, PRUNER.slot_dim)
    alone = pruner(Source().batch([0, 1])[0].float(), 5, queries, grid=grids)
    padded = pruner(tokens.float(), 5, queries, None, mask, grids)
    torch.testing.assert_close(padded.attention[:, :, :16], alone.attention)


@pytest.mark.parametrize("decoder", ["mlp", "ar"])
def test_other_decoders_and_padding_train(tmp_path, decoder):
    class Uneven(Source):
        def batch(self, indices):
            tokens, _, _ = super().batch(indices)
            grids = [(4, 4) if index % 2 else (2, 4) for index in indices]
            mask = torch.arange(16) < torch.tensor([h * w for h, w in grids])[:, None]
            return tokens.masked_fill(~mask[:, :, None], 0), mask, grids

    pruner = PrunerConfig(**{**PRUNER.to_dict(), "decoder": decoder})
    metrics, _ = run(tmp_path, "a", Uneven(), pruner=pruner, slots=[2, 4])
    assert math.isfinite(metrics["val_loss"])
    assert 0 < metrics["span_error"] < 1


def test_separate_gaussians_train(tmp_path):
    pruner = PrunerConfig(**{**PRUNER.to_dict(), "queries": "separate_gaussian", "max_slots": 4})
    metrics, _ = run(tmp_path, "a", pruner=pruner, slots=[4])
    assert math.isfinite(metrics["val_loss"])


@pytest.mark.nightly
def test_compiled_training_ends_in_the_same_weights(tmp_path):
    for compiled in (False, True):
        run(tmp_path, str(compiled), compile=compiled, precision="fp32")
    plain, fast = (load_file(tmp_path / name / "model.safetensors") for name in ("False", "True"))
    assert plain.keys() == fast.keys()
    for name, weights in plain.items():
        torch.testing.assert_close(fast[name], weights, rtol=0, atol=1e-4)


def test_provenance_is_written(tmp_path):
    known = TrainedFor(vlm="tiny-llava", weights="abc", layer=9)
    train(PRUNER, TrainConfig(**FAST, seed=5), Source(), tmp_path / "a", resume=tmp_path / "r", trained_for=known)
    record = json.loads((tmp_path / "a/config.json").read_text())
    assert [record[key] for key in ("vlm", "weights", "layer", "loss", "slots", "seed")] == [
        "tiny-llava", "abc", 9, "aw_mse", [2, 4], 5,
    ]  # fmt: skip


@pytest.mark.parametrize("decoder", ["random_ar", "ar", None])
def test_rebuilding_measures_what_it_says(decoder):
    torch.manual_seed(0)
    pruner = OCPruner(PrunerConfig(**{**PRUNER.to_dict(), "decoder": decoder})).eval()
    tokens_BNC = Source(5).tokens.float()
    handed_on = torch.randn(5, 16, 7)
    found = rebuilding(pruner, tokens_BNC, 6, handed_on=handed_on)
    details = pruner.select_details(tokens_BNC, 6)
    for name, error, of in (
        ("span_error", span_error, tokens_BNC),
        ("prototype_error", prototype_error, tokens_BNC),
        ("handed_on_span_error", span_error, handed_on),
    ):
        assert getattr(found, name) == pytest.approx(float(error(of, details.indices_BS).mean()))
        assert getattr(found, f"random_{name}") != getattr(found, name)
    assert found.distinct_picks == pytest.approx(float(details.distinct_B.float().mean()))
    assert found.tokens == 6
    assert found.relative_to_random == found.span_error / found.random_span_error
    assert rebuilding(pruner, tokens_BNC, 6, handed_on=handed_on) == found
    assert rebuilding(pruner, tokens_BNC, 6).handed_on_span_error is None
    # Random tokens are those of the image, whatever stands beside it.
    singles = [rebuilding(pruner, tokens_BNC[i : i + 1], 6, images=[i]) for i in range(5)]
    padded = torch.cat((tokens_BNC, torch.full((5, 3, 16), torch.nan)), 1)
    beside = rebuilding(pruner, padded, 6, mask=(torch.arange(19) < 16).expand(5, -1))
    for name in ("random_span_error", "random_prototype_error", "span_error"):
        mean = sum(getattr(one, name) for one in singles) / 5
        assert getattr(found, name) == pytest.approx(mean, rel=1e-5)
        assert getattr(beside, name) == pytest.approx(mean, rel=1e-5)
    with pytest.raises(BadInput, match="nothing is dropped"):
        rebuilding(pruner, tokens_BNC, 16)


def test_the_gauge_runs_forwards():
    """The choice that least squares favour is ahead of random tokens, and training has no say in it."""
    tokens_BNC = Source(8).tokens.float()
    random = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:4] for i in range(8)])
    assert float(span_error(tokens_BNC, css(tokens_BNC, 4)).mean()) < 0.9 * float(span_error(tokens_BNC, random).mean())


def test_validation_looks_at_the_layer_that_goes_on(tmp_path):
    dataset, handed_on = Source(), Source()
    handed_on.tokens = torch.randn(20, 16, 24, generator=torch.Generator().manual_seed(5)).half()
    config = TrainConfig(**FAST, eval_slots=[4])
    plain = train(PRUNER, config, dataset, tmp_path / "plain", resume=tmp_path / "r0")
    metrics = train(PRUNER, config, dataset, tmp_path / "out", resume=tmp_path / "r1", handed_on=handed_on)
    assert {key: value for key, value in metrics.items() if "handed_on" not in key} == plain
    best = OCPruner.from_pretrained(tmp_path / "out")
    held_out = dataset.split(0.2, 0)[1]
    found = rebuilding(best, dataset.tokens[held_out].float(), 4, handed_on=handed_on.tokens[held_out].float())
    assert metrics["handed_on_span_error"] == pytest.approx(found.handed_on_span_error, rel=1e-5)
    assert metrics["random_handed_on_span_error"] == pytest.approx(found.random_handed_on_span_error, rel=1e-5)
    header = (tmp_path / "out/curves.csv").read_text().splitlines()[0].split(",")
    assert header[-2:] == ["handed_on_span_error", "random_handed_on_span_error"]
    handed_on.image_ids = handed_on.image_ids[::-1]
    with pytest.raises(Incompatible, match="handed_on has other images"):
        train(PRUNER, config, dataset, tmp_path / "other", resume=tmp_path / "r2", handed_on=handed_on)


def test_rebuilding_of_padded_images():
    torch.manual_seed(0)
    pruner = OCPruner(PRUNER).eval()
    tokens_BNC = Source(2).tokens.float()
    mask_BN = torch.arange(16) < torch.tensor([[16], [8]])
    found = rebuilding(pruner, tokens_BNC, 4, mask=mask_BN)
    whole = rebuilding(pruner, tokens_BNC[:1], 4)
    small = rebuilding(pruner, tokens_BNC[1:, :8], 4)
    for name in ("span_error", "prototype_error"):
        assert getattr(found, name) == pytest.approx((getattr(whole, name) + getattr(small, name)) / 2, rel=1e-4)
