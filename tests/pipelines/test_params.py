"""params.yaml: what is wrong is said at once, with its path and what would be right."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY
from pipelines.params.load import load
from pipelines.params.model import READS, Params
from pipelines.stage.context import ROOT


@pytest.fixture
def shipped() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture
def write(tmp_path: Path, shipped: dict[str, Any]):
    def make(**changes: Any) -> Path:
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                shipped[section][name] = value
            else:
                shipped[key] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(shipped, sort_keys=False))
        return path

    return make


def message(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load(path)
    return str(caught.value)


def test_the_shipped_file_is_sound_and_is_what_the_defaults_say(tmp_path: Path) -> None:
    params = load(ROOT / "params.yaml")
    assert params.vlm == ("tiny-llava",)
    assert params.slots == ((16, 32, 48),)
    assert [budget.tokens(144) for budget in params.keep] == [48, 32, 16, 8, 4]
    empty = tmp_path / "params.yaml"
    empty.write_text("")
    defaults = load(empty)
    for name in set(Params.model_fields) - {"train", "cluster"}:
        assert getattr(params, name) == getattr(defaults, name), name
    ours, library = params.train.config("mse", (16,), 0), defaults.train.config("mse", (16,), 0)
    assert ours.steps == 200, "half of the library's default keeps `make repro` within minutes"
    assert replace(ours, steps=library.steps) == library


def test_the_shipped_file_lists_every_entry_of_our_own(shipped: dict[str, Any]) -> None:
    assert set(shipped) == set(Params.model_fields)
    for name in ("sample", "extract", "evaluate", "measure", "efficiency", "mlflow"):
        fields = type(getattr(load(ROOT / "params.yaml"), name)).model_fields
        assert set(shipped[name]) == set(fields), name


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"kep": 16}, ["kep: unknown key", "did you mean keep?", "top_k"]),
    ({"sample__imags": 1}, ["sample.imags: unknown key", "did you mean images?"]),
    ({"sample__style": {"background": "grass"}}, ["sample.style.background", "grass", "natural"]),
    ({"sample__style": {"small_share": 2}}, ["sample.style.small_share", "2"]),
    ({"sample__style": {"sides": [96, 100]}}, ["sample.style.sides", "[96, 100]", "multiple of 16"]),
    ({"sample__style": {"sides": [32, 96]}}, ["sample.style.sides", "[32, 96]", "from 64 on"]),
    ({"vlm": "tiny-qwen", "method": "tome"}, ["method: tome needs a CLIP tower, and tiny-qwen has another"]),
    ({"train__lerning_rate": 1}, ["train.lerning_rate: unknown key", "did you mean learning_rate?"]),
    ({"train__seed": 1}, ["train.seed: unknown key"]),
    ({"train__pruner": {"residual_of": "handed_on"}, "train__handed_on": False},
     ["train.handed_on: false, but train.pruner.residual_of is handed_on"]),
    ({"ablate": {"train": {"pruner": {"residual_of": ["handed_on"]}}}, "train__handed_on": False},
     ["train.handed_on: false, but train.pruner.residual_of is handed_on"]),
    ({"train__pruner": {"slot_dims": 3}}, ["train.pruner.slot_dims: unknown key", "slot_dim"]),
    ({"train__pruner": {"decoder": "mpl"}}, ["train.pruner.decoder", "'mpl'", "mlp"]),
    ({"train__steps": 0}, ["train.steps", "0", "at least 1"]),
    ({"train__precision": "fp64"}, ["train.precision", "fp64", "fp32"]),
    ({"train__validation_share": 1}, ["train.validation_share", "1"]),
    ({"train": 3}, ["train: 3 is not a mapping"]),
    ({"loss": "mae"}, ["loss: 'mae' is not legal", "aw_mse, mse"]),
    ({"loss": ["mse", "aw_mes"]}, ["loss[1]: 'aw_mes'", "did you mean aw_mse?"]),
    ({"loss": []}, ["loss: the list is empty"]),
    ({"loss": ["mse", "mse"]}, ["loss: 'mse' is given twice"]),
    ({"layer": 40}, ["layer: layer 40 is outside", "12 encoder blocks"]),
    ({"layer": [9, 0]}, ["layer[1]", "0 is outside"]),
    ({"layer": [11, -2]}, ["layer[1]: -2 and 11 are the same layer"]),
    ({"layer": 9.0}, ["layer: 9.0 should be a valid integer"]),
    ({"layer": True}, ["layer: True should be a valid integer"]),
    ({"layer": "nine"}, ["layer: 'nine' should be a valid integer"]),
    ({"slots": 32}, ["slots: 32 is not a list", "[16, 32, 48]"]),
    ({"slots": [48, 16]}, ["slots: [48, 16] is not in ascending order: [16, 48]"]),
    ({"slots": [16, 16]}, ["slots: 16 is given twice"]),
    ({"slots": [[16], []]}, ["slots[1]: the list is empty"]),
    ({"slots": [[16], 32]}, ["slots[1]: 32 is not a list"]),
    ({"slots": [16, 400]}, ["slots: 400 slots", "144 tokens"]),
    ({"slots": [0]}, ["slots[0]: 0 should be greater than or equal to 1"]),
    ({"top_k": 17}, ["top_k: 17 tokens a slot are more than the 4 that are kept"]),
    ({"keep": 400}, ["keep: keep is 400", "144 tokens"]),
    ({"keep": [48, 0]}, ["keep[1]: keep is 0", "at least 1"]),
    ({"keep": [48, "33.3%"]}, ["keep[1]: '33.3%' and 48 are both 48 tokens"]),
    ({"keep": [48, 48]}, ["keep: 48 is given twice"]),
    ({"keep": 1.5}, ["keep: keep is 1.5", "(0, 1]"]),
    ({"keep": "a third"}, ["keep: keep is 'a third'", "11.1%"]),
    ({"keep": float("nan")}, ["keep: keep is nan", "(0, 1]"]),
    ({"keep": True}, ["keep: keep is True"]),
    ({"keep": []}, ["keep: the list is empty"]),
    ({"method": "randon"}, ["method: 'randon' is not legal", "did you mean random?", "oc-vtp", "all"]),
    ({"method": ["all", "random"]}, ["method[0]: 'all' is not legal"]),
    ({"benchmark": "pop"}, ["benchmark: 'pop' is not legal", "did you mean pope?"]),
    ({"benchmark": ["pope", "all"]}, ["benchmark[1]: 'all' is not legal"]),
    ({"seed": -1}, ["seed: -1 should be greater than or equal to 0"]),
    ({"seed": {"a": 1}}, ["seed: {'a': 1} should be a valid integer"]),
    ({"vlm": "tiny-lava"}, ["vlm: no VLM 'tiny-lava'", "tiny-llava"]),
    ({"vlm": "llava-1.5-7b"}, ["vlm: llava-1.5-7b", "not on this machine", "ocvtp prefetch"]),
    ({"sample__source": "imagenet"}, ["sample.source: 'imagenet' should be 'scenes' or 'coco'"]),
    ({"sample__source": "coco"}, ["sample.annotations: null", "sample.image_folder: null"]),
    ({"sample__annotations": "a.json"}, ["sample.annotations: 'a.json' is not read"]),
    ({"sample__questions": 1}, ["sample.questions: at least 2"]),
    ({"sample__max_reject_rate": 2}, ["sample.max_reject_rate: 2 should be less than or equal to 1"]),
    ({"sample__images": "2048"}, ["sample.images: '2048' should be a valid integer"]),
    ({"extract__dtype": "fp16"}, ["extract.dtype: 'fp16'", "did you mean float16?"]),
    ({"evaluate__shards": 0}, ["evaluate.shards: 0 should be greater than or equal to 1"]),
    ({"evaluate__shards": 1025}, ["evaluate.shards: 1025 should be less than or equal to 1024"]),
    ({"evaluate__shards": "three"}, ["evaluate.shards: 'three' should be a valid integer"]),
    ({"evaluate__bootstrap": 3}, ["evaluate.bootstrap: 3 should be greater than or equal to 100"]),
    ({"evaluate": None}, ["evaluate: None is not a mapping"]),
    ({"cluster__executer": "ray"}, ["cluster", "executer", "executor"]),
    ({"cluster__executor": "kubernetes"}, ["cluster", "kubernetes", "local"]),
    ({"cluster__remote": "bucket"}, ["cluster.remote: 'bucket' is not the address of a folder, such as s3://"]),
    ({"cluster__fail_fast": "no"}, ["cluster.fail_fast: 'no' should be a valid boolean"]),
    ({"cluster__resources": {"trian": {}}}, ["cluster.resources.trian: unknown key", "did you mean train?"]),
    ({"cluster__resources": {"train": {"gpus": "two"}}}, ["cluster.resources.train.gpus: 'two'", "'auto'"]),
    ({"ablate": {"keep": [8]}}, ["ablate.keep: unknown key", "layer, loss, slots, top_k, train"]),
    ({"ablate": {"train": {"steps": [[50]]}}}, ["ablate.train.steps[0]: [50] is not a single value"]),
    ({"ablate": {"train": {"steps": [0]}}}, ["ablate.train.steps: steps is 0", "at least 1"]),
    ({"ablate": {"loss": "mse"}}, ["ablate.loss: 'mse' is not a list"]),
    ({"ablate": {"loss": ["mes"]}}, ["ablate.loss[0]: 'mes'", "did you mean mse?"]),
    ({"ablate": {"layer": [40]}}, ["ablate.layer: ", "40"]),
    ({"ablate": {"top_k": [60]}}, ["ablate.top_k: 60 tokens a slot"]),
    ({"ablate": {"slots": [[200]]}}, ["ablate.slots: 200 slots", "144"]),
    ({"ablate": {"together": [{"loss": "mes"}]}}, ["ablate.together[0].loss", "'mes'", "did you mean mse?"]),
    ({"ablate": {"together": [{"layer": 40}]}}, ["ablate.layer: ", "40"]),
    ({"ablate": {"together": [{"keep": 8}]}}, ["ablate.together[0].keep: unknown key"]),
    ({"ablate": {"together": {"layer": 8}}}, ["ablate.together: ", "not a list"]),
    ({"ablate": {"train": {"stesp": [1]}}}, ["ablate.train.stesp: unknown key", "did you mean steps?"]),
    ({"ablate": {"train": {"pruner": {"decoder": ["mpl"]}}}}, ["ablate.train.pruner.decoder: decoder is 'mpl'", "mlp"]),
    ({"ablate": {"evaluate": {"options": {"oc-vtp": {"fil": [1]}}}}}, ["oc-vtp.fil: oc-vtp has no option", "fill"]),
    ({"ablate": {"evaluate": {"options": {"vanilla": {"top_k": [1]}}}}}, ["top_k is no option to give here"]),
    ({"evaluate__options": {"oc-vpt": {"fill": "random"}}}, ["there is no method 'oc-vpt'", "oc-vtp"]),
    ({"evaluate__options": {"oc-vtp": 3}}, ["evaluate.options.oc-vtp: 3 is not a mapping"]),
    ({"train__on": "gpa"}, ["train.on: 'gpa' is not legal", "did you mean gqa?"]),
    ({"train__on": ["sample", "pope"]}, ["train.on[1]: 'pope' is not legal, which is for evaluation alone"]),
    ({"train__on": "vizwiz"}, ["train.on: vizwiz is not among the benchmarks of the grid"]),
    ({"ablate": {"train": {"on": ["mme"]}}}, ["ablate.train.on: 'mme' is not legal"]),
    ({"train__on": "gqa", "evaluate__data": "official"}, ["sample.source: scenes, but evaluate.data is official"]),
    ({"sample__training": {"gqa": {"annotations": "a", "image_folder": "b"}}}, ["sample.training.gqa: it is not read"]),
    ({"sample__training": {"pope": {"annotations": "a", "image_folder": "b"}}}, ["no such training split"]),
    ({"sample__training": {"gqa": {"annotations": "a"}}}, ["sample.training.gqa: image_folder is missing"]),
    (
        {"train__on": "vqav2", "benchmark": "vqav2", "evaluate__data": "official", "sample__source": "coco",
         "sample__annotations": "a", "sample__image_folder": "b"},
        ["sample.training.vqav2: is missing: lmms-lab-encoder/VQAv2 has no training split"],
    ),
    ({"slots": "ownn"}, ["slots: 'ownn' is not a list of slot counts, such as [16, 32, 48], and not own"]),
    ({"slots": []}, ["slots: "]),
    ({"mlflow__uri": ""}, ["mlflow.uri: '' should have at least 1 character"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=[str(changes)[:60] for changes, _ in WRONG])
def test_a_mistake_is_named_with_its_path_and_what_would_be_right(changes, parts, write) -> None:
    text = message(write(**changes))
    assert text.startswith("params.yaml: ")
    assert [part for part in parts if part not in text] == [], text


def test_all_mistakes_are_named_at_once(write) -> None:
    text = message(write(kep=1, loss="mae", layer=40, train__steps=0, sample__images=0))
    assert "5 entries are wrong" in text
    for path in ("kep", "loss", "layer", "train.steps", "sample.images"):
        assert f"  {path}: " in text


def test_a_key_given_twice_and_broken_yaml_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("layer: 9\nloss: mse\nlayer: 10\n")
    assert "line 3: the key 'layer' is given twice" in message(path)
    path.write_text("layer: [9\nloss: mse\n")
    assert "line" in message(path)
    path.write_text("- 1\n- 2\n")
    assert "is not a mapping" in message(path)
    assert "does not exist" in message(tmp_path / "none.yaml")


def test_numbers_are_read_as_dvc_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train: {learning_rate: 1e-3}\nkeep: [0.333, 11.1%, 32]\nslots: [[16], [16, 48]]\nlayer: -2\n")
    params = load(path)
    assert params.train.config("mse", (16,), 0).learning_rate == 1e-3
    assert [budget.tokens(144) for budget in params.keep] == [48, 16, 32]
    assert params.slots == ((16,), (16, 48))
    assert params.layer == (-2,)


def test_all_stands_for_every_method_that_has_a_meaning_on_the_vlm(write, caplog: pytest.LogCaptureFixture) -> None:
    assert load(write(method="all")).method == tuple(n for n in REGISTRY if n not in ("trim", "cdpruner"))
    assert "method: all is without trim, which needs the text tower of the CLIP" in caplog.text
    assert load(write(method=["random", "css+fastv"])).method == ("random", "css+fastv")
    assert "method: css+random: random acts before the LLM" in message(write(method="css+random"))
    path = write(method=["random", "trim"])
    assert "method[1]: trim needs the text tower of the CLIP that tiny-llava's tower was trained with" in message(path)
    given = load(write(method=["random", "trim"], evaluate__options={"trim": {"clip": "some/clip"}}))
    assert given.method == ("random", "trim")


def test_the_environment_says_where_tasks_run_and_where_results_are(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCVTP_EXECUTOR", "ray")
    monkeypatch.setenv("OCVTP_STORE", "/elsewhere")
    config = load(write()).cluster
    assert (config.executor, config.store) == ("ray", Path("/elsewhere"))
    assert (config.application, "OCVTP_ROOT" in config.moved_by) == ("ocvtp", True)
    assert "HF_" in config.passed_on
    monkeypatch.setenv("OCVTP_EXECUTOR", "rya")
    assert "cluster.executor: 'rya' (OCVTP_EXECUTOR) is no executor; did you mean ray?" in message(write())


def test_official_data_needs_no_scenes(write) -> None:
    params = load(write(evaluate__data="official", sample__questions=0, benchmark=["mmmu", "pope"]))
    assert params.benchmark == ("mmmu", "pope")


def test_what_behaviour_leaves_open_follows_it(write) -> None:
    train = load(write(train__behaviour="reference")).train
    assert (train.config("mse", (16,), 0).epochs, train.pruner_config(1024, (24, 24)).extra_slot) == (30, True)


@pytest.mark.parametrize("stage", READS)
def test_a_stage_can_read_what_it_declares_and_nothing_else(stage: str) -> None:
    params = load(ROOT / "params.yaml").seen_by(stage)
    dotted = [entry.split(".") for entry in READS[stage] if "." in entry]
    entries = {name: {entry for section, entry in dotted if section == name} for name, _ in dotted}
    for name in Params.model_fields:
        if name in (*READS[stage], "cluster", "mlflow"):
            getattr(params, name)
        elif name in entries:
            section, whole = getattr(params, name), getattr(load(ROOT / "params.yaml"), name)
            for entry in type(whole).model_fields:
                if entry in entries[name]:
                    assert getattr(section, entry) == getattr(whole, entry)
                else:
                    with pytest.raises(LookupError, match=f"stage {stage} reads the entry '{name}.{entry}'"):
                        getattr(section, entry)
        else:
            with pytest.raises(LookupError, match=f"stage {stage} reads the entry '{name}'"):
                getattr(params, name)
