"""What is seen of a call that tenacity retries: each attempt once, each retry before its sleep."""

from __future__ import annotations

import asyncio
import functools
import gc
import operator
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import tenacity
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphDrained, GraphInterrupt, ParentCommand
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt
from structlog.testing import capture_logs
from tenacity import (
    AsyncRetrying,
    RetryError,
    Retrying,
    TryAgain,
    retry,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
)
from typing_extensions import TypedDict

import telemetry.langgraph
import telemetry.tenacity
from runtime.projects import Project
from telemetry.langgraph import SeamMismatch, listen
from telemetry.observations import (
    CallAttemptEnded,
    CallAttemptStarted,
    CallRetrying,
    Observation,
)
from telemetry.tenacity import MAX_CALLS, open_calls

#: Decorated when this module is imported, before anything is installed.
SLEEPS: list[object] = []


@retry(stop=stop_after_attempt(3), wait=tenacity.wait_fixed(0.25), sleep=SLEEPS.append)
def decorated_early(failures: list[Exception]) -> str:
    if failures:
        raise failures.pop(0)
    return "done"


async def asleep(seconds: float) -> None:
    """A back-off that takes no time."""


class Seen:
    """Observations and other things that happened, in order, as words."""

    def __init__(self) -> None:
        self.observations: list[Any] = []
        self.words: list[str] = []

    def __call__(self, seen: Observation) -> None:
        match seen:
            case CallAttemptStarted():
                word = f"start {seen.attempt}"
            case CallRetrying():
                word = f"retrying {seen.attempt}"
            case CallAttemptEnded():
                word = f"{seen.outcome} {seen.attempt}"
            case _:
                return
        self.observations.append(seen)
        self.words.append(word)

    def sleep(self, seconds: float) -> None:
        self.words.append(f"sleep {seconds:g}")

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)

    @property
    def last(self) -> Any:
        return self.observations[-1]

    def check_closed(self) -> None:
        """Each attempt that started ended once, and the call ids tell operations apart."""
        keys: dict[str, list[tuple[str, int]]] = {"start": [], "end": []}
        for seen in self.observations:
            if isinstance(seen, CallAttemptStarted):
                keys["start"].append((seen.call_id, seen.attempt))
            elif isinstance(seen, CallAttemptEnded):
                keys["end"].append((seen.call_id, seen.attempt))
        assert sorted(keys["start"]) == sorted(keys["end"])
        assert len(set(keys["start"])) == len(keys["start"])


@pytest.fixture
def installed() -> Iterator[None]:
    telemetry.langgraph.install()
    telemetry.tenacity.install()
    yield
    telemetry.tenacity.uninstall()
    telemetry.langgraph.uninstall()


@pytest.fixture
def seen(installed: None) -> Iterator[Seen]:
    seen = Seen()
    with listen(seen):
        yield seen
    seen.check_closed()
    assert open_calls.get() == ()


def failing(times: int, result: object = "done") -> Callable[[], Any]:
    """A function that raises that often before it returns."""
    left = [times]

    def call() -> object:
        if left[0]:
            left[0] -= 1
            raise OSError("no")
        return result

    return call


TWICE = ["start 1", "retried 1", "retrying 1", "sleep 2", "start 2", "retried 2", "retrying 2"]
TWICE += ["sleep 2", "start 3", "success 3"]

Form = Callable[[Callable[[], Any], dict[str, Any], Seen], Awaitable[Any]]


async def by_decorator(call: Any, policy: Any, seen: Seen) -> Any:
    return retry(**policy, sleep=seen.sleep)(call)()


async def by_async_decorator(call: Any, policy: Any, seen: Seen) -> Any:
    @retry(**policy, sleep=seen.asleep)
    async def acall() -> Any:
        return call()

    return await acall()


async def by_sync_function_in_async_retry(call: Any, policy: Any, seen: Seen) -> Any:
    return await AsyncRetrying(**policy, sleep=seen.asleep)(call)


async def by_calling(call: Any, policy: Any, seen: Seen) -> Any:
    return Retrying(**policy, sleep=seen.sleep)(call)


async def by_wraps(call: Any, policy: Any, seen: Seen) -> Any:
    return Retrying(**policy, sleep=seen.sleep).wraps(call)()


async def by_method(call: Any, policy: Any, seen: Seen) -> Any:
    class Client:
        @retry(**policy, sleep=seen.sleep)
        def fetch(self) -> Any:
            return call()

    return Client().fetch()


async def by_loop(call: Any, policy: Any, seen: Seen) -> Any:
    for attempt in Retrying(**policy, sleep=seen.sleep):
        with attempt:
            result = call()
        if not attempt.retry_state.outcome.failed:
            attempt.retry_state.set_result(result)
    return result


async def by_async_loop(call: Any, policy: Any, seen: Seen) -> Any:
    async for attempt in AsyncRetrying(**policy, sleep=seen.asleep):
        async with attempt:
            result = call()
        if not attempt.retry_state.outcome.failed:
            attempt.retry_state.set_result(result)
    return result


async def by_thread(call: Any, policy: Any, seen: Seen) -> Any:
    return await asyncio.to_thread(retry(**policy, sleep=seen.sleep)(call))


every_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, id=form.__name__.removeprefix("by_"))
        for form in (
            by_decorator,
            by_async_decorator,
            by_sync_function_in_async_retry,
            by_calling,
            by_wraps,
            by_method,
            by_loop,
            by_async_loop,
            by_thread,
        )
    ],
)

POLICY: dict[str, Any] = {"stop": stop_after_attempt(3), "wait": tenacity.wait_fixed(2)}


class TestEveryForm:
    @every_form
    async def test_a_retry_is_told_before_its_sleep(self, form: Form, seen: Seen) -> None:
        assert await form(failing(2), POLICY, seen) == "done"

        assert seen.words == TWICE
        assert len({o.call_id for o in seen.observations}) == 1
        retrying = seen.observations[2]
        assert isinstance(retrying.error, OSError)
        assert retrying.retry_in_s == 2
        assert seen.last.error is None
        assert seen.last.duration_s >= 0

    @every_form
    async def test_the_last_attempt_is_exhausted(self, form: Form, seen: Seen) -> None:
        with pytest.raises(RetryError):
            await form(failing(9), POLICY, seen)

        assert seen.words[-2:] == ["start 3", "exhausted 3"]
        assert isinstance(seen.last.error, OSError)

    @every_form
    async def test_an_error_that_is_not_retried_failed(self, form: Form, seen: Seen) -> None:
        with pytest.raises(OSError, match="no"):
            await form(failing(9), {**POLICY, "retry": retry_if_exception_type(KeyError)}, seen)

        assert seen.words == ["start 1", "failed 1"]
        assert isinstance(seen.last.error, OSError)

    @every_form
    async def test_a_result_can_ask_for_a_retry(self, form: Form, seen: Seen) -> None:
        results = iter([None, 7])

        def call() -> object:
            return next(results)

        policy = {**POLICY, "retry": retry_if_result(lambda result: result is None)}
        assert await form(call, policy, seen) == 7

        assert seen.words == [*TWICE[:4], "start 2", "success 2"]
        assert seen.observations[1].error is None
        assert seen.observations[2].error is None

    @every_form
    async def test_a_result_can_exhaust_the_attempts(self, form: Form, seen: Seen) -> None:
        policy = {**POLICY, "retry": retry_if_result(lambda result: result is None)}
        with pytest.raises(RetryError):
            await form(failing(0, None), policy, seen)

        assert seen.words[-1] == "exhausted 3"
        assert isinstance(seen.last.error, RetryError)

    @every_form
    async def test_a_disabled_retry_is_no_operation(self, form: Form, seen: Seen) -> None:
        assert await form(failing(0), {**POLICY, "enabled": False}, seen) == "done"

        assert seen.words == []

    @every_form
    async def test_an_interrupt_passes_through(self, form: Form, seen: Seen) -> None:
        def call() -> None:
            raise GraphInterrupt(())

        with pytest.raises(GraphInterrupt):
            await form(call, POLICY, seen)

        assert seen.words == ["start 1", "interrupted 1"]
        assert seen.last.error is None


class TestOutcomes:
    def test_functions_decorated_earlier_are_seen(self, seen: Seen) -> None:
        SLEEPS.clear()

        assert decorated_early([OSError()]) == "done"
        assert seen.words == ["start 1", "retried 1", "retrying 1", "start 2", "success 2"]
        assert SLEEPS == [0.25]
        assert seen.last.call == f"{__name__}.decorated_early"

    def test_reraise_is_exhausted_too(self, seen: Seen) -> None:
        with pytest.raises(OSError, match="no"):
            Retrying(stop=stop_after_attempt(1), reraise=True)(failing(1))

        assert seen.words == ["start 1", "exhausted 1"]

    def test_a_callback_that_gives_a_result_is_exhausted(self, seen: Seen) -> None:
        retrying = Retrying(stop=stop_after_attempt(1), retry_error_callback=lambda state: "plan b")

        assert retrying(failing(1)) == "plan b"
        assert seen.words == ["start 1", "exhausted 1"]
        assert isinstance(seen.last.error, OSError)

    def test_try_again_is_a_retry(self, seen: Seen) -> None:
        def call(left: list[int] = [1]) -> str:  # noqa: B006
            if left:
                left.pop()
                raise TryAgain
            return "done"

        assert Retrying(retry=tenacity.retry_never)(call) == "done"
        assert seen.words == ["start 1", "retried 1", "retrying 1", "start 2", "success 2"]

    @pytest.mark.parametrize("hook", ["retry", "stop", "wait", "after", "before_sleep"])
    def test_a_hook_that_raises_fails_the_attempt(self, hook: str, seen: Seen) -> None:
        def broken(state: object) -> bool:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            Retrying(**{hook: broken})(failing(1))

        assert seen.words == ["start 1", "failed 1"]
        assert isinstance(seen.last.error, OSError)

    @pytest.mark.parametrize(
        ("control", "outcome"),
        [
            pytest.param(ParentCommand(Command()), "success", id="parent command"),
            pytest.param(GraphDrained(), "cancelled", id="drain"),
        ],
    )
    def test_control_flow_is_no_error(self, control: Exception, outcome: str, seen: Seen) -> None:
        def call() -> None:
            raise control

        with pytest.raises(type(control)):
            Retrying()(call)

        assert seen.words == ["start 1", f"{outcome} 1"]
        assert seen.last.error is None

    async def test_a_cancelled_call_is_not_retried(self, seen: Seen) -> None:
        @retry
        async def call() -> None:
            task.cancel()
            await asyncio.sleep(0)

        task = asyncio.create_task(call())
        with pytest.raises(asyncio.CancelledError):
            await task

        assert seen.words == ["start 1", "cancelled 1"]

    @pytest.mark.parametrize("form", [by_async_decorator, by_async_loop])
    async def test_a_cancelled_back_off_has_nothing_left_to_end(
        self, form: Form, seen: Seen, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def cancelled(self: Seen, seconds: float) -> None:
            task.cancel()
            await asyncio.sleep(0)

        monkeypatch.setattr(Seen, "asleep", cancelled)

        async def go() -> None:
            await form(failing(1), POLICY, seen)

        task = asyncio.create_task(go())
        with pytest.raises(asyncio.CancelledError):
            await task

        assert seen.words == ["start 1", "retried 1", "retrying 1"]

    async def test_an_async_hook_that_is_cancelled_cancels_the_attempt(self, seen: Seen) -> None:
        async def before_sleep(state: object) -> None:
            task.cancel()
            await asyncio.sleep(0)

        @retry(before_sleep=before_sleep)
        async def call() -> None:
            raise OSError("no")

        task = asyncio.create_task(call())
        with pytest.raises(asyncio.CancelledError):
            await task

        assert seen.words == ["start 1", "cancelled 1"]
        assert isinstance(seen.last.error, asyncio.CancelledError)

    async def test_a_cancellation_that_nobody_asked_for_is_a_failure(self, seen: Seen) -> None:
        def call() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            Retrying()(call)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.to_thread(Retrying(), call)

        assert seen.words == ["start 1", "failed 1"] * 2

    async def test_a_coroutine_that_is_closed_ends_its_attempt(self, seen: Seen) -> None:
        @retry
        async def call() -> None:
            await asyncio.Event().wait()

        coroutine = call()
        coroutine.send(None)
        coroutine.close()

        assert seen.words == ["start 1", "cancelled 1"]


class TestLoopsThatAreLeft:
    """Tenacity is not asked again, and has no say in the outcome."""

    @pytest.mark.parametrize("policy", [{}, {"retry": retry_if_result(lambda r: r is None)}])
    def test_return_is_a_success(self, policy: dict[str, Any], seen: Seen) -> None:
        def call() -> str:
            for attempt in Retrying(**policy):
                with attempt:
                    return "done"
            raise AssertionError

        assert call() == "done"
        assert seen.words == ["start 1", "success 1"]

    @pytest.mark.parametrize("policy", [{}, {"retry": retry_if_result(lambda r: r is None)}])
    async def test_async_return_is_a_success_at_once(
        self, policy: dict[str, Any], seen: Seen
    ) -> None:
        async def call() -> str:
            retrying = AsyncRetrying(**policy)
            async for attempt in retrying:
                with attempt:
                    return "done"
            raise AssertionError

        gc.disable()
        try:
            assert await call() == "done"
            assert seen.words == ["start 1", "success 1"]
        finally:
            gc.enable()

    def test_break_after_a_failure_failed(self, seen: Seen) -> None:
        for attempt in Retrying():
            with attempt:
                raise OSError("no")
            break

        assert seen.words == ["start 1", "failed 1"]

    def test_an_error_beside_the_attempt_ends_it(self, seen: Seen) -> None:
        def call() -> None:
            for attempt in Retrying():
                with attempt:
                    pass
                raise KeyError

        with pytest.raises(KeyError):
            call()

        assert seen.words == ["start 1", "success 1"]

    async def test_an_error_before_the_attempt_cancels_it(self, seen: Seen) -> None:
        async def call() -> None:
            async for _ in AsyncRetrying():
                raise KeyError

        with pytest.raises(KeyError):
            await call()

        assert seen.words == ["start 1", "cancelled 1"]

    def test_turns_without_a_with_are_one_attempt(self, seen: Seen) -> None:
        for turn, _ in enumerate(Retrying()):
            if turn == 2:
                break

        assert seen.words == ["start 1", "cancelled 1"]


def plain() -> str:
    return "done"


class Callable_:
    def __call__(self) -> str:
        return "done"

    def method(self) -> str:
        return "done"


class TestNames:
    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            pytest.param(plain, "plain", id="function"),
            pytest.param(Callable_().method, "Callable_.method", id="method"),
            pytest.param(functools.partial(plain), "plain", id="partial"),
            pytest.param(Callable_(), "Callable_", id="instance"),
        ],
    )
    def test_a_call_is_named_by_module_and_function(
        self, function: Callable[[], str], expected: str, seen: Seen
    ) -> None:
        Retrying()(function)

        assert seen.last.call == f"{__name__}.{expected}"

    def test_a_function_can_name_itself(self, seen: Seen) -> None:
        def call() -> None: ...

        call.sereno_call = "crm.lookup"  # type: ignore[attr-defined]
        retry(call)()
        Retrying()(functools.partial(call))

        assert {o.call for o in seen.observations} == {"crm.lookup"}

    def test_a_graph_file_names_its_calls_by_the_file(self, seen: Seen, tmp_path: Path) -> None:
        """It is loaded under a private name, which would be another one for each place."""
        (tmp_path / "agents.py").write_text("def lookup(): return 1\n")
        project = Project("key", tmp_path, (str(tmp_path),))
        with project.importable():
            Retrying()(project.load_file(tmp_path / "agents.py").lookup)

        assert seen.last.call == "agents.lookup"

    def test_a_bare_loop_has_the_name_that_it_was_given(self, seen: Seen) -> None:
        for attempt in Retrying(name="crm"):
            with attempt:
                pass
        for attempt in Retrying():
            with attempt:
                pass

        assert [o.call for o in seen.observations] == ["crm", "crm", "retrying", "retrying"]

    def test_names_are_bounded(self, seen: Seen) -> None:
        for number in range(MAX_CALLS + 3):
            for attempt in Retrying(name=f"user {number}"):
                with attempt:
                    pass

        names = [o.call for o in seen.observations if isinstance(o, CallAttemptStarted)]
        assert names[MAX_CALLS - 1] == f"user {MAX_CALLS - 1}"
        assert names[MAX_CALLS:] == ["__overflow__"] * 3
        for attempt in Retrying(name="user 0"):
            with attempt:
                pass
        assert seen.last.call == "user 0"


class TestOpenCalls:
    def test_nested_calls_have_their_own_ids(self, seen: Seen) -> None:
        inside: list[tuple[str, ...]] = []
        flaky = failing(1)

        @retry
        def inner() -> None:
            inside.append(open_calls.get())

        @retry(sleep=lambda seconds: inside.append(open_calls.get()))
        def outer() -> None:
            inner()
            flaky()

        assert open_calls.get() == ()
        outer()

        outer_id, first = inside[0]
        assert inside == [(outer_id, first), (), (outer_id, inside[2][1])]
        assert len({outer_id, first, inside[2][1]}) == 3
        assert seen.observations[0].call_id == outer_id

    async def test_a_call_is_known_in_its_threads_and_tasks(self, seen: Seen) -> None:
        @retry
        async def call() -> set[tuple[str, ...]]:
            async def task() -> tuple[str, ...]:
                return open_calls.get()

            thread = await asyncio.to_thread(open_calls.get)
            return {thread, await asyncio.create_task(task()), open_calls.get()}

        assert await call() == {(seen.observations[0].call_id,)}


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


def one_node(node: Any, **compile: Any) -> Any:
    return StateGraph(State).add_node("ask", node).add_edge(START, "ask").compile(**compile)


class TestInAGraph:
    @pytest.mark.parametrize("form", [by_async_decorator, by_async_loop, by_decorator, by_thread])
    async def test_a_call_knows_its_node(self, form: Form, seen: Seen) -> None:
        async def node(state: State) -> State:
            return {"log": [await form(failing(2), POLICY, seen)]}

        await one_node(node).ainvoke({"log": []})

        assert seen.words == TWICE
        assert {(o.visit.node, o.node_attempt) for o in seen.observations} == {("ask", 1)}

    def test_a_call_of_a_sync_node_knows_it(self, seen: Seen) -> None:
        @retry
        def call() -> str:
            return "done"

        one_node(lambda state: {"log": [call()]}).invoke({"log": []})

        assert seen.words == ["start 1", "success 1"]
        assert seen.last.visit.node == "ask"

    async def test_with_retry_is_named_after_its_node(self, seen: Seen) -> None:
        flaky = failing(1)
        chain = RunnableLambda(lambda value: flaky()).with_retry(
            stop_after_attempt=2, wait_exponential_jitter=False
        )

        async def node(state: State) -> State:
            return {"log": [*(await chain.abatch([1])), await chain.ainvoke(1)]}

        await one_node(node).ainvoke({"log": []})

        assert {o.call for o in seen.observations} == {"ask:retrying"}
        assert [w for w in seen.words if not w.startswith("start")] == [
            "retried 1",
            "retrying 1",
            "success 2",
            "success 1",
        ]

    def test_a_raw_thread_is_seen_without_its_node(self, seen: Seen) -> None:
        def node(state: State) -> State:
            thread = threading.Thread(target=Retrying(), args=(plain,))
            thread.start()
            thread.join()
            return {}

        one_node(node).invoke({"log": []})

        assert seen.last.visit is None
        assert seen.last.node_attempt is None


@retry(stop=stop_after_attempt(3))
def ask_sync() -> str:
    return str(interrupt("sure?"))


@retry(stop=stop_after_attempt(3))
async def ask_async() -> str:
    return str(interrupt("sure?"))


class TestGuard:
    CONFIG: Any = {"configurable": {"thread_id": "t"}}  # noqa: RUF012

    def graph(self, ask: Any) -> Any:
        async def node(state: State) -> State:
            answer = ask()
            return {"log": [answer if isinstance(answer, str) else await answer]}

        return one_node(node, checkpointer=InMemorySaver())

    @pytest.mark.parametrize("ask", [ask_sync, ask_async])
    async def test_an_interrupt_inside_a_retry_pauses_and_resumes(
        self, ask: Any, seen: Seen
    ) -> None:
        graph = self.graph(ask)

        paused = await graph.ainvoke({"log": []}, self.CONFIG)
        assert [i.value for i in paused["__interrupt__"]] == ["sure?"]
        assert seen.words == ["start 1", "interrupted 1"]

        assert await graph.ainvoke(Command(resume="yes"), self.CONFIG) == {"log": ["yes"]}
        assert seen.words[2:] == ["start 1", "success 1"]

    @pytest.mark.parametrize("ask", [ask_sync, ask_async])
    async def test_without_the_guard_tenacity_retries_it(self, ask: Any) -> None:
        telemetry.tenacity.install(guard=False)
        seen = Seen()
        try:
            with listen(seen), pytest.raises(RetryError):
                await self.graph(ask).ainvoke({"log": []}, self.CONFIG)
        finally:
            telemetry.tenacity.uninstall()

        assert [w for w in seen.words if w.startswith("start")] == ["start 1", "start 2", "start 3"]
        assert seen.words[-1] == "exhausted 3"
        seen.check_closed()


class TestInstalling:
    def test_it_can_be_done_twice_and_undone(self) -> None:
        before = Retrying.iter, AsyncRetrying.iter, Retrying.__iter__, AsyncRetrying.__aiter__
        telemetry.tenacity.install()
        patched = Retrying.iter
        telemetry.tenacity.install()

        assert Retrying.iter is patched is not before[0]
        telemetry.tenacity.uninstall()
        telemetry.tenacity.uninstall()
        after = Retrying.iter, AsyncRetrying.iter, Retrying.__iter__, AsyncRetrying.__aiter__
        assert after == before

    def test_another_tenacity_is_refused_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def iter(self: Any, retry_state: Any, more: Any) -> None: ...

        monkeypatch.setattr(AsyncRetrying, "iter", iter)
        before = Retrying.iter
        with pytest.raises(SeamMismatch, match=r"AsyncRetrying\.iter takes .*'more'"):
            telemetry.tenacity.install()

        assert Retrying.iter is before

    def test_a_method_that_is_gone_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(AsyncRetrying, "__aiter__")
        with pytest.raises(SeamMismatch, match=r"AsyncRetrying\.__aiter__ takes None"):
            telemetry.tenacity.install()

    def test_a_verdict_that_cannot_be_read_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tenacity, "IterState", lambda actions, retry_run_result: None)
        with pytest.raises(SeamMismatch, match=r"has no is_explicit_retry, stop_run_result$"):
            telemetry.tenacity.install()

    def test_a_broken_listener_does_not_touch_the_call(self, installed: None) -> None:
        def broken(seen: Observation) -> None:
            raise RuntimeError("no")

        with capture_logs() as logs, listen(broken):
            assert Retrying()(plain) == "done"

        assert [line["event"] for line in logs] == ["Listener failed"] * 2

    def test_a_function_that_cannot_be_named_is_called_all_the_same(self, installed: None) -> None:
        class Odd:
            __module__ = "odd"

            def __getattr__(self, name: str) -> Any:
                raise RuntimeError(name)

            def __call__(self) -> str:
                return "done"

        with capture_logs() as logs:
            assert Retrying()(Odd()) == "done"

        assert {line["event"] for line in logs} == {"A retried call could not be observed"}
