"""The commands of docs/variants.md, as DVC reads them: params.yaml stays sound, and the grid is what the page says."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides

from ocvtp.methods import REGISTRY
from ocvtp.vlms import resolve
from pipelines.grid import Cell, pruner_cells, settings, token_sets
from pipelines.params.load import load
from pipelines.params.model import Params
from pipelines.stage.context import ROOT

PAGE = (ROOT / "docs/variants.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `dvc exp run` of the page, with lines that go on put together."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line.startswith("dvc exp run")]


def overrides(command: str) -> list[str]:
    words = shlex.split(command)
    assert words[:3] == ["dvc", "exp", "run"]
    assert set(words[3::2]) == {"-S"}
    return words[4::2]


def read(folder: Path, settings_: Sequence[str]) -> Params:
    """params.yaml after `dvc exp run -S ...`, which rewrites the file."""
    path = folder / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    apply_overrides(path, list(settings_))
    return load(path)


def of_grid(params: Params) -> list[Cell]:
    return [one for one in settings(params, REGISTRY, {"tiny-llava": 144, "tiny-qwen": None}) if one.method == "oc-vtp"]


EXPECTED: dict[str, Any] = {
    # command: pruners, sets of tokens of tiny-llava, settings of oc-vtp
    "dvc exp run -S 'train.on=[sample,gqa,textvqa]'": (9, 6, 45),
    "dvc exp run -S '+ablate.evaluate.options.oc-vtp.fill=[none]'": (3, 2, 30),
    "dvc exp run -S 'keep=[48,32,16]' -S '+ablate.top_k=[2,3,6]'": (3, 2, 36),
    "dvc exp run -S 'slots=[[16,32,48],[8,16,24],[16]]'": (9, 2, 45),
    "dvc exp run -S 'vlm=[tiny-llava,tiny-qwen]' -S 'keep=[0.222,0.111]' -S slots=own": (6, 2, 12),
    "dvc exp run -S 'keep=[48,16]' -S 'slots=[[16,32,48],[16]]' -S 'top_k=[1,2,4]'": (6, 2, 36),
    "dvc exp run -S 'layer=[9,10,-2]'": (9, 3, 45),
    "dvc exp run -S 'loss=[aw_mse,mse,span]'": (9, 2, 45),
    "dvc exp run -S '+ablate.loss=[answers,masks]'": (9, 2, 45),
    "dvc exp run -S '+ablate.together=[{loss: masks, train: {pruner: {assignment: mass, residual_of: handed_on, "
    "queries: fps, truncation: none}}}]'": (6, 2, 30),
    "dvc exp run -S '+ablate.layer=[10,-2]' -S '+ablate.loss=[mse]' -S '+ablate.train.steps=[50,800]'": (18, 3, 90),
    "dvc exp run -S '+ablate.together=[{loss: span, layer: -2, slots: [4,8]}]'": (6, 2, 30),
}


def test_the_page_gives_these_commands() -> None:
    assert sorted(commands()) == sorted(EXPECTED)


@pytest.mark.parametrize("command", EXPECTED)
def test_a_command_spans_the_grid_that_it_should(tmp_path: Path, command: str) -> None:
    params = read(tmp_path, overrides(command))
    found = of_grid(params)
    assert (len(pruner_cells(params)), len(token_sets(params, resolve("tiny-llava"))), len(found)) == EXPECTED[command]
    assert {one.pruner for one in found} == set(pruner_cells(params))
    assert len({one.name for one in found}) == len(found)


def test_a_key_that_yaml_1_1_takes_for_true_is_what_it_says(tmp_path: Path) -> None:
    """DVC writes it without quotes."""
    params = read(tmp_path, ["train.on=gqa"])
    assert re.search(r"^  on: gqa", (tmp_path / "params.yaml").read_text(), re.MULTILINE)
    assert params.train.on == ("gqa",)
