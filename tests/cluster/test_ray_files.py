"""What Ray is given in files: the working dir it would copy, its own schema of cluster.yaml, profiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import Resources
from cluster.errors import BadConfig, NotAvailable
from cluster.ray.profile import LargestNode, Node, RayProfile, misfit
from cluster.ray.upload import check_size, main, uploaded
from cluster.slurm.profile import SlurmProfile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in {
        "a.py": 10, "big/one.bin": 5_000_000, "big/two.bin": 1_000_000, "mlruns/x": 900, ".git/y": 700, ".venv/z": 600,
        "deep/er/kept.txt": 3, "deep/er/skipped.log": 4, "__pycache__/m.pyc": 5,
    }.items():  # fmt: skip
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0" * size)
    (tmp_path / "code" / ".rayignore").write_text("mlruns/\n")
    (tmp_path / "code" / "deep" / ".gitignore").write_text("*.log\n")
    return tmp_path / "code"


def test_what_would_be_copied_is_what_ray_zips(folder: Path, tmp_path: Path) -> None:
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    found = {path.as_posix() for path in uploaded(folder)}
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True,
                   excludes=[".git", ".venv", "venv", "__pycache__"])  # fmt: skip
    with zipfile.ZipFile(tmp_path / "package.zip") as made:
        zipped = {name for name in made.namelist() if not name.endswith("/")}
    # Ray leaves its own list out, and so much does not count here.
    assert found - {".rayignore"} == zipped - {".rayignore"}
    assert {"a.py", "big/one.bin", "deep/er/kept.txt"} <= found
    assert not {"mlruns/x", "deep/er/skipped.log", ".git/y"} & found


def test_too_much_is_refused_before_it_is_zipped_and_the_largest_folders_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_size(folder) > 6_000_000
    with pytest.raises(NotAvailable, match=r"6 MiB to copy to the nodes, and Ray takes 1 MiB: .*big/one.bin \(4.8 MiB"):
        check_size(folder, limit=2**20)
    with pytest.raises(NotAvailable, match="is not a folder"):
        check_size(folder / "nowhere")
    assert main([str(folder)]) == 0
    assert "big/two.bin (1.0 MiB)" in capsys.readouterr().out
    assert main([str(folder / "nowhere")]) == 2


def test_this_repository_is_small_enough() -> None:
    assert check_size(ROOT) < 50 * 2**20


def test_ray_accepts_cluster_yaml() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster/ray/cluster.yaml").read_text())
    validate_config(prepare_config(config))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all(command.startswith("/mnt/shared/ocvtp/.venv/bin/ray ") for command in starts), "the ray of the lock file"
    assert all("ImageId" in kind["node_config"] for kind in config["available_node_types"].values())


def test_a_profile_with_a_mistake_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("adress: auto\n")
    with pytest.raises(BadConfig, match=r"mine.yaml: an entry is wrong\n  adress: unknown key; did you mean address\?"):
        RayProfile.load(str(path))
    path.write_text("adress: auto\nscheduling: 3\naddress: auto\n")
    with pytest.raises(BadConfig, match=r"2 entries are wrong\n  scheduling: 3 should be .*\n  adress: unknown key"):
        RayProfile.load(str(path))
    path.write_text("address: auto\naddress: local\n")
    with pytest.raises(BadConfig, match="line 2: the key 'address' is given twice"):
        RayProfile.load(str(path))


@pytest.mark.parametrize("profile", [RayProfile, SlurmProfile])
def test_the_file_of_defaults_says_what_the_code_does(profile: type[RayProfile | SlurmProfile]) -> None:
    assert profile.load("default") == profile.load(None)
    explained = yaml.safe_load((ROOT / "cluster" / profile.kind / "default.yaml").read_text())
    assert set(explained) == set(profile.model_fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("largest_node: {gpu: 1, cpus: 8, memory_gb: 60}", r"largest_node\.gpu: unknown key; did you mean gpus\?"),
        ("largest_node: {gpus: 1, memory_gb: 60}", "largest_node: cpus is missing"),
        ("largest_node: {cpus: 8, gpus: many, memory_gb: 60}", r"largest_node\.gpus: 'many' should be a valid number"),
        ("largest_node: 8", "largest_node: 8 is not a mapping"),
        ("scheduling: SPRAED", "scheduling: 'SPRAED' should be 'DEFAULT' or 'SPREAD'; did you mean SPREAD"),
        ("patience_minutes: -1", "patience_minutes: -1 should be greater than or equal to 0"),
        ("environment: {OMP_NUM_THREADS: 4}", r"environment\.OMP_NUM_THREADS: 4 should be a valid string"),
        ("resources: {spot: 0}", r"resources\.spot: 0 should be greater than 0"),
        ("address: 6379", "address: 6379 should be a valid string"),
        ("scheduling: null", "scheduling: None should be 'DEFAULT' or 'SPREAD'"),
    ],
)
def test_a_profile_with_an_impossible_value_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{text}\n")
    with pytest.raises(BadConfig, match=rf"(?s)mine\.yaml: .*{message}"):
        RayProfile.load(str(path))


def test_a_cluster_that_grows_takes_what_its_largest_node_will_hold() -> None:
    asked = Resources(gpus=1, memory_gb=10)
    small = [Node(4, 0, 16)]
    assert "asks for 1 core(s), 1 GPU(s) and 10 GB" in str(misfit(asked, small, RayProfile()))
    assert misfit(asked, small, RayProfile(largest_node=LargestNode(cpus=8, gpus=1, memory_gb=60))) is None
    kind = RayProfile(accelerator_type="H100")
    assert "GPUs of type H100" in str(misfit(asked, [Node(8, 1, 64)], kind))
    assert misfit(asked, [Node(8, 1, 64, {"accelerator_type:H100": 1.0})], kind) is None
