"""A client that keeps to STREAM.md's rule of discarding: what is left is the run's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]


class Reader:
    """Folds lines as they come."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self.kept: list[Line] = []
        for line in lines:
            self.read(line)

    def read(self, line: Line) -> None:
        type, data = line["type"], line["data"]
        if type in ("token", "message", "custom"):
            self.kept.append(line)
        elif type == "node.retrying":
            task, since = line["task"], data["discard_from"]
            self._drop(lambda old: old["seq"] >= since and task in (old["task"], *old["path"]))
        elif type == "run.recovered":
            lost, since = {entry["task"] for entry in data["lost"]}, data["discard_from"]
            self._drop(lambda old: old["seq"] >= since and old["task"] in lost)
        elif type == "call.retrying":
            self._drop(lambda old: old["data"].get("message_id") in data["message_ids"])

    def _drop(self, superseded: Callable[[Line], bool]) -> None:
        self.kept = [line for line in self.kept if not superseded(line)]

    @property
    def messages(self) -> dict[str, tuple[str, str]]:
        """Message id → (node, text): tokens as they come, then the whole message."""
        found: dict[str, tuple[str, str]] = {}
        for line in self.kept:
            data = line["data"]
            if line["type"] == "token":
                _, before = found.get(data["message_id"], ("", ""))
                found[data["message_id"]] = (line["node"], before + data["text"])
            elif line["type"] == "message":
                if data["message_id"] in found:
                    assert found[data["message_id"]][1] == data["text"], "tokens are not its text"
                found[data["message_id"]] = (line["node"], data["text"])
        return found

    @property
    def output(self) -> tuple[list[tuple[str, str]], list[tuple[str, Any]]]:
        """Messages and custom values by node, whatever the order of parallel nodes was."""
        customs = [
            (line["node"], line["data"]["value"]) for line in self.kept if line["type"] == "custom"
        ]
        return sorted(self.messages.values()), sorted(customs, key=repr)
