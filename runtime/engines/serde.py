"""The checkpoint serialiser: a type that may not be loaded is an error, never a silent dict."""

from __future__ import annotations

from threading import local
from typing import Any

from langgraph.checkpoint.serde.event_hooks import register_serde_event_listener
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from runtime.errors import BadSetting, SerenoError
from telemetry.storage import weigh

__all__ = ["StateTypeBlocked", "StrictSerializer"]


class StateTypeBlocked(SerenoError):
    """A checkpoint holds a type that the graph does not declare and the settings do not allow."""

    code = "state_type_blocked"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the checkpoint holds {name}, which no state schema declares: "
            f"allow it with SERENO_SERDE_ALLOW={name}"
        )
        self.name = name


class StrictSerializer(JsonPlusSerializer):
    """LangGraph's serialiser in strict mode. `allow` is `module:Class,…`.

    LangGraph loads a blocked type as the plain values it was made of, and tells a listener.
    """

    @classmethod
    def allowing(cls, allow: str = "") -> StrictSerializer:
        """Raises BadSetting when `allow` cannot be read."""
        allowed = []
        for entry in filter(None, (part.strip() for part in allow.split(","))):
            module, colon, name = entry.partition(":")
            if not colon or not name:
                raise BadSetting(f"SERENO_SERDE_ALLOW: {entry!r} is not of the form module:Class")
            allowed.append((module, name))
        serializer = cls()
        return serializer.with_msgpack_allowlist(allowed) if allowed else serializer  # type: ignore[return-value]

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, body = super().dumps_typed(obj)
        weigh(len(body))
        return kind, body

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        weigh(len(data[1]))
        outer, _blocked.names = getattr(_blocked, "names", None), []
        try:
            value = super().loads_typed(data)
            if _blocked.names:
                raise StateTypeBlocked(_blocked.names[0])
            return value
        finally:
            _blocked.names = outer


_blocked = local()


def _note(event: Any) -> None:
    names = getattr(_blocked, "names", None)
    if names is not None and event["kind"] == "msgpack_blocked":
        names.append(f"{event['module']}:{event['name']}")


register_serde_event_listener(_note)
