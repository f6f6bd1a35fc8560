"""Behaviour `reference` against the authors' arithmetic, rebuilt in `pruner_arithmetic`."""

import numpy as np
import pruner_arithmetic as plain
import pytest
import torch

from ocvtp.errors import Corrupt, Incompatible, NotAvailable
from ocvtp.pruner import OCPruner, PrunerConfig, reference
from ocvtp.pruner.loss import aw_mse, mse

TOKENS, WIDTH, SLOTS = 12, 16, 5


@pytest.fixture(scope="module")
def small() -> OCPruner:
    """A reference pruner of another size, in double precision, with no weight at a special value."""
    torch.manual_seed(0)
    config = PrunerConfig(
        token_dim=WIDTH, behaviour="reference", grid=(3, 4), slot_dim=8, hidden_dim=20, ffn_dim=12,
        decoder_layers=3, decoder_heads=4, decoder_ffn_dim=24,
    )  # fmt: skip
    pruner = OCPruner(config).double().eval()
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pruner


@pytest.fixture(scope="module")
def weights(small):
    return {name: tensor.numpy() for name, tensor in reference.state_dict(small).items()}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    tokens_BNC = 2 * torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    queries_BKD = torch.randn(2, SLOTS, 8, generator=generator, dtype=torch.float64)
    return tokens_BNC, queries_BKD


def test_slot_attention_equals_plain_loops(small, weights, data):
    tokens_BNC, queries_BKD = data
    out = small(tokens_BNC, SLOTS, queries_BKD, decode="none")
    for image in range(2):
        slots, attention = plain.slot_attention(weights, tokens_BNC[image].numpy(), queries_BKD[image].numpy())
        np.testing.assert_allclose(out.slots[image].detach(), slots, atol=1e-9)
        np.testing.assert_allclose(out.attention[image].detach(), attention, atol=1e-9)
    np.testing.assert_allclose(out.attention.detach().sum(1), 1, atol=1e-9)


@pytest.mark.parametrize("visible", [0, 2, 7, 12])
def test_decoder_equals_the_shuffled_one(small, weights, data, visible):
    tokens_BNC, queries_BKD = data
    orders = [torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    plan_BN = torch.zeros(2, TOKENS, dtype=torch.bool)
    for image, order in enumerate(orders):
        plan_BN[image, order[:visible]] = True
    out = small(tokens_BNC, SLOTS, queries_BKD, decode=plan_BN)
    for image, order in enumerate(orders):
        expected = plain.decode(
            weights, tokens_BNC[image].numpy(), out.slots[image].detach().numpy(), order.tolist(), visible,
            heads=4, layers=3,
        )  # fmt: skip
        np.testing.assert_allclose(out.reconstruction[image].detach(), expected, atol=1e-9)


def test_evaluation_hides_nothing(small, weights, data):
    tokens_BNC, queries_BKD = data
    out = small(tokens_BNC, SLOTS, queries_BKD)
    expected = plain.decode(weights, tokens_BNC[0].numpy(), out.slots[0].detach().numpy(), None, 0, heads=4, layers=3)
    np.testing.assert_allclose(out.reconstruction[0].detach(), expected, atol=1e-9)


def _numeric(function, array, index, step=1e-6):
    """Central difference of a function of one entry of an array."""
    kept = array[index]
    array[index] = kept + step
    above = function()
    array[index] = kept - step
    below = function()
    array[index] = kept
    return (above - below) / (2 * step)


def test_truncated_gradients_equal_numeric_ones(small, weights, data):
    """Only the last iteration is differentiated, and the queries as if they were its input."""
    tokens_BNC, _ = data
    tokens = tokens_BNC[0].numpy()
    noise = torch.randn(1, SLOTS, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = torch.randn(SLOTS, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    small.zero_grad()
    out = small(tokens_BNC[:1], SLOTS, small.queries(noise), decode="none")
    (out.slots[0] * wanted).sum().backward()
    theirs = {name: p.grad for name, p in zip(weights, small.parameters(), strict=True)}
    by_name = {reference.their_name(name): p.grad for name, p in small.named_parameters()}
    assert set(theirs) == set(by_name)

    w = {name: array.copy() for name, array in weights.items()}

    def queries():
        return w["initializ.mean"][0] + noise[0].numpy() * np.exp(w["initializ.logstd"][0])

    start = queries()
    keys, values = plain.keys_values(w, tokens)
    before = start
    for _ in range(2):
        before, _ = plain.iterate(w, before, keys, values)

    def loss():
        keys, values = plain.keys_values(w, tokens)
        slots, _ = plain.iterate(w, before + queries() - start, keys, values)
        return float((slots * wanted.numpy()).sum())

    rng = np.random.default_rng(0)
    for name in [n for n in w if not n.startswith("decode.")]:
        for _ in range(2):
            index = tuple(int(rng.integers(size)) for size in w[name].shape)
            expected = _numeric(loss, w[name], index)
            assert float(by_name[name][index]) == pytest.approx(expected, rel=1e-5, abs=1e-7), (name, index)


def test_without_truncation_all_iterations_are_differentiated(small, weights, data):
    tokens_BNC, queries_BKD = data
    whole = OCPruner(PrunerConfig.from_dict({**small.config.to_dict(), "truncation": "none"})).double().eval()
    whole.load_state_dict(small.state_dict())
    wanted = torch.randn(1, SLOTS, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    whole.zero_grad()
    (whole(tokens_BNC[:1], SLOTS, queries_BKD[:1], decode="none").slots * wanted).sum().backward()
    w = {name: array.copy() for name, array in weights.items()}

    def loss():
        slots, _ = plain.slot_attention(w, tokens_BNC[0].numpy(), queries_BKD[0].numpy())
        return float((slots * wanted[0].numpy()).sum())

    for name, ours in (
        ("aggregat.proj_k.weight", whole.slot_attention.to_k.weight),
        ("aggregat.gru.weight_hh", whole.slot_attention.gru.weight_hh),
    ):
        assert float(ours.grad[2, 3]) == pytest.approx(_numeric(loss, w[name], (2, 3)), rel=1e-5)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_aw_mse_equals_plain_loops(empty, power):
    generator = torch.Generator().manual_seed(2)
    logits_BKN = 2 * torch.randn(3, 6, 20, generator=generator, dtype=torch.float64)
    if empty:
        logits_BKN[:, 2:5] -= 20
    attention_BKN = logits_BKN.softmax(1)
    prediction, target = torch.randn(2, 3, 20, 7, generator=generator, dtype=torch.float64)
    found = aw_mse(prediction, target, attention_BKN, power=power, ignore_empty=False)
    expected = [
        plain.aw_mse(prediction[b].numpy(), target[b].numpy(), attention_BKN[b].numpy(), power) for b in range(3)
    ]
    assert float(found) == pytest.approx(sum(expected) / 3, rel=1e-9)
    if empty:  # with the empty slots ignored, only the filled ones are there at all
        ignored = aw_mse(prediction, target, attention_BKN, power=power, ignore_empty=True)
        filled = attention_BKN[:, [0, 1, 5]]
        expected = [plain.aw_mse(prediction[b].numpy(), target[b].numpy(), filled[b].numpy(), power) for b in range(3)]
        assert float(ignored) == pytest.approx(sum(expected) / 3, rel=1e-6)
        assert float(ignored) != pytest.approx(float(found), rel=1e-6)


def test_one_empty_slot_hits_the_cap_and_starves_the_others():
    """Numbers of the description: a single empty slot weighs 10, the others a few hundredths."""
    from ocvtp.pruner.loss import slot_weights

    attention_BKN = torch.full((1, 64, 576), 0.0, dtype=torch.float64)
    for token in range(576):
        attention_BKN[0, token % 63, token] = 1.0
    weight_BK = slot_weights(attention_BKN, torch.ones(1, 576, dtype=torch.float64), 0.5, 10.0, False, True)
    assert float(weight_BK[0, 63]) == 10.0
    assert float(weight_BK[0, :63].max()) < 0.06
    sane_BK = slot_weights(attention_BKN, torch.ones(1, 576, dtype=torch.float64), 0.5, 10.0, True, True)
    assert float(sane_BK[0, 63]) == 0.0
    torch.testing.assert_close(sane_BK[0, :63].mean(), torch.tensor(1.0, dtype=torch.float64))


def test_losses_ignore_padding_and_pass_no_gradient_to_attention():
    generator = torch.Generator().manual_seed(3)
    attention = torch.randn(1, 4, 9, generator=generator).softmax(1).requires_grad_()
    prediction = torch.randn(1, 9, 5, generator=generator, requires_grad=True)
    target = torch.randn(1, 9, 5, generator=generator)
    mask = torch.arange(9)[None] < 6
    whole = aw_mse(prediction, target, attention, mask=mask)
    cut = aw_mse(prediction[:, :6], target[:, :6], attention[:, :, :6])
    torch.testing.assert_close(whole, cut)
    torch.testing.assert_close(mse(prediction, target, mask), mse(prediction[:, :6], target[:, :6]))
    torch.testing.assert_close(mse(prediction, target), torch.nn.functional.mse_loss(prediction, target))
    whole.backward()
    assert attention.grad is None
    assert float(prediction.grad[:, 6:].abs().max()) == 0


@pytest.mark.parametrize(("budget", "top_k"), [(4, 1), (7, 1), (6, 2), (6, 3), (11, 1)])
def test_selection_equals_the_set_code(small, weights, data, budget, top_k):
    tokens_BNC, _ = data
    slots = (budget + 1) // top_k
    queries = torch.randn(2, slots, 8, generator=torch.Generator().manual_seed(budget), dtype=torch.float64)
    received = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = small.select(tokens_BNC, budget, top_k=top_k, queries=queries, fill_scores=received)
    for image in range(2):
        _, attention = plain.slot_attention(weights, tokens_BNC[image].numpy(), queries[image].numpy())
        assert found[image].tolist() == plain.select(attention, budget, top_k, received[image].numpy())


def test_a_pick_too_many_goes_by_hash_order():
    """All budget + 1 picks differ: the authors' set has one more than there is room for."""
    from ocvtp.pruner.select import choose

    for seed in range(20):
        places = torch.randperm(576, generator=torch.Generator().manual_seed(seed))[:65]
        attention_BKN = torch.full((1, 65, 576), 1e-3)
        attention_BKN[0, torch.arange(65), places] = torch.linspace(0.5, 0.9, 65)
        found = choose(
            attention_BKN,
            torch.tensor([[64]]),
            64,
            fill="attention",
            fill_scores_BN=torch.zeros(1, 576),
            surplus="hash",
        )
        expected = plain.select(attention_BKN[0].numpy(), 64, 1, np.zeros(576))
        assert found.indices_BS[0].tolist() == expected
        assert int(found.distinct_B[0]) == 65
        ours = choose(attention_BKN, torch.tensor([[64]]), 64, fill="slot_mass")
        assert int(places[0]) not in ours.indices_BS[0].tolist()  # the least attended pick goes


# --- Sizes, names and files ------------------------------------------------------------------------------------------

SHAPES = {
    "encode_project.mlp.0.weight": (1024,), "encode_project.mlp.0.bias": (1024,),
    "encode_project.mlp.1.weight": (2048, 1024), "encode_project.mlp.1.bias": (2048,),
    "encode_project.mlp.4.weight": (512, 2048), "encode_project.mlp.4.bias": (512,),
    "initializ.mean": (1, 1, 512), "initializ.logstd": (1, 1, 512),
    **{f"aggregat.{n}.{p}": (512,) for n in ("norm_in", "norm_slots_0", "norm_slots_1") for p in ("weight", "bias")},
    **{f"aggregat.proj_{n}.weight": (512, 512) for n in "qkv"},
    "aggregat.gru.weight_ih": (1536, 512), "aggregat.gru.weight_hh": (1536, 512),
    "aggregat.gru.bias_ih": (1536,), "aggregat.gru.bias_hh": (1536,),
    "aggregat.ffn.mlp.0.weight": (2048, 512), "aggregat.ffn.mlp.0.bias": (2048,),
    "aggregat.ffn.mlp.3.weight": (512, 2048), "aggregat.ffn.mlp.3.bias": (512,),
    "decode.mask_token": (1, 1, 1024), "decode.posit_embed._pe": (1, 576, 1024), "decode.norm0.weight": (1024,),
    "decode.project1.project.weight": (1024, 1024),
    "decode.project1.norm.weight": (1024,), "decode.project1.norm.bias": (1024,),
    "decode.project2.project.weight": (1024, 512),
    "decode.project2.norm.weight": (1024,), "decode.project2.norm.bias": (1024,),
    **{f"decode.backbone.layers.{i}.{n}.in_proj_weight": (3072, 1024)
       for i in range(4) for n in ("self_attn", "multihead_attn")},
    **{f"decode.backbone.layers.{i}.{n}.out_proj.weight": (1024, 1024)
       for i in range(4) for n in ("self_attn", "multihead_attn")},
    **{f"decode.backbone.layers.{i}.linear1.weight": (4096, 1024) for i in range(4)},
    **{f"decode.backbone.layers.{i}.linear2.weight": (1024, 4096) for i in range(4)},
    **{f"decode.backbone.layers.{i}.norm{n}.weight": (1024,) for i in range(4) for n in (1, 2, 3) if i or n > 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def published() -> OCPruner:
    """The authors' size."""
    torch.manual_seed(0)
    return OCPruner(reference.reference_config()).eval()


def test_names_shapes_and_parameter_counts(published):
    found = {name: tuple(tensor.shape) for name, tensor in reference.state_dict(published).items()}
    assert found == SHAPES
    assert len(found) == 69
    assert sum(not name.startswith("decode.") for name in found) == 25
    whole = sum(p.numel() for p in published.parameters())
    decoder = sum(p.numel() for p in published.decoder.parameters())
    assert (whole - decoder, decoder, whole) == (7_616_512, 69_288_960, 76_905_472)


def test_initial_weights(published):
    layers = published.decoder.transformer.layers
    for layer in layers[1:]:
        torch.testing.assert_close(layer.linear1.weight, layers[0].linear1.weight, rtol=0, atol=0)
    fresh = PrunerConfig(token_dim=32).to_dict()
    torch.manual_seed(0)
    own = OCPruner(PrunerConfig.from_dict(fresh)).decoder.transformer.layers
    assert not torch.equal(own[0].linear1.weight, own[1].linear1.weight)
    for parameter in (published.queries.mean, published.queries.log_std):
        assert tuple(parameter.shape) == (1, 1, 512)
        assert 0.07 < float(parameter.detach().abs().max()) <= 0.0766
    assert float(published.decoder.positions.table.detach().std()) == pytest.approx(0.88, abs=0.01)
    assert float(published.decoder.mask_token.detach().var()) == pytest.approx(1 / 1024, rel=0.2)
    for name, parameter in published.named_parameters():
        if "bias" in name and "norm" not in name and not name.startswith("decoder."):
            assert float(parameter.detach().abs().max()) == 0, name


def test_flops_equal_the_closed_form(published):
    from torch.utils.flop_counter import FlopCounterMode

    for tokens, slots, expected in ((576, 64, 5.964e9), (2880, 64, 23.782e9)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            published(torch.zeros(1, tokens, 1024), slots, decode="none")
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoint_of_25_tensors(published, tmp_path, wrapped):
    tensors = {name: t for name, t in reference.state_dict(published).items() if not name.startswith("decode.")}
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": tensors} if wrapped else tensors, path)
    pruner = OCPruner.from_reference_checkpoint(path)
    assert pruner.decoder is None
    assert not pruner.training
    tokens = torch.randn(2, 576, 1024, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(2, 65, 512, generator=torch.Generator().manual_seed(1))
    expected = published(tokens, 65, queries, decode="none")
    found = pruner(tokens, 65, queries)
    torch.testing.assert_close(found.attention, expected.attention, rtol=0, atol=0)
    assert found.reconstruction is None
    assert pruner.fingerprint == published.fingerprint


def test_checkpoint_of_all_tensors(small, weights, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(reference.state_dict(small), path)
    again = OCPruner.from_reference_checkpoint(path, small.config)
    for name, tensor in reference.state_dict(again).items():
        torch.testing.assert_close(tensor.double(), torch.from_numpy(weights[name]), rtol=1e-6, atol=1e-6)


def test_wrong_checkpoints_are_refused(small, tmp_path):
    tensors = reference.state_dict(small)
    path = tmp_path / "weights.pth"

    wrong = dict(tensors)
    del wrong["aggregat.proj_k.weight"]
    wrong["surprise"] = torch.zeros(1)
    wrong["decode.norm0.weight"] = torch.zeros(3)
    torch.save(wrong, path)
    with pytest.raises(Incompatible) as caught:
        OCPruner.from_reference_checkpoint(path, small.config)
    for said in ("aggregat.proj_k.weight is missing", "surprise is not part", "decode.norm0.weight is [3]", str(path)):
        assert said in str(caught.value)

    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Corrupt, match=r"weights\.pth"):
        OCPruner.from_reference_checkpoint(path, small.config)
    with pytest.raises(NotAvailable, match=r"nowhere\.pth"):
        OCPruner.from_reference_checkpoint(tmp_path / "nowhere.pth")

    class Evil:
        def __reduce__(self):
            return (path.with_name("owned").write_text, ("",))

    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(Corrupt, match="tensors alone"):
        OCPruner.from_reference_checkpoint(path, small.config)
    assert not path.with_name("owned").exists()
