"""What a transport is: stored lines in, bytes out; it knows no runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from runtime.model import StoredLine

__all__ = ["Transport"]


class Transport(Protocol):
    """Turns lines into the bytes of one profile."""

    media_type: str

    def stored(self, line: StoredLine) -> bytes:
        """A stored line as it goes out; the same bytes for every reader."""
        ...

    def unstored(self, line: Mapping[str, Any]) -> bytes:
        """A line that was made for this reader."""
        ...
