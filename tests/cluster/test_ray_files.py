"""What Ray is given in files: cluster.yaml by its own schema, and profiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import Resources
from cluster.errors import BadConfig
from cluster.ray.profile import Node, Profile, misfit

ROOT = Path(__file__).parents[2]


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
    with pytest.raises(BadConfig, match=r"mine.yaml: unknown key 'adress': did you mean 'address'\?"):
        Profile.load(str(path))
    assert Profile.load(None) == Profile()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("largest_node: {gpu: 1, cpus: 8, memory_gb: 60}", r"largest_node\.gpu: did you mean 'gpus'\?"),
        ("largest_node: {gpus: 1, memory_gb: 60}", "how much cpus it has"),
        ("largest_node: {cpus: 8, gpus: many, memory_gb: 60}", r"largest_node\.gpus is 'many'"),
        ("largest_node: 8", "largest_node is 8: a mapping such as"),
        ("scheduling: SPRAED", "'SPRAED': DEFAULT or SPREAD"),
        ("patience_minutes: -1", "patience_minutes is -1"),
        ("environment: {OMP_NUM_THREADS: 4}", r"environment\.OMP_NUM_THREADS is 4: a text"),
        ("resources: {spot: 0}", r"resources\.spot is 0"),
        ("address: 6379", "address is 6379: a text"),
    ],
)
def test_a_profile_with_an_impossible_value_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{text}\n")
    with pytest.raises(BadConfig, match=rf"mine\.yaml: .*{message}"):
        Profile.load(str(path))


def test_a_cluster_that_grows_takes_what_its_largest_node_will_hold() -> None:
    asked = Resources(gpus=1, memory_gb=10)
    small = [Node(4, 0, 16)]
    assert "asks for 1 core(s), 1 GPU(s) and 10 GB" in str(misfit(asked, small, Profile()))
    assert misfit(asked, small, Profile(largest_node={"cpus": 8, "gpus": 1, "memory_gb": 60})) is None
    kind = Profile(accelerator_type="H100")
    assert "GPUs of type H100" in str(misfit(asked, [Node(8, 1, 64)], kind))
    assert misfit(asked, [Node(8, 1, 64, {"accelerator_type:H100": 1.0})], kind) is None
