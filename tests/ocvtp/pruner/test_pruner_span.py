"""The loss `span`, `assignment: residual` and queries that begin with tokens."""

import json
import math

import pytest
import torch
from pruner_training import PRUNER, Source, files, run

from ocvtp.errors import BadInput
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.select import picks
from ocvtp.pruner.span import span_loss
from ocvtp.pruner.training.run import TrainConfig, train
from ocvtp.selection import CHOICES, prototype_error, qr, span_error
from ocvtp.selection.proposals import propose

RESIDUAL = {"assignment": "residual", "queries": "qr", "truncation": "none"}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_of(seed, batch=3, slots=4, count=12, scale=1.0):
    return (scale * drawn(seed, batch, slots, count)).softmax(1)


# --- The loss ---


def test_forward_it_is_the_error_of_the_picked_tokens():
    tokens, attention = drawn(0, 3, 12, 8), attention_of(1)
    chosen = attention.argmax(2)
    expected = span_error(tokens, chosen).mean()
    assert span_loss(tokens, attention, chosen).item() == pytest.approx(expected.item(), rel=1e-5)
    assert span_loss(tokens, attention, chosen, temperature=0.1).item() == pytest.approx(expected.item(), rel=1e-4)
    both = span_loss(tokens, attention, chosen, prototype_weight=0.5).item()
    assert both == pytest.approx((expected + 0.5 * prototype_error(tokens, chosen).mean()).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_backward_it_is_that_of_soft_tokens_at_the_picked_ones(temperature):
    """The derivative of the error by the kept rows, times that of each slot's weights over tokens."""
    tokens, logits = drawn(2, 1, 6, 4).double(), drawn(3, 1, 2, 6).requires_grad_()
    attention = logits.softmax(1)
    chosen = attention.argmax(2)
    (found,) = torch.autograd.grad(span_loss(tokens, attention, chosen, temperature=temperature), logits)

    centred = (tokens - tokens.mean(1, keepdim=True)).float()
    rows = centred[0, chosen[0]].clone().requires_grad_()

    def error(kept):
        unit = kept / kept.norm(dim=1, keepdim=True)
        W = torch.linalg.solve(unit @ unit.T + 1e-3 * torch.eye(2), unit @ centred[0].T)
        return (centred[0] - W.T @ unit).square().sum() / centred.square().sum()

    (by_rows,) = torch.autograd.grad(error(rows), rows)
    weights = logits.softmax(1) ** (1 / temperature)
    soft = (weights / weights.sum(2, keepdim=True)) @ centred
    (expected,) = torch.autograd.grad((soft[0] * by_rows).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_padding_and_half_precision_are_nothing_to_it():
    tokens, attention = drawn(4, 2, 9, 5), attention_of(5, 2, 3, 9)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    attention = attention * mask[:, None]
    chosen = attention.argmax(2)
    found = span_loss(tokens.masked_fill(~mask[:, :, None], 99.0), attention, chosen, mask)
    alone = [span_loss(tokens[i : i + 1, :n], attention[i : i + 1, :, :n], chosen[i : i + 1])
             for i, n in enumerate((9, 6))]  # fmt: skip
    torch.testing.assert_close(found, sum(alone) / 2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(span_loss(tokens, attention, chosen), span_loss(tokens, attention, chosen))
        assert span_loss(tokens, attention, chosen).dtype == torch.float32
    with pytest.raises(BadInput, match=r"attention \[2, 3, 8\]"):
        span_loss(tokens, attention[:, :, :8], chosen)


# --- Slots propose, a residual decides ---


def plainly(attention, tokens):
    """One image, in float64, all pairs tried each time."""
    X = (tokens - tokens.mean(0)).double()
    wish = attention.double() / attention.double().amax(1, keepdim=True)
    found, kept = {}, []
    while len(found) < len(attention):
        A = X[kept]
        left = (X - X @ torch.linalg.pinv(A, rtol=1e-9) @ A if kept else X).square().sum(1)
        pairs = [(float(wish[k, n] * left[n]), -n, -k) for k in range(len(attention)) for n in range(len(X))
                 if k not in found and n not in kept]  # fmt: skip
        _, n, k = max(pairs)
        found[-k] = -n
        kept.append(-n)
    return [found[k] for k in range(len(attention))]


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_proposals_are_their_rule_written_plainly(scale):
    tokens, attention = drawn(6, 8, 14, 9), attention_of(7, 8, 5, 14, scale)
    everywhere, all_slots = torch.ones(8, 14, dtype=torch.bool), torch.ones(8, 5, dtype=torch.bool)
    found = propose(attention, tokens, everywhere, all_slots)
    assert found.tolist() == [plainly(a, t) for a, t in zip(attention, tokens, strict=True)]


def test_even_attention_is_pivoted_qr_and_sharp_attention_each_slots_own():
    tokens = drawn(8, 3, 14, 9)
    even = torch.full((3, 5, 14), 0.2)
    assert picks(even, "residual", tokens_BNC=tokens)[:, :, 0].sort(1).values.tolist() == qr(tokens, 5).tolist()
    sharp = torch.eye(14)[[3, 7, 1, 9, 12]].expand(3, -1, -1)
    assert picks(sharp, "residual", tokens_BNC=tokens)[:, :, 0].tolist() == [[3, 7, 1, 9, 12]] * 3
    two = picks(even, "residual", 2, tokens_BNC=tokens)
    assert two.shape == (3, 5, 2)
    assert two.flatten(1).sort(1).values.tolist() == qr(tokens, 10).tolist()


@pytest.mark.parametrize("queries", ["shared_gaussian", "qr", "fps"])
def test_selection_of_any_batch_is_that_of_singles(queries):
    torch.manual_seed(0)
    pruner = OCPruner(PrunerConfig(16, **{**RESIDUAL, "queries": queries}, decoder=None)).eval()
    counts, keeps = [20, 5, 2, 11], [6, 4, 3, 1]
    tokens = drawn(9, 4, 20, 16)
    mask = torch.arange(20) < torch.tensor(counts)[:, None]
    found = pruner.select(tokens, keeps, mask=mask, seeds=[4, 5, 6, 7])
    for i, (count, keep) in enumerate(zip(counts, keeps, strict=True)):
        alone = pruner.select(tokens[i : i + 1, :count], keep, seeds=[4 + i])[0].tolist()
        assert alone == sorted({*alone})
        assert len(alone) == min(count, keep)
        assert found[i].tolist() == alone + [-1] * (6 - len(alone))


@pytest.mark.parametrize("queries", ["qr", "fps"])
def test_queries_begin_with_the_tokens_that_a_choice_picks(queries):
    torch.manual_seed(0)
    pruner = OCPruner(PrunerConfig(16, queries=queries, decoder=None)).eval()
    tokens = drawn(10, 2, 12, 16)
    with torch.no_grad():
        begun = pruner.project(tokens)
        begun = torch.stack([begun[i, CHOICES[queries](tokens, 4)[i]] for i in range(2)])
        found, expected = pruner(tokens, 4), pruner(tokens, 4, begun)
        assert torch.equal(found.attention, expected.attention)
        assert torch.equal(pruner(tokens, 4, seeds=[8, 9]).slots, found.slots)  # no noise
    assert torch.equal(pruner.slot_attention.to_q.weight, pruner.slot_attention.to_k.weight)
    assert not list(pruner.queries.parameters())


# --- Training ---


@pytest.mark.parametrize("options", [{}, RESIDUAL, {"assignment": "distinct"}, {"queries": "fps"}])
def test_it_trains_without_a_decoder_and_resumes_to_the_same_bytes(tmp_path, options):
    pruner = PrunerConfig(**{**PRUNER.to_dict(), **options})
    metrics, expected = run(tmp_path, "whole", pruner=pruner, loss="span")
    assert metrics["val_mse"] is None
    assert metrics["best_step"] in (0, 2, 4, 6)
    assert json.loads(expected["config.json"])["decoder"] is None
    best = OCPruner.from_pretrained(tmp_path / "whole")
    assert best.trained_for.loss == "span"
    assert best.config.assignment == pruner.assignment

    class Killed(BaseException):
        pass

    def kill(done, total, note):
        if done == 3:
            raise Killed

    config = TrainConfig(**{**FAST_SPAN, "checkpoint_every": 3})
    with pytest.raises(Killed):
        train(pruner, config, Source(), tmp_path / "cut", resume=tmp_path / "r", progress=kill)
    train(pruner, config, Source(), tmp_path / "cut", resume=tmp_path / "r")
    assert files(tmp_path / "cut") == expected


FAST_SPAN = {"slots": [2, 4], "batch_size": 4, "steps": 6, "warmup_steps": 2, "eval_every": 2,
             "validation_share": 0.2, "loss": "span"}  # fmt: skip


def test_it_learns_to_keep_what_spans(tmp_path):
    pruner = PrunerConfig(token_dim=16, grid=(4, 4), slot_dim=64, truncation="none")
    metrics, found = run(
        tmp_path, "a", Source(512), pruner, slots=[4], steps=200, batch_size=16, eval_every=50, loss="span",
        prototype_weight=0.1,
    )  # fmt: skip
    rows = [line.split(",") for line in found["curves.csv"].decode().splitlines()]
    first = dict(zip(rows[0], rows[1], strict=True))
    assert metrics["span_error"] < 0.9 * float(first["span_error"])
    assert math.isfinite(metrics["val_loss"])


def test_best_by_span_is_the_least_span_error(tmp_path):
    metrics, found = run(tmp_path, "a", best_by="span")
    header, *rows = [line.split(",") for line in found["curves.csv"].decode().splitlines()]
    column = header.index("span_error")
    errors = {int(row[0]): float(row[column]) for row in rows if row[column]}
    assert metrics["best_step"] == min(errors, key=errors.get)
    assert TrainConfig(loss="span").best_by == "span"
    assert TrainConfig(loss="span", behaviour="reference").best_by == "span"
    assert TrainConfig().best_by == "val_mse"
    with pytest.raises(BadInput, match="best_by is val_mse, but loss is span"):
        TrainConfig(loss="span", best_by="val_mse")


def test_images_with_fewer_tokens_than_slots_train(tmp_path):
    class Uneven(Source):
        def batch(self, indices):
            tokens, _, _ = super().batch(indices)
            grids = [(4, 4) if index % 2 else (1, 2) for index in indices]
            mask = torch.arange(16) < torch.tensor([h * w for h, w in grids])[:, None]
            return tokens.masked_fill(~mask[:, :, None], 0), mask, grids

    for options in ({}, RESIDUAL):
        pruner = PrunerConfig(**{**PRUNER.to_dict(), **options})
        metrics, _ = run(tmp_path, str(options), Uneven(), pruner=pruner, loss="span")
        assert math.isfinite(metrics["val_loss"])
        assert metrics["bad_steps"] == 0
