"""What Ray is given in files: cluster.yaml by its own schema, and profiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import Resources
from cluster.errors import BadConfig
from cluster.host import GIB
from cluster.ray.profile import LargestNode, RayProfile, misfit
from cluster.slurm.profile import SlurmProfile

ROOT = Path(__file__).parents[2]


def test_ray_accepts_cluster_yaml() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster/ray/cluster.yaml").read_text())
    validate_config(prepare_config(config))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all(command.startswith("/mnt/shared/code/.venv/bin/ray ") for command in starts), "the ray of the lock file"
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
    small = [{"CPU": 4.0, "memory": 16.0 * GIB}]
    assert "asks for 1 core(s), 1 GPU(s) and 10 GB" in str(misfit(asked, small, RayProfile()))
    assert misfit(asked, small, RayProfile(largest_node=LargestNode(cpus=8, gpus=1, memory_gb=60))) is None
    kind = RayProfile(accelerator_type="H100")
    large = {"CPU": 8.0, "GPU": 1.0, "memory": 64.0 * GIB}
    assert "GPUs of type H100" in str(misfit(asked, [large], kind))
    assert misfit(asked, [{**large, "accelerator_type:H100": 1.0}], kind) is None
