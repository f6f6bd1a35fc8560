"""Profiles: how to use a cluster, in a file of `cluster/ray/` or `cluster/slurm/`, or of one's own.

`default.yaml` of each has every legal key, explained, with its default. A profile names those that differ.
"""

from pathlib import Path
from typing import ClassVar, Self

from cluster.errors import BadConfig
from cluster.validation import Section, load_yaml, nearest, settle


class Profile(Section):
    """The keys of a kind of profile."""

    kind: ClassVar[str]

    @classmethod
    def load(cls, name: str | None) -> Self:
        """The profile of that name, or in the YAML file of that path; the defaults if None.

        Raises:
            BadConfig: no such file, one that is not YAML, or all unknown keys and impossible values in it.
        """
        if name is None:
            return cls()
        path = Path(name)
        if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
            files = sorted((Path(__file__).parent / cls.kind).glob("*.yaml"))
            known = {file.stem: file for file in files if file.stem != "cluster"}
            if name not in known:
                raise BadConfig(f"cluster.profile: there is no {cls.kind} profile {name!r}{nearest(name, known)}; "
                                "a path of your own ends with .yaml")  # fmt: skip
            path = known[name]
        elif not path.is_file():
            raise BadConfig(f"cluster.profile: there is no file {name}")
        return settle(cls, load_yaml(path), str(path))
