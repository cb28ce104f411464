"""The envelope of a line, its closed set of types, and which types change a run's status."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from runtime.model import Run, RunStatus
from telemetry.encoding import JsonEncoder

__all__ = [
    "DATA_MAX",
    "OUTPUT_TYPES",
    "STATUS",
    "STORED_TYPES",
    "TERMINAL_TYPES",
    "UNSTORED_TYPES",
    "Event",
    "Sealer",
    "rfc3339",
    "unstored",
]

#: Stored types by what they are about.
RUN_TYPES = ("run.queued", "run.started", "run.recovered", "run.requeued")
NODE_TYPES = ("node.started", "node.retrying")
NODE_END_TYPES = ("node.completed", "node.failed", "node.interrupted", "node.cancelled")
INNER_TYPES = ("call.retrying", "token", "message", "custom")
TERMINAL_TYPES = (
    "run.completed",
    "run.failed",
    "run.cancelled",
    "run.timed_out",
    "run.interrupted",
)
STORED_TYPES = (*RUN_TYPES, *NODE_TYPES, *NODE_END_TYPES, *INNER_TYPES, "values", *TERMINAL_TYPES)
UNSTORED_TYPES = ("heartbeat", "caught_up", "error")
#: What a client waits for: the first of these is a run's first output.
OUTPUT_TYPES = ("token", "message", "custom", "node.completed")

#: A run's status is read off its last line of one of these types.
STATUS: Mapping[str, RunStatus] = {
    "run.queued": RunStatus.PENDING,
    "run.started": RunStatus.RUNNING,
    "run.recovered": RunStatus.RUNNING,
    "run.requeued": RunStatus.PENDING,
    "run.completed": RunStatus.SUCCESS,
    "run.failed": RunStatus.ERROR,
    "run.cancelled": RunStatus.CANCELLED,
    "run.timed_out": RunStatus.TIMEOUT,
    "run.interrupted": RunStatus.INTERRUPTED,
}

#: Places of tasks that a sealer keeps encoded.
PLACES = 1024
#: A member above this many bytes is not stored at all.
DATA_MAX = 64 * 1024 * 1024


class Event(NamedTuple):
    """An immutable fact in a run's log, encoded once; every watcher gets the same bytes."""

    seq: int
    epoch: int
    type: str
    #: Unix seconds.
    ts: float
    body: bytes
    #: Members too large for a line, encoded: (name, bytes).
    data: tuple[tuple[str, bytes], ...] = ()

    @property
    def terminal(self) -> bool:
        """Whether this ends its run."""
        return self.type in TERMINAL_TYPES

    @property
    def size(self) -> int:
        """Bytes that this takes in the store."""
        size = len(self.body)
        return size + sum(len(value) for _, value in self.data) if self.data else size


class Sealer:
    """Makes events of one run: envelope, encoding, and the size limit of a line.

    A line is put together from parts that are encoded once: the ids with the run, the place with
    the task. Only `data` is new each time.
    """

    def __init__(
        self, run_id: str, thread_id: str, encoder: JsonEncoder, *, line_max: int = 1024 * 1024
    ) -> None:
        self.run_id = run_id
        self._encoder = encoder
        self._line_max = line_max
        self._ids = self._members({"run_id": run_id, "thread_id": thread_id})
        self._places: dict[tuple[object, ...], bytes] = {}

    @classmethod
    def of(cls, run: Run, encoder: JsonEncoder, *, line_max: int = 1024 * 1024) -> Sealer:
        """A sealer for a run that is stored already."""
        return cls(run.run_id, run.thread_id, encoder, line_max=line_max)

    def seal(
        self,
        type: str,
        *,
        seq: int,
        epoch: int,
        ts: float,
        data: Mapping[str, Any],
        where: Mapping[str, Any] | None = None,
    ) -> Event:
        """Encode one line. `where` holds node, ns, path, task, attempt, step of a node's line, and
        the ids of its span."""
        head = b'{"v":1,"seq":%d,"ts":"%s","type":"%s",%s,"epoch":%d,%s"data":' % (
            seq,
            rfc3339(ts).encode(),
            type.encode(),
            self._ids,
            epoch,
            self._place(where) if where else b"",
        )
        encoded = self._encoder.encode(data)
        kept: tuple[tuple[str, bytes], ...] = ()
        if len(head) + len(encoded) >= self._line_max:
            encoded, kept = self._shrunk(seq, data, len(head) + len(encoded))
        body = b"%s%s}" % (head, encoded)
        return Event(seq, epoch, type, ts, body, kept)

    def _place(self, where: Mapping[str, Any]) -> bytes:
        get = where.get
        key = (get("task"), get("attempt"), get("step"), get("span_id"))
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= PLACES:
                self._places.clear()
            place = self._places[key] = self._members(where) + b","
        return place

    def _members(self, value: Mapping[str, Any]) -> bytes:
        return self._encoder.encode(value)[1:-1]

    def _shrunk(
        self, seq: int, data: Mapping[str, Any], size: int
    ) -> tuple[bytes, tuple[tuple[str, bytes], ...]]:
        """The largest members move out of the line, largest first, until it fits."""
        encoded = {name: self._encoder.encode(value) for name, value in data.items()}
        left, kept = dict(data), []
        for name, value in sorted(encoded.items(), key=lambda item: -len(item[1])):
            if size < self._line_max:
                break
            if len(value) > DATA_MAX:
                left[name] = {"$truncated": True, "bytes": len(value)}
            else:
                ref = f"/v1/runs/{self.run_id}/data/{seq}/{name}"
                left[name] = {"$ref": ref, "bytes": len(value)}
                kept.append((name, value))
            size -= len(value) - len(self._encoder.encode(left[name]))
        return self._encoder.encode(left), tuple(kept)


def unstored(
    run: Run, type: str, *, after: int, ts: float, data: Mapping[str, Any]
) -> dict[str, Any]:
    """A line that is made for one reader and kept nowhere; `after` is a valid cursor."""
    return {
        "v": 1,
        "ts": rfc3339(ts),
        "type": type,
        "run_id": run.run_id,
        "thread_id": run.thread_id,
        "epoch": run.epoch,
        "after": after,
        "data": data,
    }


def rfc3339(ts: float) -> str:
    """Unix seconds as RFC 3339 in UTC with milliseconds."""
    milliseconds = int(ts * 1000)
    return f"{_whole(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


@lru_cache(64)
def _whole(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"
