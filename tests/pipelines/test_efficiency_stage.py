"""Stage `efficiency`: rows of the grid, with numbers that are computed again from the config by hand."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small_params import write_params

from ocvtp.efficiency.flops import pruner_flops
from pipelines import efficiency, sample
from pipelines.stage.context import ROOT


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(**changes: object) -> list[dict]:
        monkeypatch.setenv("OCVTP_ROOT", str(tmp_path))
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params |= {"method": ["vanilla", "random", "oc-vtp"], **changes}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        assert efficiency.main(["--params", str(tmp_path / "params.yaml")]) == 0
        return json.loads((tmp_path / "results/efficiency.json").read_text())["rows"]

    return make


def test_a_row_for_each_method_and_budget(rows) -> None:
    found = rows(top_k=[1, 2], keep=[48, "11.1%"])
    assert [(row["method"], row["keep"], row["tokens"], row["top_k"]) for row in found] == [
        ("vanilla", None, 144, None), ("random", 48, 48, None), ("random", "11.1%", 16, None),
        ("oc-vtp", 48, 48, 1), ("oc-vtp", 48, 48, 2), ("oc-vtp", "11.1%", 16, 1), ("oc-vtp", "11.1%", 16, 2),
    ]  # fmt: skip


def test_the_numbers_by_hand(rows) -> None:
    config = json.loads((ROOT / "ocvtp/vlms/tiny_llava/config.json").read_text())
    text, width = config["text_config"], config["vision_config"]["hidden_size"]
    d, m, layers, n = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"], 16 + 32
    random, ours = (row for row in rows(keep=16) if row["method"] != "vanilla")
    assert random["paper_flops"] == 2 * layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    assert random["flops"]["llm"] == 2 * layers * (n * (4 * d * d + 3 * d * m) + 2 * n * n * d)
    assert random["kv_cache_bytes"] == 2 * layers * n * d * 2
    assert random["flops"]["pruner"] == 0
    # T tokens, K slots, D the slots' width: 64 at least, and not half of the tokens' where that is less.
    T, K, D = 144, 16, 64
    encode = T * (width * 2 * width + 2 * width * D) + 2 * T * D * D
    each = K * D * D + 2 * K * T * D + 6 * K * D * D + 2 * K * D * 4 * D
    assert ours["flops"]["pruner"] == 2 * (encode + 3 * each)
    assert ours["flops"]["total"] == random["flops"]["total"] + ours["flops"]["pruner"]
    assert ours["paper_pruner_flops"] == pruner_flops(T, width, 64, elementwise=True) > ours["flops"]["pruner"]
    assert random["paper_pruner_flops"] == 0


def test_what_goes_on_alone_in_the_tower_is_counted(rows, caplog) -> None:
    options = {"css": {"inside_tower": True, "layer": 9}, "oc-vtp": {"inside_tower": True}}
    vision = json.loads((ROOT / "ocvtp/vlms/tiny_llava/config.json").read_text())["vision_config"]
    d, m = vision["hidden_size"], vision["intermediate_size"]
    whole, css, ours = rows(method=["css", "oc-vtp"], keep=16, evaluate={"options": options})
    saved = sum(sign * (n * (4 * d * d + 2 * d * m) + 2 * n * n * d) for sign, n in ((1, 145), (-1, 17)))
    assert whole["flops"]["tower"] - css["flops"]["tower"] == 2 * (11 - 9) * saved, "of the blocks 9 to 11"
    assert ours["flops"]["tower"] == whole["flops"]["tower"]
    assert "oc-vtp is counted with all of the tower" in caplog.text


def test_methods_inside_the_llm_are_counted_layer_by_layer(rows, caplog) -> None:
    config = json.loads((ROOT / "ocvtp/vlms/tiny_llava/config.json").read_text())["text_config"]
    d, m = config["hidden_size"], config["intermediate_size"]
    assert config["num_hidden_layers"] == 4
    found = rows(method=["fastv", "pyramiddrop", "sparsevlm"], keep=[48, 32])
    # The first of four layers reads all 144 tokens: 36 on average, and more than 32 already.
    assert [(row["method"], row["keep"]) for row in found] == [
        ("vanilla", None), ("fastv", 48), ("pyramiddrop", 48), ("sparsevlm", 48),
    ]  # fmt: skip
    assert "no row for fastv with keep 32" in caplog.text
    assert "at least 37 are needed" in caplog.text
    fastv = found[1]
    assert fastv["layers"] == [144, 16, 16, 16]
    read = [n + 32 for n in fastv["layers"]]
    layers = sum(2 * (n * (4 * d * d + 3 * d * m) + 2 * n * n * d) for n in read)
    ranking = 2 * (176 * d * d + d * d + 176 * d)
    assert fastv["flops"]["llm"] == layers + ranking
    assert fastv["paper_flops"] == sum(2 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m) for n in read)
    assert fastv["kv_cache_bytes"] == 2 * sum(read) * d * 2
    assert fastv["flops"]["projector"] == found[0]["flops"]["projector"]
    assert all(row["tokens"] == 48 and sum(row["layers"]) <= 48 * 4 for row in found[1:])


@pytest.mark.parametrize(("sides", "asked"), [([64, 160], "auto"), ([64, 160], 120)])
def test_images_of_many_sizes_are_counted_by_the_one_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sides: list[int],
    asked: str | int,
) -> None:  # fmt: skip
    monkeypatch.setenv("OCVTP_ROOT", str(tmp_path))
    monkeypatch.delenv("OCVTP_STORE", raising=False)
    given = write_params(tmp_path, {
        "vlm": "tiny-qwen", "keep": ["11.1%"], "method": ["vanilla", "random"],
        "sample": {"images": 7, "questions": 4, "style": {"sides": sides}}, "efficiency": {"image_tokens": asked},
    })  # fmt: skip
    expected = asked
    if asked == "auto":
        assert efficiency.main(given) == 2
        assert "run `python pipelines/sample.py`" in " ".join(capsys.readouterr().err.split())
        assert sample.main(given) == 0
        listed = json.loads((tmp_path / "data/sample/images.json").read_text())
        sizes = [Image.open(tmp_path / ".ocvtp/store" / image["path"]).size for image in listed]
        tokens = sorted(width // 16 * (height // 16) for width, height in sizes)
        assert len(set(tokens)) > 3
        expected = tokens[3]
    assert efficiency.main(given) == 0
    whole, random = json.loads((tmp_path / "results/efficiency.json").read_text())["rows"]
    assert whole["tokens"] == whole["layers"][0] == expected
    assert random["tokens"] == round(0.111 * expected)
    config = json.loads((ROOT / "ocvtp/vlms/tiny_qwen/config.json").read_text())["vision_config"]
    d, n = config["hidden_size"], 4 * expected
    patches = n * 3 * config["temporal_patch_size"] * config["patch_size"] ** 2 * d
    layer = n * (4 * d * d + 2 * d * config["intermediate_size"]) + 2 * n * n * d
    assert whole["flops"]["tower"] == 2 * (patches + config["depth"] * layer)


def test_equal_params_give_equal_bytes(rows, tmp_path: Path) -> None:
    rows()
    before = (tmp_path / "results/efficiency.json").read_bytes()
    rows()
    assert (tmp_path / "results/efficiency.json").read_bytes() == before
