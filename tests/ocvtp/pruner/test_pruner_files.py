"""Configs and files: whole or refused, equal bytes for equal pruners."""

import json
from dataclasses import replace

import pytest
import torch

from ocvtp.errors import BadInput, Corrupt, Incompatible, NotAvailable
from ocvtp.pruner import OCPruner, PrunerConfig, TrainedFor
from ocvtp.pruner.training.run import TrainConfig

FOR = TrainedFor(vlm="tiny-llava", weights="abc", layer=9, tower_layer=9, loss="aw_mse", slots=(2, 4), seed=3)


def make(**options) -> OCPruner:
    torch.manual_seed(0)
    return OCPruner(PrunerConfig(token_dim=16, grid=(3, 3), slot_dim=8, decoder_layers=2, **options), FOR).eval()


def test_round_trip(tmp_path):
    pruner = make()
    pruner.save_pretrained(tmp_path / "one")
    again = OCPruner.from_pretrained(str(tmp_path / "one"))
    assert again.config == pruner.config
    assert again.trained_for == FOR
    assert not again.training
    assert again.fingerprint == pruner.fingerprint
    x = torch.randn(2, 9, 16)
    assert torch.equal(again.select(x, 4), pruner.select(x, 4))
    torch.testing.assert_close(again(x, 4).reconstruction, pruner(x, 4).reconstruction, rtol=0, atol=0)
    record = json.loads((tmp_path / "one/config.json").read_text())
    assert record["layer"] == 9
    assert record["loss"] == "aw_mse"
    assert record["slots"] == [2, 4]
    assert record["token_dim"] == 16
    again.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["config.json", "model.safetensors"]


def test_without_decoder(tmp_path):
    pruner = make()
    pruner.save_pretrained(tmp_path / "whole")
    pruner.save_pretrained(tmp_path / "small", include_decoder=False)
    x = torch.randn(2, 9, 16)
    for name, decoder in (("small", True), ("whole", False)):
        again = OCPruner.from_pretrained(tmp_path / name, decoder=decoder)
        assert again.decoder is None
        assert again(x, 4).reconstruction is None
        assert torch.equal(again.select(x, 4), pruner.select(x, 4))
        assert again.fingerprint == pruner.fingerprint
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_fingerprint_tells_pruners_apart():
    pruner = make()
    other = make()
    with torch.no_grad():
        other.queries.mean[0, 0, 0] += 1e-3
    assert other.fingerprint != pruner.fingerprint
    assert make(fill="random").fingerprint != pruner.fingerprint


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(NotAvailable, match="nowhere"):
        OCPruner.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAvailable, match=r"config\.json"):
        OCPruner.from_pretrained(tmp_path / "empty")

    def broken(name, change):
        folder = tmp_path / name
        make().save_pretrained(folder)
        change(folder)
        return folder

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(Corrupt, match=r"model\.safetensors is damaged or half-written"):
        OCPruner.from_pretrained(broken("half", cut))
    with pytest.raises(Corrupt, match=r"config\.json is not JSON"):
        OCPruner.from_pretrained(broken("text", lambda folder: (folder / "config.json").write_text("{")))
    with pytest.raises(NotAvailable, match=r"model\.safetensors"):
        OCPruner.from_pretrained(broken("gone", lambda folder: (folder / "model.safetensors").unlink()))

    def edit(**changes):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    with pytest.raises(Incompatible, match="model_type"):
        OCPruner.from_pretrained(broken("kind", edit(model_type="llava")))
    with pytest.raises(Incompatible, match="unknown keys surprise"):
        OCPruner.from_pretrained(broken("key", edit(surprise=1)))
    with pytest.raises(Incompatible, match="fill is 'rest'"):
        OCPruner.from_pretrained(broken("value", edit(fill="rest")))
    with pytest.raises(Incompatible) as caught:
        OCPruner.from_pretrained(broken("shape", edit(slot_dim=12, ffn_dim=32)))
    assert "project.down.weight is [8, 32], should be [12, 32]" in str(caught.value)
    assert "queries.mean is [1, 1, 8], should be [1, 1, 12]" in str(caught.value)
    with pytest.raises(Incompatible, match=r"decoder\.mlp\.0\.weight is missing"):
        OCPruner.from_pretrained(broken("decoder", edit(decoder="mlp")))


def test_use_for_another_vlm_is_refused():
    FOR.require(vlm="tiny-llava", layer=9, revision="any")  # what is not known is not refused
    with pytest.raises(Incompatible, match=r"layer is 9 but 10 is needed.*weights is 'abc' but 'xyz'"):
        FOR.require(layer=10, weights="xyz")
    with pytest.raises(BadInput, match="layr"):
        FOR.require(layr=9)


@pytest.mark.parametrize("behaviour", ["default", "reference"])
@pytest.mark.parametrize("kind", [PrunerConfig, TrainConfig])
def test_configs_survive_json_and_say_all(kind, behaviour):
    config = kind(behaviour=behaviour, **({"token_dim": 48} if kind is PrunerConfig else {}))
    record = json.loads(json.dumps(config.to_dict()))
    assert "auto" not in record.values()
    assert kind.from_dict(record) == config
    with pytest.raises(BadInput, match="unknown keys fil"):
        kind.from_dict({**record, "fil": 1})


def test_every_difference_is_one_option():
    """The behaviours differ in what the tables list, and any one of these can be taken by itself."""
    from ocvtp.pruner import config
    from ocvtp.pruner.training import train_config as training

    for kind, table, needed in (
        (PrunerConfig, config.BY_BEHAVIOUR, {"token_dim": 48}),
        (TrainConfig, training.BY_BEHAVIOUR, {}),
    ):
        default, reference = kind(**needed), kind(**needed, behaviour="reference")
        differ = {name for name in default.to_dict() if getattr(default, name) != getattr(reference, name)}
        assert differ == {"behaviour", *table}
        for name, (_, theirs) in table.items():
            if name == "steps":
                continue
            one = kind(**needed, **{name: theirs})
            assert one == replace(default, **{name: theirs})
            assert getattr(one, name) == theirs


def test_sizes_follow_the_width_of_the_tokens():
    for behaviour in ("default", "reference"):
        config = PrunerConfig(token_dim=1024, behaviour=behaviour)
        sizes = (config.slot_dim, config.hidden_dim, config.ffn_dim, config.decoder_heads, config.decoder_ffn_dim)
        assert sizes == (512, 2048, 2048, 4, 4096)
    tiny = PrunerConfig(token_dim=96)
    assert (tiny.slot_dim, tiny.hidden_dim, tiny.decoder_heads, tiny.decoder_ffn_dim) == (64, 192, 3, 384)
    assert PrunerConfig(token_dim=1280).decoder_heads == 4
    for width in (7, 10, 33, 96, 1152):
        config = PrunerConfig(token_dim=width)
        assert width % config.decoder_heads == 0
        OCPruner(replace(config, decoder_layers=1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token_dim": 0}, "token_dim is 0"),
        ({"behaviour": "best"}, "default, reference"),
        ({"fill": "rest"}, "slot_mass"),
        ({"decoder": "cnn"}, "random_ar, mlp, ar, None"),
        ({"grid": (3,)}, "height and width"),
        ({"grid": (3, 0)}, "side of grid"),
        ({"visible": 1.5}, "visible is 1.5"),
        ({"visible": "5%"}, "4%, 10%"),
        ({"iterations": 0}, "iterations"),
        ({"decoder_heads": 5}, "does not divide"),
        ({"max_slots": 5}, "leave it out"),
        ({"extra_slot": 1}, "true or false"),
    ],
)
def test_bad_pruner_configs(options, said):
    with pytest.raises(BadInput, match=said):
        PrunerConfig(**{"token_dim": 48, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "l1"}, "aw_mse, mse"),
        ({"slots": []}, "list of slot counts"),
        ({"slots": [16, 0]}, "slot count"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": None}, "how long"),
        ({"learning_rate": 0}, "above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"validation_share": 1}, "nothing is left"),
        ({"validation_share": 0}, "hold some images out"),
        ({"precision": "fp8"}, "bf16, fp32"),
        ({"drop_last": "yes"}, "true or false"),
        ({"ema": 1.5}, "ema"),
    ],
)
def test_bad_train_configs(options, said):
    with pytest.raises(BadInput, match=said):
        TrainConfig(**options)
