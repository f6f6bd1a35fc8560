"""Extraction: exactly transformers' hidden states, all layers in one pass, and a named error for every bad image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from ocvtp.data.scenes import jpeg, make_scene
from ocvtp.errors import BadInput
from ocvtp.tokens.extract import ImageRecord, extract_tokens
from ocvtp.tokens.loader import TokenDataset
from ocvtp.tokens.manifest import Shard
from ocvtp.tokens.reader import open_shard
from ocvtp.tokens.writer import DiskFull

DEPTH, WIDTH, SIDE, PATCH = 5, 32, 24, 8


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return CLIPVisionModel(config).eval()


@dataclass
class Clip:
    """A tower the way a VLM family offers it: forward hooks on the encoder blocks, which count from 0."""

    model: CLIPVisionModel
    name: str = "clip"
    revision: str = "r1"
    weights: str = "w1"
    depth: int = DEPTH
    width: int = WIDTH
    grid: tuple[int, int] | None = (SIDE // PATCH, SIDE // PATCH)
    passes: list[tuple[int, list[int]]] = field(default_factory=list)

    def preprocess(self, images: list[Image.Image], *, mode: str) -> Tensor:
        assert mode in ("pad", "squash")
        arrays = [np.asarray(image.resize((SIDE, SIDE))) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255.0

    def grids(self, pixels: Tensor) -> list[tuple[int, int]]:
        return [(SIDE // PATCH, SIDE // PATCH)] * len(pixels)

    def tower(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        self.passes.append((len(pixels), list(layers)))
        states: dict[int, Tensor] = {}
        blocks = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        hooks = []
        for layer in layers:

            def keep(_: Any, __: Any, output: Any, layer: int = layer) -> None:
                states[layer] = (output[0] if isinstance(output, tuple) else output)[:, 1:]

            hooks.append(blocks[layer - 1].register_forward_hook(keep))
        self.model(pixels)
        for hook in hooks:
            hook.remove()
        return states


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    folder = tmp_path / "images"
    folder.mkdir()
    made = []
    for i in range(5):
        data = jpeg(make_scene(0, "train", i))
        (folder / f"{i}.jpg").write_bytes(data)
        made.append(ImageRecord(f"id {i}", folder / f"{i}.jpg", hashlib.sha256(data).hexdigest()))
    return made


def content(shards: dict[int, Shard]) -> dict[str, bytes]:
    return {f.name: (p / f.name).read_bytes() for p, _ in shards.values() for f in sorted(p.iterdir())}


def everything(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_layer_k_is_transformers_hidden_state_k(
    clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path
) -> None:
    tower, layers = Clip(clip), [2, 1, -1, -2, 5]
    shards = extract_tokens(tower, records, layers, tmp_path / "out", dtype="float32", batch_size=2)
    images = [Image.open(record.path).convert("RGB") for record in records]
    with torch.no_grad():
        wanted = clip(tower.preprocess(images, mode="pad"), output_hidden_states=True).hidden_states
    assert len(wanted) == DEPTH + 1
    assert list(shards) == layers
    for layer, (folder, manifest) in shards.items():
        assert folder == tmp_path / "out" / f"layer_{layer}"
        assert manifest.meta.layer == layer
        assert manifest.meta.tower_layer == layer % (DEPTH + 1)
        shard = open_shard(folder, manifest)
        assert shard.ids == [record.id for record in records]
        for i in range(len(records)):
            row = shard.read(i)
            torch.testing.assert_close(row.tokens_NC, wanted[layer][i, 1:], atol=1e-5, rtol=1e-5)
            if layer == 2:  # one layer off would show
                assert (row.tokens_NC - wanted[1][i, 1:]).abs().max() > 1e-2
                assert (row.tokens_NC - wanted[3][i, 1:]).abs().max() > 1e-2
    # One pass a batch, for all layers together, each once.
    assert tower.passes == [(2, [1, 2, 4, 5]), (2, [1, 2, 4, 5]), (1, [1, 2, 4, 5])]


@pytest.mark.parametrize("preprocessing", ["pad", "squash"])
def test_a_real_vlm_gives_the_papers_layers(records: list[ImageRecord], tmp_path: Path, preprocessing: str) -> None:
    from ocvtp.vlms.loading import load
    from pipelines.tiny.llava import TinyLlava

    torch.manual_seed(0)
    TinyLlava().make_model().save_pretrained(tmp_path / "vlm")
    TinyLlava().make_processor().save_pretrained(tmp_path / "vlm")
    vlm = load(str(tmp_path / "vlm"))
    shards = extract_tokens(vlm, records, [9, 10, -2], tmp_path / "out", dtype="float32", preprocessing=preprocessing)
    pixels = (
        TinyLlava()
        .make_processor()
        .image_processor(images=[Image.open(record.path) for record in records], return_tensors="pt")["pixel_values"]
    )  # scenes are 96 x 96: nothing to pad, squash or resize
    with torch.no_grad():
        wanted = vlm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(wanted) == 13
    for layer, shard in shards.items():
        tokens_BNC = TokenDataset([shard]).batch(range(5)).tokens_BNC
        torch.testing.assert_close(tokens_BNC, wanted[layer][:, 1:], atol=1e-4, rtol=1e-4)
        assert (tokens_BNC - wanted[layer - 1][:, 1:]).abs().max() > 1e-2
        assert shard[1].meta.tower_layer == {9: 9, 10: 10, -2: 11}[layer]
        assert shard[1].meta.grid == (12, 12)


def test_what_made_the_tokens_is_in_the_manifest(
    clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    shards = extract_tokens(
        Clip(clip),
        records,
        [2],
        tmp_path,
        dtype="bfloat16",
        batch_size=3,
        preprocessing="squash",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert shards[2][1].meta.to_dict() == {
        "vlm": "clip",
        "revision": "r1",
        "weights": "w1",
        "layer": 2,
        "tower_layer": 2,
        "width": WIDTH,
        "dtype": "bfloat16",
        "preprocessing": "squash",
        "grid": [3, 3],
    }
    assert shards[2][1].rows == 5
    assert seen == [(3, 5), (5, 5)]


def test_an_interrupted_extraction_leaves_no_shard_and_a_new_one_is_byte_equal(
    clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path
) -> None:
    calm = extract_tokens(Clip(clip), records, [1, 2], tmp_path / "calm", batch_size=2)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_tokens(Clip(clip), records, [1, 2], tmp_path / "again", batch_size=2, progress=stop)
    assert everything(tmp_path / "again") == []
    again = extract_tokens(Clip(clip), records, [1, 2], tmp_path / "again", batch_size=2)
    assert content(again) == content(calm)


class Ragged(Clip):
    """Images of other sizes have other grids; the batch is padded with rubbish at the end."""

    grid = None

    def preprocess(self, images: list[Image.Image], *, mode: str) -> Any:
        return [(image.height // PATCH, image.width // PATCH) for image in images]

    def grids(self, pixels: Any) -> list[tuple[int, int]]:
        return list(pixels)

    def tower(self, pixels: Any, layers: Sequence[int]) -> dict[int, Tensor]:
        counts = [height * width for height, width in pixels]
        tokens_BNC = torch.full((len(pixels), max(counts), WIDTH), float("nan"))
        for b, (height, width) in enumerate(pixels):
            tokens_BNC[b, : counts[b]] = height + width / 10
        return dict.fromkeys(layers, tokens_BNC)


def test_grids_of_any_size_are_stored_without_padding(clip: CLIPVisionModel, tmp_path: Path) -> None:
    sizes = [(24, 16), (8, 40), (16, 16)]
    records = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        records.append(ImageRecord(str(i), tmp_path / f"{i}.png"))
    tower = Ragged(clip)
    tower.grid = None
    shards = extract_tokens(tower, records, [3], tmp_path / "out", batch_size=3)
    tokens_BNC, mask_BN, grids = TokenDataset([shards[3]]).batch([0, 1, 2])
    assert grids == [(2, 3), (5, 1), (2, 2)]
    assert mask_BN is not None
    assert mask_BN.sum(1).tolist() == [6, 5, 4]
    for b, (height, width) in enumerate(grids):
        torch.testing.assert_close(
            tokens_BNC[b][mask_BN[b]].float(),
            torch.full((height * width, WIDTH), height + width / 10),
            atol=5e-3,
            rtol=0,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2, 6]}, r"layer 6 is outside of the vision tower of clip: .*layers 1 to 5 or -5 to -1"),
        ({"layers": [0]}, r"layer 0 is outside .*layer 9 is hidden_states\[9\]"),
        ({"layers": []}, "no layer"),
        ({"dtype": "int8"}, "'int8' of stored tokens: one of float16, bfloat16, float32"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"records": []}, "no images"),
    ],
)
def test_a_wrong_plan_is_refused_before_any_work(
    clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    tower = Clip(clip)
    arguments = {"records": records, "layers": [2], **options}
    with pytest.raises(BadInput, match=message):
        extract_tokens(tower, folder=tmp_path / "out", **arguments)
    assert tower.passes == []
    assert not (tmp_path / "out").exists()


def test_an_image_given_twice_is_refused(clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"image id 0 .* is given twice"):
        extract_tokens(Clip(clip), [*records, records[0]], [2], tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", r"image id 3: .*3.jpg: .*truncated"),
        ("gone", r"image id 3: .*3.jpg: the file is not there"),
        ("other", r"image id 3: .*3.jpg is not the file that was sampled"),
    ],
)
def test_a_bad_image_is_named_and_leaves_nothing(
    clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path, fault: str, message: str
) -> None:
    victim = records[3].path
    if fault == "gone":
        victim.unlink()
    elif fault == "other":
        victim.write_bytes(records[2].path.read_bytes())
    else:
        cut = victim.read_bytes()[: int(victim.stat().st_size * 0.7)]
        victim.write_bytes(cut)
        records[3] = ImageRecord("id 3", victim, hashlib.sha256(cut).hexdigest())
    with pytest.raises(BadInput, match=message):
        extract_tokens(Clip(clip), records, [1, 2], tmp_path / "out", batch_size=2)
    assert everything(tmp_path / "out") == []


def test_tokens_that_overflow_or_are_not_finite_name_the_image(
    clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path
) -> None:
    class Huge(Clip):
        factor = 1.0

        def tower(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
            states = super().tower(pixels, layers)
            for state_BNC in states.values():
                state_BNC[-1] *= self.factor
            return states

    tower = Huge(clip)
    tower.factor = 1e7
    with pytest.raises(BadInput, match=r"image id 4 \(layer 2\): a value of size .* does not fit into float16"):
        extract_tokens(tower, records, [2], tmp_path / "out")
    assert extract_tokens(tower, records, [2], tmp_path / "out", dtype="bfloat16")[2][1].rows == 5
    tower.factor = float("nan")
    with pytest.raises(BadInput, match=r"image id 4 \(layer 2\): its tokens hold NaN"):
        extract_tokens(tower, records, [2], tmp_path / "other")
    assert everything(tmp_path / "other") == []


def test_room_for_all_layers_is_asked_for_first(
    clip: CLIPVisionModel, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = 2 * 5 * 9 * WIDTH * 2  # layers, images, tokens, width, bytes

    @dataclass
    class Usage:
        free: int

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(int(need * 1.1) - 1))
    with pytest.raises(DiskFull, match=rf"{int(need * 1.1)} bytes are needed"):
        extract_tokens(Clip(clip), records, [1, 2], tmp_path / "out", batch_size=2)
    assert everything(tmp_path / "out") == []
