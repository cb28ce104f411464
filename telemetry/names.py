"""Bounds how many names there can be of what users, or their clients, may name as they like."""

from __future__ import annotations

import threading

from telemetry.contract import OVERFLOW

__all__ = ["Names"]

_LONGEST = 200


class Names:
    """The first `most` names as they are, at most so long, and `__overflow__` for any other."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def bounded(self, name: str) -> str:
        name = name[:_LONGEST]
        with self._lock:
            if name in self._known:
                return name
            if len(self._known) >= self._most:
                return OVERFLOW
            self._known.add(name)
            return name

    def clear(self) -> None:
        """Forget the names that were seen."""
        with self._lock:
            self._known.clear()
