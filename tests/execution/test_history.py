"""What the fold of a log knows of the nodes that are open."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.execution.history import History


def where(task: str, *path: str) -> dict[str, Any]:
    ns = [outer.upper() for outer in path]
    return {"task": task, "node": task.upper(), "ns": ns, "path": [*path], "attempt": 1, "step": 1}


STARTED, RETRYING, COMPLETED = "node.started", "node.retrying", "node.completed"


@pytest.mark.parametrize(
    ("lines", "wakes_at"),
    [
        ([], None),
        ([(STARTED, where("a"))], None),
        ([(STARTED, where("a")), (RETRYING, where("a"))], 107.0),
        ([(STARTED, where("a")), (RETRYING, where("a")), (STARTED, where("a"))], None),
        ([(STARTED, where("a")), (RETRYING, where("a")), (COMPLETED, where("a"))], None),
        ([(STARTED, where("a")), (STARTED, where("b")), (RETRYING, where("a"))], None),
        ([(STARTED, where("a")), (RETRYING, where("a")), (COMPLETED, where("b"))], 107.0),
        # What is around a node that sleeps may do something else meanwhile.
        ([(STARTED, where("a")), (STARTED, where("b", "a")), (RETRYING, where("b", "a"))], None),
    ],
)
def test_it_wakes_when_the_first_of_the_open_nodes_does(
    lines: list[tuple[str, dict[str, Any]]], wakes_at: float | None
) -> None:
    history = History()
    for seq, (type, place) in enumerate(lines, 1):
        history.add(type, seq, 100.0 + seq, {"retry_in_ms": 5000}, place)

    assert history.wakes_at == wakes_at


def test_of_several_that_sleep_the_first_one_counts() -> None:
    history = History()
    for seq, (task, pause) in enumerate([("a", 9000), ("b", 2000)], 1):
        history.add(STARTED, seq, 100.0, {}, where(task))
        history.add(RETRYING, seq + 2, 100.0, {"retry_in_ms": pause}, where(task))

    assert history.wakes_at == 102.0
