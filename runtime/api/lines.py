"""What a line holds, as JSON Schema: one schema for each type, put together from a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.events import INNER_TYPES, NODE_END_TYPES, NODE_TYPES, TERMINAL_TYPES, UNSTORED_TYPES

__all__ = ["LINE_SCHEMAS"]

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
ANYTHING: Schema = {"description": "Content of the graph's."}
TEXTS: Schema = {"type": "array", "items": TEXT}
OBJECTS: Schema = {"type": "array", "items": OBJECT}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
#: What stands in a line instead of a member that is too large for it.
MOVED: Schema = {
    "type": "object",
    "description": "A member that is too large for its line: read it at `$ref`.",
    "required": ["bytes"],
    "properties": {"$ref": TEXT, "$truncated": FLAG, "bytes": WHOLE},
}
ERROR: Schema = {
    "type": "object",
    "required": ["code", "error_class", "error_type"],
    "properties": {
        "code": {
            "type": "string",
            "enum": [
                "node_error",
                "recursion_limit",
                "deadline",
                "max_attempts",
                "storage",
                "log_limit",
                "graph_unavailable",
                "graph_changed",
                "state_type_blocked",
                "internal",
            ],
        },
        "error_class": TEXT,
        "error_type": TEXT,
        "node": TEXT,
        "task": TEXT,
        "detail": {**TEXT, "description": "Only with SERENO_EXPOSE_ERRORS."},
    },
}

_FAULT: Mapping[str, Schema] = {"error_class": TEXT, "error_type": TEXT}
_END: Mapping[str, Schema] = {"attempts": WHOLE, "duration_ms": NUMBER}
_TERMINAL: Mapping[str, Schema] = {
    "final": {"const": True},
    "duration_ms?": NUMBER,
    "queue_ms?": NUMBER,
    "backoff_ms": NUMBER,
    "nodes": WHOLE,
    "attempts": WHOLE,
    "retries": WHOLE,
    "tokens?": WHOLE,
    "first_output_ms?": NUMBER,
    "max_gap_ms": NUMBER,
}
#: Members that a graph fills: only they grow too large for a line.
CONTENT = frozenset(
    "metadata update text content tool_calls value values output interrupts error reason".split()
)

#: Type → members of its `data`. Those that end in `?` may be absent.
DATA: Mapping[str, Mapping[str, Schema]] = {
    "run.queued": {"graph": TEXT, "trigger": TEXT, "metadata?": OBJECT},
    "run.started": {"graph_changed?": FLAG},
    "run.recovered": {
        "reason": {"enum": ["crash", "drain"]},
        "from_checkpoint": MAYBE_TEXT,
        "lost": OBJECTS,
        "discard_from": WHOLE,
        "graph_changed?": FLAG,
    },
    "run.requeued": {"reason": TEXT},
    "node.started": {"node_span_id?": TEXT},
    "node.retrying": {
        **_FAULT,
        "retry_in_ms": NUMBER,
        "jitter_ms": NUMBER,
        "max_attempts": WHOLE,
        "discard_from": WHOLE,
    },
    "node.completed": {**_END, "update?": ANYTHING, "cached?": FLAG, "recovered?": FLAG},
    "node.failed": {**_END, **_FAULT},
    "node.interrupted": _END,
    "node.cancelled": _END,
    "call.retrying": {
        "call": TEXT,
        "attempt": WHOLE,
        "error_class": TEXT,
        "error_type?": TEXT,
        "retry_in_ms": NUMBER,
        "message_ids": TEXTS,
    },
    "token": {"message_id": MAYBE_TEXT, "text": TEXT},
    "message": {
        "message_id": MAYBE_TEXT,
        "role": TEXT,
        "text": TEXT,
        "name?": MAYBE_TEXT,
        "tool_calls?": OBJECTS,
        "tool_call_id?": TEXT,
        "content?": ANYTHING,
        "usage?": OBJECT,
    },
    "custom": {"value": ANYTHING},
    "values": {"values": ANYTHING, "nodes": TEXTS},
    "run.completed": {"status": {"const": "success"}, "output": ANYTHING, **_TERMINAL},
    "run.failed": {"status": {"const": "error"}, "error": ERROR, **_TERMINAL},
    "run.cancelled": {"status": {"const": "cancelled"}, "reason": MAYBE_TEXT, **_TERMINAL},
    "run.timed_out": {"status": {"const": "timeout"}, "error": ERROR, **_TERMINAL},
    "run.interrupted": {
        "status": {"const": "interrupted"},
        "interrupts": {
            "type": "array",
            "items": {"type": "object", "required": ["id", "value"], "properties": {"id": TEXT}},
        },
        "next": TEXTS,
        **_TERMINAL,
    },
    "heartbeat": {"status": TEXT, "nodes": TEXTS},
    "caught_up": {},
}

_ENVELOPE: Mapping[str, Schema] = {
    "v": {"const": 1},
    "seq": {"type": "integer", "minimum": 1, "description": "Without gaps per run; the cursor."},
    "ts": {"type": "string", "format": "date-time"},
    "run_id": TEXT,
    "thread_id": TEXT,
    "epoch": {**WHOLE, "description": "Rises by one with each process that takes the run up."},
}
_NODE: Mapping[str, Schema] = {
    "node": TEXT,
    "task": TEXT,
    "attempt?": {"type": "integer", "minimum": 1},
    "step": {"type": "integer"},
    "ns": {**TEXTS, "description": "Enclosing subgraph calls by node name, outermost first."},
    "path": {**TEXTS, "description": "The same by task id."},
}
_TRACE: Mapping[str, Schema] = {
    "trace_id?": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "span_id?": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
}


def _object(members: Mapping[str, Schema], **more: Any) -> dict[str, Any]:
    required = [name for name in members if not name.endswith("?")]
    properties = {name.removesuffix("?"): schema for name, schema in members.items()}
    return {"type": "object", "required": required, "properties": properties, **more}


def _line(type: str) -> dict[str, Any]:
    data = {
        name: {"anyOf": [schema, {"$ref": "#/components/schemas/Moved"}]}
        if name.removesuffix("?") in CONTENT and schema is not ANYTHING
        else schema
        for name, schema in DATA[type].items()
    }
    envelope: dict[str, Schema] = {**_ENVELOPE, "type": {"const": type}, **_TRACE}
    if type in (*NODE_TYPES, *NODE_END_TYPES, *INNER_TYPES):
        envelope |= _NODE
    if type == "values":
        envelope |= {"step": {"type": "integer"}}
    if type in UNSTORED_TYPES:
        del envelope["seq"]
        envelope["after"] = {**WHOLE, "description": "A valid cursor."}
    what = "The run's last line." if type in TERMINAL_TYPES else f"A `{type}` line."
    return _object({**envelope, "data": _object(data)}, description=what)


def _named(type: str) -> str:
    """`node.retrying` → `NodeRetryingLine`."""
    return "".join(part.capitalize() for part in type.replace("_", ".").split(".")) + "Line"


#: For the components of the OpenAPI document.
LINE_SCHEMAS: dict[str, Any] = {
    "Moved": MOVED,
    "Line": {
        "description": "One line of a stream. Ignore members and types that you do not know.",
        "oneOf": [{"$ref": f"#/components/schemas/{_named(type)}"} for type in DATA],
        "discriminator": {
            "propertyName": "type",
            "mapping": {type: f"#/components/schemas/{_named(type)}" for type in DATA},
        },
    },
    **{_named(type): _line(type) for type in DATA},
    "SeedLine": {
        "description": "A line of the seed profile: `snapshot`, `final`, `error`, or any other "
        "line as it is.",
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": TEXT,
            "snapshot": {**ANYTHING, "description": "The state after a step."},
            "nodes": TEXTS,
            "ok": {**FLAG, "description": "Of `final`: whether the task did not fail."},
            "status": TEXT,
        },
    },
}
