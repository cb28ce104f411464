"""A process dies after its first commit for a run, after its second, … after its last: whatever
was committed then, the next process makes the best of it.

One operation a transaction, so that the cuts lie between any two writes: between a checkpoint and
its line, after a resume's first write, before the first checkpoint.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from lines import completed, customs, recoveries, supersteps, texts, violations
from server import Line, Reader, Server, stored, until, whole

ALL = ["updates", "values", "messages", "custom"]


@dataclass
class Ended:
    """A run that ended, in one process or in two."""

    thread: str
    lines: list[Line]
    #: Nodes by how often they were entered.
    marks: Counter[str]
    problems: list[str] = field(default_factory=list)

    def differences(self, undisturbed: Ended) -> Iterator[str]:
        """What a client or a node's author would notice."""
        for what in (texts, customs, completed, supersteps, _outcome):
            mine, other = what(self.lines), what(undisturbed.lines)
            if mine != other:
                yield f"{what.__name__} {mine} instead of {other}"
        epochs = range(1, self.lines[-1]["epoch"] + 1)
        starts = [_starts(self.lines, epoch) for epoch in epochs]
        usual = _starts(undisturbed.lines, 1)
        for node, count in undisturbed.marks.items():
            logged = sum(epoch[node] for epoch in starts)
            # A start whose line was not committed is a start all the same.
            unseen = sum(max(0, usual[node] - epoch[node]) for epoch in starts[:-1])
            if not count <= self.marks[node] <= logged + unseen:
                yield f"{node} ran {self.marks[node]} times with {logged} starts"

    def repeated_supersteps(self) -> list[str]:
        """Lost tasks of supersteps that were followed by another one."""
        repeated = []
        for recovery in recoveries(self.lines):
            at = next(line["seq"] for line in self.lines if line["data"] is recovery)
            seen = [line for line in self.lines[: at - 1] if line["type"] == "node.started"]
            for lost in recovery["lost"]:
                mine = next(line for line in seen if line["task"] == lost["task"])
                later = [s for s in seen if s["path"] == mine["path"] and s["step"] > mine["step"]]
                if later:
                    repeated.append(f"{lost['node']} though {later[0]['node']} had begun")
        return repeated


def _outcome(lines: list[Line]) -> Any:
    data = lines[-1]["data"]
    asked = [i["value"] for i in data.get("interrupts", ())]
    return lines[-1]["type"], data.get("output"), asked, data.get("next")


def _starts(lines: list[Line], epoch: int) -> Counter[str]:
    return Counter(
        line["node"] for line in lines if line["type"] == "node.started" and line["epoch"] == epoch
    )


def _node(mark: str) -> str:
    return "thread_work" if mark == "work0" else mark.rstrip("0123456789")


class Sweep:
    """Runs one thing again and again, each time killed a commit later."""

    def __init__(self, server: Server, begin: Callable[[Server, str], str], setup: Any) -> None:
        self.server = server
        self._begin = begin
        self._setup = setup

    def undisturbed(self) -> Ended:
        """How it goes when nothing happens."""
        self._setup(self.server, "undisturbed")
        before = self.server.marks("undisturbed")
        run_id = self._begin(self.server, "undisturbed")
        lines = self.server.lines(run_id)
        assert violations(lines) == []
        return Ended("undisturbed", lines, self._marks("undisturbed", len(before)))

    def _marks(self, thread: str, skip: int) -> Counter[str]:
        return Counter(map(_node, self.server.marks(thread)[skip:]))

    def killed_at(self, commit: int, again: int | None = None) -> Ended | None:
        """Die after this commit, and let the next process end the run. None: it ended before.

        With `again`, the next process dies after that many commits, too.
        """
        server, thread = self.server, f"killed-{commit}-{again or ''}"
        self._setup(server, thread)
        skip, earlier = len(server.marks(thread)), server.run_on(thread)
        (server.folder / "kill").write_text(str(commit))
        run_id, reader = None, None
        with contextlib.suppress(httpx2.TransportError):
            run_id = self._begin(server, thread)
            reader = Reader(server, run_id)
            reader.start()
        until(
            lambda: server.code is not None or (reader is not None and reader.over),
            f"{thread} is dead or done",
        )
        (server.folder / "kill").unlink()
        if server.code is None:
            assert reader is not None
            reader.join()
            return None
        if again is not None and not self._killed_again(again, thread):
            return None
        server.start()
        run_id = run_id or server.run_on(thread)
        assert run_id is not None
        assert run_id != earlier
        raw = whole(server.raw(run_id))
        ended = Ended(thread, stored(raw), self._marks(thread, skip))
        ended.problems += violations(ended.lines)
        if reader is not None:
            reader.join()
            seen = reader.whole
            if not raw.startswith(seen):
                ended.problems.append(f"other lines than {len(reader.lines)} before the kill")
            if seen + whole(server.raw(run_id, len(reader.lines))) != raw:
                ended.problems.append(f"after={len(reader.lines)} does not continue")
        return ended

    def _killed_again(self, commit: int, thread: str) -> bool:
        """Whether the process that takes over dies before the run has ended."""
        server = self.server
        (server.folder / "kill").write_text(str(commit))
        server.launch()

        def ended() -> bool:
            if not server.logged("Serving"):
                return False
            with contextlib.suppress(httpx2.TransportError):
                server.wait_ready()
                run_id = server.run_on(thread)
                return bool(server.get(f"/v1/runs/{run_id}").json()["ended_at"])
            return False

        until(lambda: server.code is not None or ended(), f"{thread} is dead or done")
        (server.folder / "kill").unlink()
        if server.code is None:
            server.kill()
            server.start()
            return False
        return True

    def check_twice(self, first: int, extra: Callable[[Ended], Iterator[str]]) -> int:
        """Kill the process that takes over after every commit of its own."""
        usual, wrong = self.undisturbed(), []
        for commit in range(1, 100):
            ended = self.killed_at(first, commit)
            if ended is None:
                break
            where = f"after commits {first} and {commit} ({self._killed})"
            problems = [*ended.problems, *ended.differences(usual), *extra(ended)]
            wrong += [f"{where}: {problem}" for problem in problems]
        assert not wrong, "\n" + "\n".join(wrong)
        return commit - 1

    @property
    def _killed(self) -> str:
        """What was committed last before the kill."""
        return (self.server.folder / "killed").read_text()

    def check(self, extra: Callable[[Ended], Iterator[str]]) -> int:
        """Kill after every commit; the number of commits. Fails with all that went wrong."""
        usual, wrong = self.undisturbed(), []
        for commit in range(1, 100):
            ended = self.killed_at(commit)
            if ended is None:
                break
            where = f"after commit {commit} ({self._killed})"
            problems = [*ended.problems, *ended.differences(usual), *extra(ended)]
            wrong += [f"{where}: {problem}" for problem in problems]
        assert not wrong, "\n" + "\n".join(wrong)
        return commit - 1


def _begin(graph: str, **more: Any) -> Callable[[Server, str], str]:
    return lambda server, thread: server.submit(graph, thread, stream=ALL, **more)


def _nothing(server: Server, thread: str) -> None:
    return None


def _interrupted(graph: str, *answers: Any, **more: Any) -> Callable[[Server, str], None]:
    def setup(server: Server, thread: str) -> None:
        run_id = server.submit(graph, thread, stream=ALL, **more)
        assert server.lines(run_id)[-1]["type"] == "run.interrupted"
        for answer in answers:
            run_id = server.resume(thread, answer)
            assert server.lines(run_id)[-1]["type"] == "run.interrupted"

    return setup


def _sync_promise(ended: Ended) -> Iterator[str]:
    yield from ended.repeated_supersteps()


def _no_promise(ended: Ended) -> Iterator[str]:
    return iter(())


@pytest.fixture
def one_by_one(serving: Callable[..., Server]) -> Server:
    return serving(CHAOS_ONE_BY_ONE="1").start()


@pytest.mark.parametrize("graph", ["chain", "fanout", "nested", "asking"])
def test_a_run_survives_a_kill_after_any_of_its_commits(one_by_one: Server, graph: str) -> None:
    commits = Sweep(one_by_one, _begin(graph), _nothing).check(_sync_promise)

    assert commits > 8


@pytest.mark.parametrize(("graph", "first"), [("nested", 18), ("fanout", 14)])
def test_the_process_that_takes_over_may_die_at_any_commit_too(
    one_by_one: Server, graph: str, first: int
) -> None:
    commits = Sweep(one_by_one, _begin(graph), _nothing).check_twice(first, _sync_promise)

    assert commits > 5


@pytest.mark.parametrize("graph", ["guarded", "guarded_after"])
def test_a_guarded_node_never_runs_without_approval(one_by_one: Server, graph: str) -> None:
    def unguarded(ended: Ended) -> Iterator[str]:
        yield from ended.repeated_supersteps()
        if ended.marks["dangerous"]:
            yield "the guarded node ran"

    Sweep(one_by_one, _begin(graph), _nothing).check(unguarded)


def test_a_breakpoint_is_passed_once(one_by_one: Server) -> None:
    def go_on(server: Server, thread: str) -> str:
        return server.resume(thread, None)

    Sweep(one_by_one, go_on, _interrupted("guarded")).check(_sync_promise)


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_second_run_on_a_thread_takes_its_own_input(
    serving: Callable[..., Server], durability: str
) -> None:
    """The checkpoint that recovery finds may be the earlier run's."""
    server = serving(CHAOS_ONE_BY_ONE="1", CHAOS_SLOW_S="0.01").start()

    def earlier(server: Server, thread: str) -> None:
        assert server.lines(server.submit("short", thread))[-1]["type"] == "run.completed"

    Sweep(server, _begin("short", durability=durability), earlier).check(_no_promise)


@pytest.mark.parametrize(
    ("before", "answer"),
    [
        pytest.param((), "one", id="first question"),
        pytest.param(("one",), "two", id="last question"),
    ],
)
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_an_answer_meets_its_question_and_no_other(
    serving: Callable[..., Server], before: tuple[str, ...], answer: str, durability: str
) -> None:
    slow = "0" if durability == "sync" else "0.01"
    server = serving(CHAOS_ONE_BY_ONE="1", CHAOS_SLOW_S=slow).start()

    def reply(server: Server, thread: str) -> str:
        return server.resume(thread, answer)

    asked = _interrupted("asking", *before, durability=durability)
    promise = _sync_promise if durability == "sync" else _no_promise
    Sweep(server, reply, asked).check(promise)


@pytest.mark.parametrize("slow", ["0", "0.02"], ids=["fast disk", "slow disk"])
@pytest.mark.parametrize("durability", ["async", "exit"])
def test_weaker_durability_keeps_the_log_whole(
    serving: Callable[..., Server], durability: str, slow: str
) -> None:
    """On a slow disk the graph is ahead of its checkpoints: what was stored for a task is worth
    nothing when the checkpoint that it belongs to is not there."""
    server = serving(CHAOS_ONE_BY_ONE="1", CHAOS_SLOW_S=slow).start()
    Sweep(server, _begin("chain", durability=durability), _nothing).check(_no_promise)
