"""Reading params.yaml: one error that lists all that is wrong with it, before any work starts."""

from pathlib import Path

from cluster import BadConfig
from cluster.validation import Problems, load_yaml
from ocvtp.errors import BadInput
from pipelines.params.crosscheck import crosscheck, read
from pipelines.params.model import Cluster, Params


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check params.yaml; the environment may override where tasks run and where results are.

    Raises:
        BadInput: with every unknown key, wrong type and impossible value, its path and the nearest legal one.
    """
    file = Path(path)
    try:
        data = load_yaml(file)
    except BadConfig as error:
        raise BadInput(str(error)) from None
    data = {} if data is None else data
    if isinstance(data, dict) and isinstance(data.get("cluster", {}), dict):
        data["cluster"] = Cluster.overridden(data.get("cluster", {}))
    problems = Problems(file.name)
    params = crosscheck(read(Params, data, problems), problems)
    problems.raise_as(BadInput)
    return params
