"""One answer of each kind, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ANSWERS", "RUN_ID", "TRACE_ID"]

RUN_ID = "01KAV3V2Q4X8ZJ5T9W6M1N7R0C"
TRACE_ID = "74f3b1c09d2e4a5f8b6c7d8e9f0a1b2c"

_NUMBERS: Mapping[str, Any] = {
    "duration_ms": 2890.4,
    "queue_ms": 8.9,
    "backoff_ms": 201.3,
    "nodes": 4,
    "attempts": 5,
    "retries": 1,
    "first_output_ms": 866.2,
    "max_gap_ms": 866.1,
}
_RUN: Mapping[str, Any] = {
    "run_id": RUN_ID,
    "thread_id": "t1",
    "graph": "research",
    "status": "success",
    "epoch": 1,
    "last_seq": 31,
    "created_at": "2026-11-24T17:06:08.101Z",
    "updated_at": "2026-11-24T17:06:11.000Z",
    "started_at": "2026-11-24T17:06:08.110Z",
    "ended_at": "2026-11-24T17:06:11.000Z",
    "deadline": None,
    "cancel_reason": None,
    "stream": ["updates", "messages", "custom"],
    "metadata": {"asked_by": "ana"},
}
_GRAPH: Mapping[str, Any] = {
    "name": "greeter",
    "description": "Says hello.",
    "nodes": ["greet"],
    "default_input": {"name": "Ana"},
    "digest": "6b1d0f2c4a5e7d89",
}
_NAME = {"type": "object", "properties": {"name": {"type": "string"}}}

#: Name of a schema → an answer of it.
ANSWERS: Mapping[str, Any] = {
    "Drawing": {
        "graph": "greeter",
        "xray": 0,
        "nodes": [
            {"id": "__start__", "label": "start", "kind": "start"},
            {"id": "greet", "label": "greet", "kind": "node"},
            {"id": "__end__", "label": "end", "kind": "end"},
        ],
        "edges": [
            {"source": "__start__", "target": "greet", "conditional": False},
            {"source": "greet", "target": "__end__", "conditional": False},
        ],
    },
    "GraphInfo": _GRAPH,
    "GraphList": {"graphs": [_GRAPH], "failures": {}},
    "GraphSchema": {"input": _NAME, "output": _NAME, "context": None},
    "Health": {"status": "ok", "ts": 1795539968},
    "Info": {
        "name": "sereno",
        "version": "0.1.0",
        "contract": "1",
        "trace_url": "http://localhost:16686/trace/{trace_id}",
        "python": "3.12.12",
        "langgraph": "1.2.24",
        "seam": "installed",
        "engine": "sqlite",
        "log_id": "c5d74f2fa583499789b7d1e67977bdd1",
        "graphs": ["screening", "research"],
        "slots": 16,
        "durability": "sync",
        "insecure": False,
    },
    "NotYet": {"run_id": RUN_ID, "status": "running"},
    "RunInfo": {
        **_RUN,
        "queue_position": None,
        "result": {"final": True, "status": "success", **_NUMBERS},
    },
    "RunList": {"runs": [_RUN], "next_cursor": "MTc5NTUzOTk2OC4xMDF8MDFLQVYzVjJRNFg4"},
    "RunResult": {
        "run_id": RUN_ID,
        "thread_id": "t1",
        "final": True,
        "status": "success",
        **_NUMBERS,
        "output": {"report": "Streams are numbered, so a reader goes on where it was."},
    },
    "ThreadState": {
        "thread_id": "t1",
        "graph": "research",
        "values": {"question": "How do streams survive retries?"},
        "next": ["review"],
        "interrupts": [
            {"id": "6b7f0d5e2c914a83b1d7e0f9a2c4d6e8", "value": {"question": "Publish it?"}}
        ],
        "checkpoint_id": "1f0c9a52-3f5e-6a10-8003-5d2f0f5a1c77",
        "created_at": "2026-11-24T17:06:11.000000+00:00",
        "active_run": None,
    },
}
