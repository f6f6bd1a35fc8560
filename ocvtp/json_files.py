"""Reading JSON that something else wrote."""

import json
from pathlib import Path
from typing import Any

from ocvtp.errors import Corrupt


def read_json(path: Path) -> Any:
    """What stands in a file.

    Raises:
        Corrupt: it is no JSON; names the file.
        OSError: as `Path.read_bytes` does, such as `FileNotFoundError`.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is not JSON: {error}") from error
