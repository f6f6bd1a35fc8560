"""Selection: exactly as many tokens as asked for, the same in any batch, and an error for what cannot be."""

import itertools

import pytest
import torch

from ocvtp.errors import BadInput, Incompatible
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.config import CHOICES, FILLS
from ocvtp.pruner.model import SlotStart
from ocvtp.pruner.select import choose

WIDTH = 32


def make(**options) -> OCPruner:
    torch.manual_seed(0)
    return OCPruner(PrunerConfig(**{"token_dim": WIDTH, "grid": (6, 6), **options})).eval()


@pytest.fixture(scope="module")
def pruner() -> OCPruner:
    return make()


def tokens(batch: int, count: int = 36, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def check(indices, keep, count):
    for row in indices.tolist():
        assert len(row) == keep
        assert row == sorted(set(row))
        assert row[0] >= 0
        assert row[-1] < count


@pytest.mark.parametrize(
    ("fill", "assignment", "top_k"),
    itertools.product([f for f in FILLS if f != "none"], CHOICES["assignment"], [1, 3]),
)
@pytest.mark.parametrize("keep", [1, 7, 35])
def test_exactly_keep_distinct_ascending(pruner, fill, assignment, top_k, keep):
    x = tokens(3)
    scores = torch.rand(3, 36) if fill == "attention" else None
    found = pruner.select_details(x, keep, fill=fill, assignment=assignment, top_k=top_k, fill_scores=scores)
    assert found.indices_BS.dtype == torch.int64
    check(found.indices_BS, keep, 36)
    assert found.counts_B.tolist() == [keep] * 3
    again = pruner.select(x, keep, fill=fill, assignment=assignment, top_k=top_k, fill_scores=scores)
    assert torch.equal(found.indices_BS, again)


@pytest.mark.parametrize("assignment", ["shared", "distinct"])
@pytest.mark.parametrize("fill", ["slot_mass", "next_best"])
def test_ties_still_give_distinct_tokens(pruner, fill, assignment):
    """All tokens equal: every slot attends to all alike."""
    x = torch.ones(2, 36, WIDTH)
    found = pruner.select_details(x, 9, fill=fill, assignment=assignment)
    check(found.indices_BS, 9, 36)
    assert torch.equal(found.indices_BS[0], found.indices_BS[1])
    if assignment == "shared":
        assert found.distinct_B.tolist() == [1, 1]


def test_picks_are_the_most_attended_tokens_and_come_first(pruner):
    x = tokens(4)
    attention_BKN = pruner(x, 8, decode="none").attention
    found = pruner.select_details(x, 8)
    unpadded = pruner.select_details(x, 8, fill="none")
    for image in range(4):
        picks = set(attention_BKN[image].argmax(1).tolist())
        assert picks <= set(found.indices_BS[image].tolist())
        assert int(found.distinct_B[image]) == len(picks)
        assert set(found.picked_BN[image].nonzero()[:, 0].tolist()) == picks
        row = unpadded.indices_BS[image].tolist()
        assert row == sorted(picks) + [-1] * (8 - len(picks))
        assert int(unpadded.counts_B[image]) == len(picks)


def test_filling_takes_the_highest_scores(pruner):
    attention_BKN = torch.full((1, 3, 10), 0.01)
    attention_BKN[0, :, 4] = torch.tensor([0.9, 0.5, 0.1])  # all three slots pick token 4
    attention_BKN[0, 1, [2, 7]] = torch.tensor([0.4, 0.3])
    attention_BKN[0, 2, [9, 2]] = torch.tensor([0.08, 0.05])
    keep = torch.tensor([[3]])
    scores = torch.arange(10.0)[None]
    kept = {
        "attention": choose(attention_BKN, keep, 3, fill="attention", fill_scores_BN=scores).indices_BS.tolist(),
        "next_best": choose(attention_BKN, keep, 3, fill="next_best").indices_BS.tolist(),
        "distinct": choose(attention_BKN, keep, 3, assignment="distinct").indices_BS.tolist(),
        "none": choose(attention_BKN, keep, 3, fill="none").indices_BS.tolist(),
    }
    assert kept == {
        "attention": [[4, 8, 9]],
        "next_best": [[2, 4, 9]],  # slot 0 keeps token 4; next on the lists of slots 1 and 2
        "distinct": [[2, 4, 9]],
        "none": [[4, -1, -1]],
    }
    # Slot mass, by hand: a token's share of what each slot takes in.
    share = attention_BKN[0] / attention_BKN[0].sum(1, keepdim=True)
    best = sorted((t for t in range(10) if t != 4), key=lambda t: -float(share[:, t].sum()))[:2]
    assert choose(attention_BKN, keep, 3, fill="slot_mass").indices_BS.tolist() == [sorted([4, *best])]


def test_distinct_assignment_is_stable():
    """No slot and token prefer each other to what they have: the definition of what deferred acceptance finds."""
    attention_BKN = torch.rand(5, 6, 30, generator=torch.Generator().manual_seed(3))
    found = choose(attention_BKN, torch.tensor([[6]]), 6, assignment="distinct", fill="none")
    assert found.distinct_B.tolist() == [6] * 5
    for image in range(5):
        owner, held = {}, {}
        wish = {s: sorted(range(30), key=lambda t, s=s: -attention_BKN[image, s, t]) for s in range(6)}
        free = list(range(6))
        while free:
            slot = free.pop()
            token = wish[slot].pop(0)
            other = owner.get(token)
            if other is None or attention_BKN[image, slot, token] > attention_BKN[image, other, token]:
                owner[token] = slot
                held[slot] = token
                if other is not None:
                    free.append(other)
            else:
                free.append(slot)
        assert found.indices_BS[image].tolist() == sorted(held.values())


@pytest.mark.parametrize("fill", ["slot_mass", "next_best", "random", "none"])
@pytest.mark.parametrize("assignment", ["shared", "distinct"])
def test_an_image_keeps_the_same_tokens_alone_and_in_a_padded_batch(pruner, fill, assignment):
    sizes = [(6, 6), (3, 4), (5, 4), (2, 3)]
    images = [tokens(1, h * w, seed)[0] for seed, (h, w) in enumerate(sizes)]
    batch = torch.full((4, 36, WIDTH), torch.nan)  # padding must not matter, whatever it holds
    mask = torch.zeros(4, 36, dtype=torch.bool)
    for row, image in enumerate(images):
        batch[row, : len(image)] = image
        mask[row, : len(image)] = True
    keeps = [9, 4, 7, 6]
    seeds = [11, 12, 13, 14]
    options = {"fill": fill, "assignment": assignment}
    found = pruner.select_details(batch, keeps, mask=mask, seeds=seeds, **options)
    out = pruner(batch, keeps, mask=mask, grid=sizes, seeds=seeds)
    for row, image in enumerate(images):
        alone = pruner.select_details(image[None], keeps[row], seeds=[seeds[row]], **options)
        count = int(alone.counts_B[0])
        assert found.indices_BS[row, :count].tolist() == alone.indices_BS[0, :count].tolist()
        assert set(found.indices_BS[row, count:].tolist()) <= {-1}
        assert int(found.counts_B[row]) == count
        single = pruner(image[None], keeps[row], grid=sizes[row], seeds=[seeds[row]])
        torch.testing.assert_close(out.slots[row, : keeps[row]], single.slots[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            out.attention[row, : keeps[row], : len(image)], single.attention[0], rtol=0, atol=1e-5
        )
        assert float(out.attention[row, :, len(image) :].detach().abs().sum()) == 0
        torch.testing.assert_close(out.reconstruction[row, : len(image)], single.reconstruction[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", ["mlp", "ar"])
def test_other_decoders_are_as_indifferent_to_padding(decoder):
    pruner = make(decoder=decoder)
    sizes = [(4, 3), (2, 3)]
    images = [tokens(1, h * w, seed)[0] for seed, (h, w) in enumerate(sizes)]
    batch = torch.stack([images[0], torch.cat([images[1], torch.zeros(6, WIDTH)])])
    mask = torch.arange(12) < torch.tensor([[12], [6]])
    for mode in ("fixed", "all"):
        out = pruner(batch, 4, mask=mask, grid=sizes, decode=mode).reconstruction
        for row, image in enumerate(images):
            single = pruner(image[None], 4, grid=sizes[row], decode=mode).reconstruction
            torch.testing.assert_close(out[row, : len(image)], single[0], rtol=0, atol=1e-5)


def test_the_ar_decoder_never_looks_ahead():
    """In each of its orders a prediction depends on the tokens before it, and on them only."""
    pruner = make(decoder="ar")
    x, queries = tokens(1, 12), torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    slots = pruner(x, 4, queries, decode="none").slots.detach()
    from ocvtp.pruner.layout import layout

    where = layout(x, None, (3, 4), pruner.config)
    orders = pruner.decoder._orders((3, 4), 12)
    assert sorted(map(tuple, orders.tolist())) == sorted({tuple(order) for order in orders.tolist()})  # all different
    assert orders[0].tolist() == list(range(12))
    for number in range(8):
        order = orders[number].tolist()
        assert sorted(order) == list(range(12))
        y = x.clone().requires_grad_()
        rebuilt = pruner.decoder(y, slots, torch.tensor([number]), where)
        (grad,) = torch.autograd.grad(rebuilt[0, order[5]].sum(), y)
        seen = {t for t in range(12) if float(grad[0, t].abs().sum()) > 0}
        assert seen == set(order[:5])


def test_random_ar_sees_as_many_tokens_as_it_says():
    pruner = make()
    from ocvtp.pruner.layout import layout

    x = tokens(400)
    where = layout(x, None, None, pruner.config)
    fixed = pruner.decoder.plan(where, "fixed", None)
    assert fixed.sum(1).tolist() == [round(36 / 24)]
    assert pruner.decoder.plan(where, "all", None) is None
    counts = pruner.decoder.plan(where, "random", torch.Generator().manual_seed(0)).sum(1)
    usual = int((counts == 2).sum())
    assert 0.4 < usual / 400 < 0.62  # half of the time, and now and then by the draw
    drawn = counts[counts != 2]
    assert 0 <= int(drawn.min()) <= 2
    assert 30 <= int(drawn.max()) <= 34  # at most all but two
    reference = make(behaviour="reference", grid=(24, 24))
    big = torch.zeros(2, 576, WIDTH)
    plan = reference.decoder.plan(layout(big, None, None, reference.config), "fixed", None)
    assert plan.sum(1).tolist() == [24]
    ten = make(visible="10%")
    assert ten.decoder.plan(layout(x, None, None, ten.config), "fixed", None).sum(1).tolist() == [4]


def test_queries_follow_from_the_seed_of_the_sample(pruner):
    x = tokens(3)
    by_batch = pruner(x, 6, seeds=[1, 2, 3], decode="none").attention
    by_one = [pruner(x[i : i + 1], 6, seeds=[i + 1], decode="none").attention[0] for i in (2, 0, 1)]
    for row, image in enumerate((2, 0, 1)):
        torch.testing.assert_close(by_batch[image], by_one[row], rtol=0, atol=1e-5)
    noise = pruner._queries(2, 6, SlotStart(None, None, [1, 2]))
    assert not torch.allclose(noise[0], noise[1])  # samples differ
    fixed = pruner._queries(2, 6, SlotStart(None, None, None))
    assert torch.equal(fixed[0], fixed[1])
    for slots in (fixed[0], noise[0]):
        assert float(torch.pdist(slots).min()) > 1  # slots differ
    assert torch.equal(pruner._queries(1, 3, SlotStart(None, None, None))[0], fixed[0, :3])
    for slots in (3, 7, 40):
        assert torch.equal(
            pruner._queries(1, slots, SlotStart(None, None, [5]))[0],
            pruner._queries(1, 50, SlotStart(None, None, [5]))[0, :slots],
        )
    other = make(query_seed=1)
    assert not torch.equal(other._queries(1, 3, SlotStart(None, None, None)), fixed[:1, :3])
    fresh = make(query_noise="fresh")
    assert not torch.equal(
        fresh._queries(1, 3, SlotStart(None, None, None)), fresh._queries(1, 3, SlotStart(None, None, None))
    )
    one, two = (pruner._queries(2, 3, SlotStart(None, torch.Generator().manual_seed(s), None)) for s in (0, 0))
    assert torch.equal(one, two)


def test_reference_draws_one_slot_more(pruner):
    x = tokens(2)
    for behaviour, extra in (("default", 0), ("reference", 1)):
        own = make(behaviour=behaviour, query_noise="fixed", fill="slot_mass")
        for keep, top_k in ((8, 1), (9, 2), (12, 6)):
            expected = own.select(x, keep, top_k=top_k, slots=(keep + extra) // top_k)
            assert torch.equal(own.select(x, keep, top_k=top_k), expected)


def test_separate_gaussians_have_one_number_of_slots():
    pruner = make(queries="separate_gaussian", max_slots=5)
    x = tokens(2)
    assert pruner(x, 5).slots.shape == (2, 5, 64)
    for keep in (3, 5, 9):
        check(pruner.select(x, keep), keep, 36)
    with pytest.raises(BadInput, match="exactly 5"):
        pruner(x, 6)
    with pytest.raises(BadInput, match="max_slots"):
        make(queries="separate_gaussian")


def test_few_tokens_are_all_kept(pruner):
    x = tokens(2, 5)
    for keep in (5, 6, 100):
        assert pruner.select(x, keep).tolist() == [[0, 1, 2, 3, 4]] * 2
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    assert pruner.select(x, 7, mask=mask).tolist() == [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]]
    some = pruner.select_details(x, 4, mask=mask)
    assert some.indices_BS[1].tolist() == [0, 1, -1, -1]
    assert some.counts_B.tolist() == [4, 2]


def test_any_floating_type(pruner):
    x = tokens(2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(pruner.select(x.to(dtype), 7), pruner.select(x.to(dtype).float(), 7))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": torch.zeros(2, 36, WIDTH + 1)}, f"33 wide.*{WIDTH}"),
        ({"tokens": torch.zeros(2, 36, WIDTH, dtype=torch.int64)}, "int64"),
        ({"tokens": torch.zeros(36, WIDTH)}, r"\[36, 32\]"),
        ({"tokens": torch.zeros(0, 36, WIDTH)}, "at least one image"),
        ({"tokens": torch.zeros(2, 0, WIDTH)}, "at least one"),
        ({"tokens": torch.full((2, 36, WIDTH), torch.nan)}, "image 0, 1 .* NaN"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": -3}, "keep is -3"),
        ({"keep": 2.5}, "keep"),
        ({"keep": [3, 3, 3]}, "3 numbers for 2 images"),
        ({"slots": 37}, "37 for images of 36"),
        ({"slots": 0}, "num_slots is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"fill": "rest"}, "slot_mass"),
        ({"assignment": "best"}, "shared"),
        ({"fill": "attention"}, "fill_scores"),
        ({"fill": "attention", "fill_scores": torch.zeros(2, 35)}, r"\[2, 36\]"),
        ({"fill_scores": torch.zeros(2, 36)}, "no use"),
        ({"queries": torch.zeros(2, 8, 64)}, r"\[2, 7, 64\]"),
        ({"seeds": [1]}, "1 seeds for 2 images"),
        ({"mask": torch.ones(2, 35, dtype=torch.bool)}, r"\[2, 36\]"),
    ],
)
def test_bad_input_is_named(pruner, change, said):
    options = {"tokens": tokens(2), "keep": 7, **change}
    with pytest.raises(BadInput, match=said):
        pruner.select(options.pop("tokens"), options.pop("keep"), **options)


def test_one_bad_number_is_found(pruner):
    x = tokens(3)
    x[1, 4, 2] = torch.inf
    with pytest.raises(BadInput, match="image 1 of the batch"):
        pruner(x, 4)
    huge = torch.full((1, 36, WIDTH), 3e38)  # finite, though the sum of it is not
    pruner(huge, 4, decode="none")
    with pytest.raises(BadInput, match="at most one slot a token"):
        pruner(tokens(1), 37)
    with pytest.raises(BadInput, match="decode is 'most'"):
        pruner(tokens(1), 4, decode="most")
    with pytest.raises(BadInput, match="no decoder"):
        make(decoder=None)(tokens(1), 4, decode="all")
    with pytest.raises(Incompatible):
        pruner(torch.zeros(1, 36, 8), 4)


def test_grids_must_fit(pruner):
    x = tokens(2, 35)
    with pytest.raises(BadInput, match="neither the pruner's grid of 6 x 6 nor a square"):
        pruner(x, 4)
    assert pruner(x, 4, grid=(5, 7)).reconstruction.shape == x.shape
    with pytest.raises(BadInput, match="5 x 6"):
        pruner(x, 4, grid=(5, 6))
    with pytest.raises(BadInput, match="3 grids for 2 images"):
        pruner(x, 4, grid=[(5, 7), (7, 5), (35, 1)])
    with pytest.raises(BadInput, match="positions='grid'"):
        make(positions="table")(x, 4, grid=(5, 7))


def test_positions_are_read_between_entries_elsewhere():
    """On its own grid the table itself; at twice the size the mean of neighbours, weighted 3 to 1."""
    from ocvtp.pruner.decoder import PositionEmbedding
    from ocvtp.pruner.layout import TokenLayout

    positions = PositionEmbedding(PrunerConfig(token_dim=4, grid=(2, 3)))
    table = positions.table[0].detach().view(2, 3, 4)

    def read(*grids):
        count = max(h * w for h, w in grids)
        return positions(TokenLayout(len(grids), count, None, grids, torch.device("cpu"))).detach()

    assert torch.equal(read((2, 3)), positions.table)
    double = read((4, 6))[0].view(4, 6, 4)
    torch.testing.assert_close(double[0, 1], 0.75 * table[0, 0] + 0.25 * table[0, 1])
    torch.testing.assert_close(double[1, 0], 0.75 * table[0, 0] + 0.25 * table[1, 0])
    mixed = read((2, 3), (1, 2))
    assert torch.equal(mixed[0], table.view(6, 4))
    torch.testing.assert_close(mixed[1, :2], read((1, 2))[0])


def test_select_waits_for_nothing():
    """On meta tensors there are no values: whatever looks at one fails."""
    pruner = make().to("meta")
    pruner._noise_KD = torch.empty(64, 64, device="meta")
    x = torch.empty(3, 36, WIDTH, device="meta")
    for fill, assignment in itertools.product(["slot_mass", "next_best", "none"], ["shared", "distinct"]):
        found = pruner.select(x, 7, fill=fill, assignment=assignment, mask=torch.empty(3, 36, device="meta"))
        assert found.shape == (3, 7)
