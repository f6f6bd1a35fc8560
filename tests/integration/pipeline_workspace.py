"""Workspaces: copies of the repository in which the pipeline runs with small parameters."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SMALL = {
    "method": ["vanilla", "random", "oc-vtp"],
    "keep": [48, 16],
    "benchmark": ["pope", "textvqa"],
    "seed": [0],
    "sample": {"images": 96, "questions": 24},
    "extract": {"shard_images": 48},
    "train": {"steps": 60, "batch_size": 16, "eval_every": 30, "checkpoint_every": 10},
    "evaluate": {"bootstrap": 200},
}
"""What is changed in params.yaml for a run of a minute or two."""


class Workspace:
    """A copy of the repository's files in a git repository of its own."""

    def __init__(self, folder: Path, changes: dict) -> None:
        self.folder = folder
        self.seconds = 0.0  # that an undisturbed `dvc repro` took, where there was one
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, stdout=-1
        )
        for name in listing.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.change(**changes)
        (folder / "dvc.lock").unlink(missing_ok=True)
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "workspace"]):
            subprocess.run(
                ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *command], cwd=folder, check=True
            )

    def change(self, **changes: object) -> None:
        """Change entries of params.yaml; those of a section are merged into it."""
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for key, value in changes.items():
            params[key] = {**params[key], **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command run here: this interpreter first on the path, this folder's code first."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "DVC_NO_ANALYTICS": "1",
            "COLUMNS": "120",
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a session of its own, so that it can be killed with all its children."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command to its end, expect its exit code, and return what it printed."""
        process = self.start(*command)
        output = process.communicate()[0]
        assert process.returncode == code, f"{' '.join(command)} ended with {process.returncode}:\n{output[-6000:]}"
        return output

    def results(self) -> dict[str, str]:
        """Digest of every file that the stages put out."""
        found = {}
        for top in ("data", "models", "results", "reports"):
            for path in sorted((self.folder / top).rglob("*")):
                if path.is_file():
                    found[str(path.relative_to(self.folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found
