"""The seed profile: profile v1, with snapshots and a final line that simple clients know.

A `values` line is a `snapshot`, the terminal line is `final`; before a final that tells of an error
goes an `error` line, which is not stored. All fields of the line ride along.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import orjson

from runtime.events import TERMINAL_TYPES
from runtime.model import StoredLine
from telemetry.encoding import JsonEncoder

__all__ = ["SeedNdjson"]

#: Bytes of converted lines that are kept for the next reader.
KEPT_MAX = 16 * 1024 * 1024
#: Text for a client: what happened without what it was about.
_DETAIL = {
    "node_error": "A step of the graph failed.",
    "recursion_limit": "The graph did not stop within its limit of steps.",
    "deadline": "The run did not end before its deadline.",
    "max_attempts": "The run could not be completed after repeated crashes.",
    "storage": "The run could not be stored.",
    "log_limit": "The run wrote more than it may.",
    "graph_unavailable": "The graph of the run is not served any more.",
    "graph_changed": "The graph was changed under the run.",
    "state_type_blocked": "The run's state holds a type that may not be loaded.",
}


#: What stands in a line instead of a large member.
_ELSEWHERE = frozenset({"$ref", "$truncated"})


class SeedNdjson:
    """See `runtime.transports.base.Transport`."""

    media_type = "application/x-ndjson; charset=utf-8"

    def __init__(self, encoder: JsonEncoder) -> None:
        self._encoder = encoder
        self._kept = _Kept()
        self._public: frozenset[str] | None = None

    def showing(self, public: frozenset[str] | None) -> SeedNdjson:
        """This transport with snapshots of these keys only: the output of one graph."""
        other = SeedNdjson(self._encoder)
        other._kept = self._kept
        other._public = public
        return other

    def stored(self, line: StoredLine) -> bytes:
        if line.type != "values" and line.type not in TERMINAL_TYPES:
            return line.body + b"\n"
        # By its body: a run id and seq are in it.
        key = (line.body, self._public)
        converted = self._kept.get(key)
        if converted is None:
            converted = self._convert(orjson.loads(line.body))
            self._kept.put(key, converted)
        return converted

    def unstored(self, line: Mapping[str, Any]) -> bytes:
        return self._encoder.encode(line) + b"\n"

    def _convert(self, line: dict[str, Any]) -> bytes:
        data = line["data"]
        if line["type"] == "values":
            return self._encoded(
                {
                    **line,
                    "type": "snapshot",
                    "event": "superstep.completed",
                    "nodes": data["nodes"],
                    "snapshot": self._snapshot(data["values"]),
                }
            )
        final = {
            **line,
            "type": "final",
            "event": line["type"],
            "ok": data["status"] in ("success", "interrupted"),
            "status": data["status"],
        }
        if data["status"] not in ("error", "timeout"):
            return self._encoded(final)
        error = data.get("error") or {}
        told = {
            **{k: line[k] for k in ("v", "ts", "run_id", "thread_id", "epoch")},
            "type": "error",
            "after": line["seq"] - 1,
            "detail": error.get("detail") or _DETAIL.get(error.get("code", ""), "The run failed."),
        }
        return self._encoded(told) + self._encoded(final)

    def _snapshot(self, values: Any) -> Any:
        """The public part of a state; one that is too large for a line stays a reference."""
        if self._public is None or not isinstance(values, dict) or values.keys() & _ELSEWHERE:
            return values
        return {name: value for name, value in values.items() if name in self._public}

    def _encoded(self, line: Mapping[str, Any]) -> bytes:
        return self._encoder.encode(line) + b"\n"


class _Kept:
    """The lines that were converted last, up to a number of bytes."""

    def __init__(self) -> None:
        self._lines: OrderedDict[tuple[bytes, object], bytes] = OrderedDict()
        self._size = 0

    def get(self, key: tuple[bytes, object]) -> bytes | None:
        return self._lines.get(key)

    def put(self, key: tuple[bytes, object], line: bytes) -> None:
        self._lines[key] = line
        self._size += len(key[0]) + len(line)
        while self._size > KEPT_MAX:
            (body, _), oldest = self._lines.popitem(last=False)
            self._size -= len(body) + len(oldest)
