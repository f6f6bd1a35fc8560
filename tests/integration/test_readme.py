"""The README's commands do what it says, in the order in which it gives them."""

import re
import shutil
from pathlib import Path

import pytest
from pipeline_workspace import ROOT, Workspace

pytestmark = pytest.mark.pipeline
TWO_FAMILIES = (
    "dvc exp run -S 'vlm=[tiny-llava,tiny-qwen]' -S 'keep=[0.333,0.222,0.111]' -S 'sample.style.sides=[64,160]'"
)
EVAL = (
    "ocvtp eval --vlm tiny-llava --method css --keep 16 --benchmark pope,gqa --data data/sample/benchmarks --limit 200"
)
TEN = "dvc exp run -S benchmark=all -S 'method=[random,visionzip,css,oc-vtp]' -S 'keep=[48,32,16]' -S seed=0"
ELSEWHERE = {
    "make repro": "the workspace that all tests here share: `dvc repro`",
    "make test": "this very run",
    "make ui": "test_mlflow_page.py",
    "source .venv/bin/activate": "the environment of this run",
    "dvc repro": "test_pipeline.py, twice",
    "dvc exp run -S loss=mse": "test_pipeline.py",
    "dvc exp run -S layer=-2": "test_pipeline.py",
    "dvc exp run -S 'keep=[72,16]'": "test_pipeline.py",
    "dvc exp run -S 'loss=[mse,aw_mse]'": "tests/pipelines: grids",
    "dvc exp run -S 'train.on=[sample,gqa,textvqa]'": "tests/pipelines/test_trained_on.py and test_variants.py",
    "python pipelines/train.py --costs": "tests/pipelines/test_costs.py",
    EVAL: "tests/ocvtp/evaluation/test_evaluation_commands.py",
    TEN: "tests/pipelines/test_ten_benchmarks.py",
    TWO_FAMILIES: "tests/pipelines/test_two_families.py",
    "ocvtp prefetch llava-1.5-7b gqa mme pope textvqa": "needs the internet",
}
"""Commands that this file does not run, and what does."""


def commands() -> list[str]:
    """Every line of the README's bash blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_gives_commands() -> None:
    assert {"make repro", "make test", "ocvtp doctor", "python -m pipelines verify"} <= set(commands())


@pytest.mark.parametrize("command", [line for line in commands() if line not in ELSEWHERE])
def test_a_command_of_the_readme(command: str, finished: Workspace) -> None:
    photo = next(iter(sorted((finished.folder / "data/sample/benchmarks/images").iterdir())))
    shutil.copyfile(photo, finished.folder / "photo.jpg")
    printed = finished.run(*command.split())
    assert "Traceback" not in printed


def test_show_draws_a_picture(finished: Workspace) -> None:
    photo = next(iter(sorted((finished.folder / "data/sample/benchmarks/images").iterdir())))
    pruner = next(iter(sorted((finished.folder / "models/tiny-llava").glob("layer_*"))))
    finished.run(
        "ocvtp", "show", str(photo), "--methods", "random,oc-vtp", "--pruner", str(pruner), "--out", "kept.png"
    )
    assert Path(finished.folder / "kept.png").read_bytes()[:4] == b"\x89PNG"
