"""Messages between a driver and its workers: JSON objects, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cluster.protocol import Cause, Event


def encode(message: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def event_to_json(event: Event) -> dict[str, Any]:
    """A JSON object that `event_from_json` reads."""
    return asdict(event)


def event_from_json(data: dict[str, Any]) -> Event:
    """The event that `event_to_json` wrote."""
    others = {name: (int(beat), float(patience)) for name, (beat, patience) in (data["others"] or {}).items()}
    cause = Cause(data["cause"]) if data["cause"] else None
    return Event(**{**data, "cause": cause, "others": others or None})


class Lines:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The messages that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from (json.loads(line) for line in lines)
