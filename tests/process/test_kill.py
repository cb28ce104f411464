"""kill -9 while nodes run: each durability keeps its own promise, and readers miss nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lines import completed, customs, recoveries, texts, violations
from server import Line, Reader, Server, whole

OUTPUT = {"seen": ["a", "b", "c"]}


def kill_in_node(server: Server, node: str, **more: Any) -> tuple[str, Reader]:
    """A run of the chain whose process dies while a node runs."""
    server.hold("t", node)
    run_id = server.submit("chain", "t", **more)
    with Reader(server, run_id) as reader:
        server.entered("t", node)
        reader.saw("custom" if node == "b" else "node.started", node=node[0])
        server.kill()
    server.release("t", node)
    return run_id, reader


def rest_of(server: Server, run_id: str, reader: Reader) -> list[Line]:
    """The whole log, of which the reader had seen the beginning."""
    raw = whole(server.raw(run_id))
    lines = server.lines(run_id)

    assert reader.whole + whole(server.raw(run_id, len(reader.lines))) == raw
    assert violations(lines) == []
    return lines


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "script"])
def test_after_a_kill_a_sync_run_repeats_the_superstep_in_flight_only(
    serving: Callable[..., Server], forked: bool
) -> None:
    server = serving(forked=forked).start()
    run_id, reader = kill_in_node(server, "b")
    server.start()
    lines = rest_of(server, run_id, reader)

    assert reader.lines
    assert not reader.eof
    (recovery,) = recoveries(lines)
    assert recovery["reason"] == "crash"
    assert [(lost["node"], lost["attempt"]) for lost in recovery["lost"]] == [("b", 1)]
    assert recovery["from_checkpoint"]
    assert server.marks("t") == ["a", "b", "b", "c1", "c2"]
    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["epoch"] == 2
    assert lines[-1]["data"]["output"] == OUTPUT
    assert texts(lines) == ["first words of the chain", "second words"]
    assert customs(lines) == ["{'part': 1}", "{'part': 2}", "{'try': 'c'}"]


def test_an_async_run_repeats_one_superstep_more_at_most(server: Server) -> None:
    run_id, reader = kill_in_node(server, "b", durability="async")
    server.start()
    lines = rest_of(server, run_id, reader)

    assert {lost["node"] for lost in recoveries(lines)[0]["lost"]} <= {"a", "b"}
    assert server.marks("t") in (
        ["a", "b", "b", "c1", "c2"],
        ["a", "b", "a", "b", "c1", "c2"],
    )
    assert lines[-1]["data"]["output"] == OUTPUT


def test_an_exit_run_is_repeated(server: Server) -> None:
    run_id, reader = kill_in_node(server, "b", durability="exit")
    server.start()
    lines = rest_of(server, run_id, reader)

    (recovery,) = recoveries(lines)
    assert [lost["node"] for lost in recovery["lost"]] == ["a", "b"]
    assert recovery["from_checkpoint"] is None
    assert recovery["discard_from"] == 3
    assert server.marks("t") == ["a", "b", "a", "b", "c1", "c2"]
    assert lines[-1]["data"]["output"] == OUTPUT
    assert texts(lines) == ["first words of the chain", "second words"]


def test_a_kill_in_a_later_attempt_begins_with_the_first_one_again(server: Server) -> None:
    run_id, reader = kill_in_node(server, "c2")
    server.start()
    lines = rest_of(server, run_id, reader)

    assert [(lost["node"], lost["attempt"]) for lost in recoveries(lines)[0]["lost"]] == [("c", 2)]
    assert server.marks("t") == ["a", "b", "c1", "c2", "c1", "c2"]
    assert customs(lines) == ["{'part': 1}", "{'part': 2}", "{'try': 'c'}"]


def test_a_task_id_is_the_same_after_a_retry_a_kill_and_an_answer(server: Server) -> None:
    server.hold("t", "pay2")
    run_id = server.submit("paying", "t")
    server.entered("t", "pay2")
    server.kill()
    server.release("t", "pay2")
    server.start()
    server.wait_line(run_id, "run.interrupted")
    answered = server.resume("t", 5)
    server.wait_line(answered, "run.completed")

    keys = [mark.removeprefix("key ") for mark in server.marks("t") if mark.startswith("key ")]
    tasks = [
        line["task"]
        for line in (*server.lines(run_id), *server.lines(answered))
        if line["type"] == "node.started" and line["node"] == "pay"
    ]
    assert keys == tasks
    assert len(keys) == 6, "two attempts, again after the kill, and again with the answer"
    assert len(set(keys)) == 1


def test_parallel_nodes_that_were_done_are_not_run_again(server: Server) -> None:
    server.hold("t", "work2")
    run_id = server.submit("fanout", "t")
    server.entered("t", "work2")
    for node in ("work", "thread_work"):
        server.wait_line(run_id, "node.completed", node=node)
    server.kill()
    server.release("t", "work2")
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert [lost["node"] for lost in recoveries(lines)[0]["lost"]] == ["work"]
    assert sorted(server.marks("t")) == ["join", "plan", "work0", "work1", "work2", "work2"]
    assert completed(lines) == {"plan": 1, "work": 2, "thread_work": 1, "join": 1}
    assert texts(lines) == ["words of item 1", "words of item 2"]


def test_a_kill_inside_a_subgraph_goes_on_inside_it(server: Server) -> None:
    server.hold("t", "two")
    run_id = server.submit("nested", "t")
    server.entered("t", "two")
    server.wait_line(run_id, "node.started", node="two")
    server.kill()
    server.release("t", "two")
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert [lost["node"] for lost in recoveries(lines)[0]["lost"]] == ["sub", "two"]
    assert server.marks("t") == ["before", "one", "two", "two", "after"]
    assert texts(lines) == ["words of an inner node"]
    assert customs(lines) == ["'from one'"]


def test_a_run_that_nobody_claimed_yet_starts_after_the_kill(
    serving: Callable[..., Server],
) -> None:
    server = serving(SERENO_SLOTS="1").start()
    server.hold("first", "a")
    first = server.submit("chain", "first")
    server.entered("first", "a")
    second = server.submit("chain", "second")
    server.kill()
    server.release("first", "a")
    server.start()

    assert server.lines(first)[-1]["epoch"] == 2
    lines = server.lines(second)
    assert violations(lines) == []
    assert [line["type"] for line in lines[:2]] == ["run.queued", "run.started"]
    assert lines[-1]["epoch"] == 1


def test_three_kills_make_four_epochs_and_one_log(server: Server) -> None:
    """Each kill is in another superstep: the run has got on, so it is not a suspect."""
    server.hold("t", "a")
    run_id = server.submit("chain", "t")
    for node, following in (("a", "b"), ("b", "c2"), ("c2", "c1")):
        server.entered("t", node)
        server.wait_line(run_id, "node.started", node=node[0])
        server.hold("t", following)
        server.kill()
        server.release("t", node)
        if following == "c1":
            server.release("t", following)
        server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["epoch"] == 4
    assert lines[-1]["data"]["output"] == OUTPUT
    assert server.marks("t") == ["a", "a", "b", "b", "c1", "c2", "c1", "c2"]


def test_the_terminal_line_is_there_when_the_client_did_not_get_it(server: Server) -> None:
    run_id = server.submit("chain", "t")
    whole_log = whole(server.raw(run_id))
    server.kill()
    server.start()

    assert server.raw(run_id) == whole_log
    assert server.get(f"/v1/runs/{run_id}").json()["epoch"] == 1


def test_a_cursor_is_worth_the_same_at_every_line(server: Server) -> None:
    """lines[:k] + stream(after=k) == lines: live, replayed, and in the next process."""
    server.hold("t", "b")
    run_id = server.submit("chain", "t", stream=["updates", "values", "messages", "custom"])
    server.entered("t", "b")
    server.wait_line(run_id, "custom", node="b")
    known = len(server.lines(run_id, follow=0))
    readers = [Reader(server, run_id, after=k) for k in range(known + 1)]
    for reader in readers:
        reader.start()
        reader.saw("caught_up")
    server.kill()
    server.release("t", "b")
    server.start()
    raw = whole(server.raw(run_id))
    total = len(server.lines(run_id))
    starts = [0]
    for line in raw.split(b"\n")[:-1]:
        starts.append(starts[-1] + len(line) + 1)

    for k, reader in enumerate(readers):
        reader.join()
        got = k + len(reader.lines)
        assert raw[: starts[k]] + reader.whole + whole(server.raw(run_id, got)) == raw
    for k in range(total + 1):
        assert raw[: starts[k]] + server.raw(run_id, k) == raw
    assert server.get(f"/v1/runs/{run_id}/stream", after=total).status_code == 204
    assert server.get(f"/v1/runs/{run_id}/stream", after=total + 1).status_code == 400


def test_a_live_cursor_is_worth_the_same_at_every_line(server: Server) -> None:
    for node in ("a", "b", "c1"):
        server.hold("t", node)
    run_id = server.submit("chain", "t")
    readers: list[Reader] = []
    for node in ("a", "b", "c1"):
        server.entered("t", node)
        server.wait_line(run_id, "node.started", node=node[0])
        known = len(server.lines(run_id, follow=0))
        for k in range(known + 1):
            readers.append(Reader(server, run_id, after=k))
            readers[-1].start()
            readers[-1].saw("caught_up")
        server.release("t", node)
    for reader in readers:
        reader.join()
    raw = whole(server.raw(run_id)).split(b"\n")

    for reader in readers:
        assert reader.eof
        assert reader.whole.split(b"\n") == raw[reader.after :]
