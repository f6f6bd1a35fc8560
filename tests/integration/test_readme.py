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
IN_PIPELINE, IN_GRID = "tests/integration/test_pipeline.py", "tests/pipelines/test_grid.py"
ELSEWHERE = {
    "make repro": ("tests/integration/conftest.py", 'workspace.run("dvc", "repro")'),
    "make test": ("Makefile", "pytest --numprocesses"),
    "make ui": ("tests/integration/test_mlflow_page.py", '"-m", "mlflow", "server"'),
    "source .venv/bin/activate": ("tests/integration/pipeline_workspace.py", '"PATH": f"{Path(sys.executable).parent}'),
    "dvc repro": (IN_PIPELINE, 'finished.run("dvc", "repro")'),
    "dvc exp run -S loss=mse": (IN_PIPELINE, '("loss=mse", {"sample", "extract"}'),
    "dvc exp run -S layer=-2": (IN_PIPELINE, '"layer=-2", {"sample"}'),
    "dvc exp run -S 'keep=[72,16]'": (IN_PIPELINE, '"keep=[48,32,16]", {"sample", "extract", "train"}'),
    "dvc exp run -S 'loss=[mse,aw_mse]'": (IN_GRID, '("loss", ("aw_mse", "mse"), 6, 18, 9)'),
    "dvc exp run -S 'train.on=[sample,gqa,textvqa]'": (
        "tests/pipelines/test_trained_on.py",
        '"on": ["sample", "textvqa"]',
    ),
    "python pipelines/train.py --costs": ("tests/pipelines/test_costs.py", 'LARGE, {}), "--costs"]) == 0'),
    EVAL: (
        "tests/ocvtp/evaluation/test_evaluation_commands.py",
        '["eval", "--vlm", str(vlm), "--benchmark", benchmark',
    ),
    TEN: ("tests/integration/test_ten_benchmarks.py", "workspace.run(*preset())"),
    TWO_FAMILIES: ("tests/pipelines/test_two_families.py", '"sample": {"style": {"sides": [64, 160]}}'),
}
"""Commands that this file does not run: the file that does, and what of it says so."""


def commands() -> list[str]:
    """Every line of the README's bash blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_gives_commands() -> None:
    assert {"ocvtp doctor", "python -m pipelines verify", *ELSEWHERE} <= set(commands())


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_command_is_run_elsewhere(command: str) -> None:
    file, said = ELSEWHERE[command]
    assert said in (ROOT / file).read_text(encoding="utf-8"), f"{file} no longer runs {command}"


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
