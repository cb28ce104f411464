"""Profile v1: the stored object, one a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.model import StoredLine
from telemetry.encoding import JsonEncoder

__all__ = ["MEDIA_TYPE", "Ndjson"]

MEDIA_TYPE = "application/x-ndjson"


class Ndjson:
    """See `runtime.transports.base.Transport`."""

    media_type = f"{MEDIA_TYPE}; charset=utf-8"

    def __init__(self, encoder: JsonEncoder) -> None:
        self._encoder = encoder

    def stored(self, line: StoredLine) -> bytes:
        return line.body + b"\n"

    def unstored(self, line: Mapping[str, Any]) -> bytes:
        return self._encoder.encode(line) + b"\n"
