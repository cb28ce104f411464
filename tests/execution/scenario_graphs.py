"""Every way in which code of a graph is called: a graph, its probes, and the spans to come of it.

A probe does what an instrumented HTTP or database client does: it opens a span below the current
one. A tree is written a span a line, in the order of their starts:

    run success                     the segment and its outcome
      node F success                a node and its outcome
        attempt F 1 retried Fault*  an attempt, its number, outcome and `error.type`; the star
                                    says that the exception itself is told here
          . call                    a probe
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tenacity
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import CachePolicy, Command, Send, interrupt
from small_graphs import THREE, Failing, Fault, State, beside, chain
from tenacity import AsyncRetrying, Retrying, stop_after_attempt, wait_fixed
from typing_extensions import TypedDict

from telemetry.metrics import Metrics

Probe = Callable[[str], None]

INPUT = {"x": 1, "log": []}
#: Three attempts, a millisecond apart.
THRICE: dict[str, Any] = {"stop": stop_after_attempt(3), "wait": wait_fixed(0.001)}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A graph, and what is to come of it."""

    graph: Any
    #: One for each input.
    trees: Sequence[str]
    inputs: Sequence[Any] = (INPUT,)
    #: Whether siblings start in the order of the tree.
    ordered: bool = True
    #: Names of spans that may end after the span around them.
    outlives: frozenset[str] = frozenset()
    #: The run is cancelled as soon as this holds.
    cancel_when: Callable[[Metrics], bool] | None = None


SCENARIOS: dict[str, Callable[[Probe], Scenario]] = {}
#: Those that `graph.invoke` can run as well.
SYNC: set[str] = set()


def scenario(make: Callable[[Probe], Scenario]) -> Callable[[Probe], Scenario]:
    SCENARIOS[make.__name__] = make
    return make


def sync_scenario(make: Callable[[Probe], Scenario]) -> Callable[[Probe], Scenario]:
    SYNC.add(make.__name__)
    return scenario(make)


def node(probe: Probe, name: str, fault: Callable[[], None] | None = None) -> Any:
    """An async node that probes, and fails when `fault` does."""

    async def body(state: State) -> State:
        await asyncio.sleep(0)
        return in_thread(state)

    in_thread = sync_node(probe, name, fault)
    return body


def sync_node(probe: Probe, name: str, fault: Callable[[], None] | None = None) -> Any:
    """The same, in a thread."""

    def body(state: State) -> State:
        probe(name)
        if fault is not None:
            fault()
        return {"log": [name]}

    return body


def one(name: str, *inside: str) -> str:
    """The tree of a run of one node, called once, with these lines in it."""
    head = ["run success", f"  node {name} success", f"    attempt {name} 1 success"]
    return "\n".join([*head, *(f"      {line}" for line in inside)])


# Nodes.


@scenario
def async_node(probe: Probe) -> Scenario:
    return Scenario(graph=chain(("A", node(probe, "a"))), trees=[one("A", ". a")])


@sync_scenario
def node_in_a_thread(probe: Probe) -> Scenario:
    return Scenario(graph=chain(("A", sync_node(probe, "a"))), trees=[one("A", ". a")])


@scenario
def fan_out(probe: Probe) -> Scenario:
    together = asyncio.Barrier(3)

    async def worker(state: State) -> State:
        await together.wait()
        probe(f"w{state['x']}")
        return {"log": [state["x"]]}

    builder = StateGraph(State)
    builder.add_node("W", worker)
    builder.add_conditional_edges(START, lambda _: [Send("W", {"x": i}) for i in range(3)])
    tree = ["run success"]
    for number in range(3):
        tree += ["  node W success", "    attempt W 1 success", f"      . w{number}"]
    return Scenario(graph=builder.compile(), trees=["\n".join(tree)])


@scenario
def parallel(probe: Probe) -> Scenario:
    together = asyncio.Barrier(3)

    def worker(name: str) -> Any:
        async def body(state: State) -> State:
            await together.wait()
            probe(name)
            return {"log": [name]}

        return body

    tree = ["run success"]
    for name in "ABC":
        tree += [f"  node {name} success", f"    attempt {name} 1 success", f"      . {name}"]
    graph = beside(*[(name, worker(name)) for name in "ABC"])
    return Scenario(graph=graph, trees=["\n".join(tree)])


@sync_scenario
def parallel_in_threads(probe: Probe) -> Scenario:
    together = threading.Barrier(3, timeout=20)

    def worker(name: str) -> Any:
        def body(state: State) -> State:
            together.wait()
            probe(name)
            return {"log": [name]}

        return body

    tree = ["run success"]
    for name in "ABC":
        tree += [f"  node {name} success", f"    attempt {name} 1 success", f"      . {name}"]
    graph = beside(*[(name, worker(name)) for name in "ABC"])
    return Scenario(graph=graph, trees=["\n".join(tree)], ordered=False)


@scenario
def deferred(probe: Probe) -> Scenario:
    builder = StateGraph(State)
    builder.add_node("A", node(probe, "a"))
    builder.add_node("D", sync_node(probe, "d"), defer=True)
    for start, end in ((START, "A"), ("A", "D"), (START, "D")):
        builder.add_edge(start, end)
    tree = """
run success
  node A success
    attempt A 1 success
      . a
  node D success
    attempt D 1 success
      . d"""
    return Scenario(graph=builder.compile(), trees=[tree])


@scenario
def out_of_the_cache(probe: Probe) -> Scenario:
    policy = CachePolicy(key_func=lambda _: b"key")
    graph = chain(("A", node(probe, "a"), {"cache_policy": policy}), cache=InMemoryCache())
    return Scenario(graph=graph, inputs=[INPUT, INPUT], trees=[one("A", ". a"), "run success"])


@scenario
def interrupted(probe: Probe) -> Scenario:
    async def asks(state: State) -> State:
        probe("before")
        answer = interrupt("question")
        probe("after")
        return {"log": [answer]}

    first = """
run interrupted
  node F interrupted
    attempt F 1 interrupted
      . before"""
    second = """
run success
  node F success
    attempt F 1 success
      . before
      . after
  node B success
    attempt B 1 success
      . b"""
    return Scenario(
        graph=chain(("F", asks), ("B", node(probe, "b"))),
        inputs=[INPUT, Command(resume="answer")],
        trees=[first, second],
    )


@scenario
def goes_to(probe: Probe) -> Scenario:
    async def goes(state: State) -> Any:
        probe("f")
        return Command(goto="G", update={"log": ["f"]})

    builder = StateGraph(State)
    builder.add_node("F", goes, destinations=("G",))
    builder.add_node("G", node(probe, "g"))
    builder.add_edge(START, "F")
    tree = """
run success
  node F success
    attempt F 1 success
      . f
  node G success
    attempt G 1 success
      . g"""
    return Scenario(graph=builder.compile(), trees=[tree])


# Graphs in graphs.


@scenario
def subgraph(probe: Probe) -> Scenario:
    inner = chain(("I", node(probe, "i")), ("J", sync_node(probe, "j")))
    tree = one(
        "SUB",
        "node I success",
        "  attempt I 1 success",
        "    . i",
        "node J success",
        "  attempt J 1 success",
        "    . j",
    )
    return Scenario(graph=chain(("SUB", inner)), trees=[tree])


@scenario
def graph_in_a_function(probe: Probe) -> Scenario:
    inner = chain(("I", node(probe, "i")))

    async def outer(state: State) -> Any:
        probe("before")
        await inner.ainvoke({"log": []})
        probe("after")
        return {"log": ["outer"]}

    tree = one("O", ". before", "node I success", "  attempt I 1 success", "    . i", ". after")
    return Scenario(graph=chain(("O", outer)), trees=[tree])


@scenario
def graph_that_a_function_streams(probe: Probe) -> Scenario:
    inner = chain(("I", node(probe, "i")), ("J", node(probe, "j")))

    async def outer(state: State) -> Any:
        async for _ in inner.astream({"log": []}):
            probe("chunk")
        probe("after")
        return {"log": ["outer"]}

    tree = one(
        "O",
        "node I success",
        "  attempt I 1 success",
        "    . i",
        ". chunk",
        "node J success",
        "  attempt J 1 success",
        "    . j",
        ". chunk",
        ". after",
    )
    return Scenario(graph=chain(("O", outer)), trees=[tree])


@sync_scenario
def graph_that_a_thread_invokes(probe: Probe) -> Scenario:
    """With a retry and parallel nodes in it."""
    first = chain(("I", sync_node(probe, "i", Failing(1)), {"retry_policy": THREE}))
    together = threading.Barrier(2, timeout=20)

    def side(name: str) -> Any:
        def body(state: State) -> State:
            together.wait()
            probe(name)
            return {"log": [name]}

        return body

    second = beside(("J", side("j")), ("K", side("k")))

    def outer(state: State) -> Any:
        probe("before")
        first.invoke({"log": []})
        second.invoke({"log": []})
        probe("after")
        return {"log": ["outer"]}

    tree = one(
        "O",
        ". before",
        "node I success",
        "  attempt I 1 retried Fault*",
        "    . i",
        "  attempt I 2 success",
        "    . i",
        "node J success",
        "  attempt J 1 success",
        "    . j",
        "node K success",
        "  attempt K 1 success",
        "    . k",
        ". after",
    )
    return Scenario(graph=chain(("O", outer)), trees=[tree], ordered=False)


@scenario
def graph_in_a_retried_call(probe: Probe) -> Scenario:
    inner = chain(("I", node(probe, "i", Failing(1))))

    async def outer(state: State) -> Any:
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                await inner.ainvoke({"log": []})
        return {"log": ["outer"]}

    tree = one(
        "O",
        "attempt O:retrying 1 retried Fault",
        "  node I error Fault",
        "    attempt I 1 failed Fault*",
        "      . i",
        "attempt O:retrying 2 success",
        "  node I success",
        "    attempt I 1 success",
        "      . i",
    )
    return Scenario(graph=chain(("O", outer)), trees=[tree])


@scenario
def command_to_the_parent(probe: Probe) -> Scenario:
    async def leaves(state: State) -> Any:
        probe("i")
        return Command(graph=Command.PARENT, goto="G", update={"log": ["i"]})

    builder = StateGraph(State)
    builder.add_node("SUB", chain(("I", leaves)), destinations=("G",))
    builder.add_node("G", node(probe, "g"))
    builder.add_edge(START, "SUB")
    tree = """
run success
  node SUB success
    attempt SUB 1 success
      node I success
        attempt I 1 success
          . i
  node G success
    attempt G 1 success
      . g"""
    return Scenario(graph=builder.compile(), trees=[tree])


@scenario
def tasks(probe: Probe) -> Scenario:
    @task
    async def t(number: int) -> int:
        probe(f"t{number}")
        return number

    @task
    def u(number: int) -> int:
        probe("u")
        return number

    @task(retry_policy=THREE)
    async def flaky() -> None:
        probe("flaky")
        fault()

    fault = Failing(1)

    @entrypoint()
    async def graph(number: int) -> int:
        probe("before")
        await asyncio.gather(t(0), t(1))
        await u(5)
        await flaky()
        probe("after")
        return number

    tree = one(
        "graph",
        ". before",
        "node t success",
        "  attempt t 1 success",
        "    . t0",
        "node t success",
        "  attempt t 1 success",
        "    . t1",
        "node u success",
        "  attempt u 1 success",
        "    . u",
        "node flaky success",
        "  attempt flaky 1 retried Fault*",
        "    . flaky",
        "  attempt flaky 2 success",
        "    . flaky",
        ". after",
    )
    return Scenario(graph=graph, inputs=[1], trees=[tree])


@sync_scenario
def tasks_in_threads(probe: Probe) -> Scenario:
    together = threading.Barrier(2, timeout=20)

    @task
    def t(number: int) -> int:
        together.wait()
        probe(f"t{number}")
        return number

    @entrypoint()
    def graph(number: int) -> int:
        both = [t(0), t(1)]
        assert [one.result() for one in both] == [0, 1]
        probe("after")
        return number

    tree = one(
        "graph",
        "node t success",
        "  attempt t 1 success",
        "    . t0",
        "node t success",
        "  attempt t 1 success",
        "    . t1",
        ". after",
    )
    return Scenario(graph=graph, inputs=[1], trees=[tree], ordered=False)


# Tools and models.


class Chat(TypedDict):
    messages: Annotated[list[BaseMessage], add_messages]


class Model(BaseChatModel):
    """Says what `says` yields."""

    says: Iterator[AIMessage]
    probe: Any

    @property
    def _llm_type(self) -> str:
        return "model"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **_: Any
    ) -> ChatResult:
        self.probe("model")
        return ChatResult(generations=[ChatGeneration(message=next(self.says))])

    def bind_tools(self, *_: Any, **__: Any) -> Any:
        return self


def calling(*names: str) -> AIMessage:
    calls = [{"name": name, "args": {"q": "1"}, "id": name} for name in names]
    return AIMessage("", tool_calls=calls)


@scenario
def tools(probe: Probe) -> Scenario:
    inner = chain(("I", node(probe, "i")))

    @tool
    async def aside(q: str) -> str:
        "Async."
        probe("aside")
        return q

    @tool
    def inline(q: str) -> str:
        "In a thread."
        probe("inline")
        return q

    @tool
    async def graphic(q: str) -> str:
        "With a graph inside."
        await inner.ainvoke({"log": []})
        return q

    @tool
    async def flaky(q: str) -> str:
        "With a retried call inside."
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                probe("flaky")
                fault()
        return q

    fault = Failing(1)
    builder = StateGraph(Chat)
    builder.add_node("T", ToolNode([aside, inline, graphic, flaky]))
    builder.add_edge(START, "T")
    tree = one(
        "T",
        "execute_tool aside",
        "  . aside",
        "execute_tool flaky",
        "  attempt T:retrying 1 retried Fault*",
        "    . flaky",
        "  attempt T:retrying 2 success",
        "    . flaky",
        "execute_tool graphic",
        "  node I success",
        "    attempt I 1 success",
        "      . i",
        "execute_tool inline",
        "  . inline",
    )
    return Scenario(
        graph=builder.compile(),
        inputs=[{"messages": [calling("aside", "inline", "graphic", "flaky")]}],
        trees=[tree],
        ordered=False,
    )


@scenario
def agent(probe: Probe) -> Scenario:
    @tool
    async def look(q: str) -> str:
        "Looks."
        probe("look")
        return q

    model = Model(says=iter([calling("look"), AIMessage("done")]), probe=probe)
    turn = """
  node model success
    attempt model 1 success
      chat
        . model"""
    tree = f"""
run success{turn}
  node tools success
    attempt tools 1 success
      execute_tool look
        . look{turn}"""
    return Scenario(
        graph=create_agent(model, [look]), inputs=[{"messages": [("user", "hi")]}], trees=[tree]
    )


@scenario
def model_in_a_retried_call(probe: Probe) -> Scenario:
    fault = Failing(1)

    def flaky(name: str) -> None:
        probe(name)
        fault()

    model = Model(says=iter([AIMessage("done")]), probe=flaky).with_retry(
        stop_after_attempt=2, wait_exponential_jitter=False
    )

    async def asks(state: Chat) -> Any:
        return {"messages": [await model.ainvoke("hi")]}

    builder = StateGraph(Chat)
    builder.add_node("M", asks)
    builder.add_edge(START, "M")
    tree = one(
        "M",
        "attempt M:retrying 1 retried Fault",
        "  chat Fault*",
        "    . model",
        "attempt M:retrying 2 success",
        "  chat",
        "    . model",
    )
    return Scenario(graph=builder.compile(), inputs=[{"messages": [("user", "hi")]}], trees=[tree])


# Retries.


RETRIED = """
run success
  node F success
    attempt F 1 retried Fault*
      . f
    attempt F 2 retried Fault*
      . f
    attempt F 3 success
      . f"""


@scenario
def retried(probe: Probe) -> Scenario:
    graph = chain(("F", node(probe, "f", Failing(2)), {"retry_policy": THREE}))
    return Scenario(graph=graph, trees=[RETRIED])


@sync_scenario
def retried_in_a_thread(probe: Probe) -> Scenario:
    graph = chain(("F", sync_node(probe, "f", Failing(2)), {"retry_policy": THREE}))
    return Scenario(graph=graph, trees=[RETRIED])


@sync_scenario
def exhausted(probe: Probe) -> Scenario:
    graph = chain(("F", sync_node(probe, "f", Failing(3)), {"retry_policy": THREE}))
    tree = """
run error Fault
  node F error Fault
    attempt F 1 retried Fault*
      . f
    attempt F 2 retried Fault*
      . f
    attempt F 3 exhausted Fault*
      . f"""
    return Scenario(graph=graph, trees=[tree])


@scenario
def failed_in_a_subgraph(probe: Probe) -> Scenario:
    """The exception is told where it was raised; what it passes only says what failed."""
    inner = chain(("I", node(probe, "i", Failing(2))))
    graph = chain(("SUB", inner, {"retry_policy": THREE}))
    attempt = """
    attempt SUB {} retried Fault
      node I error Fault
        attempt I 1 failed Fault*
          . i"""
    tree = f"""
run success
  node SUB success{attempt.format(1)}{attempt.format(2)}
    attempt SUB 3 success
      node I success
        attempt I 1 success
          . i"""
    return Scenario(graph=graph, trees=[tree])


@scenario
def error_that_is_handled(probe: Probe) -> Scenario:
    options = {"error_handler": node(probe, "handler")}
    tree = """
run success
  node F error Fault
    attempt F 1 failed Fault*
      . f
  node __error_handler__F success
    attempt __error_handler__F 1 success
      . handler"""
    return Scenario(graph=chain(("F", node(probe, "f", Failing(1)), options)), trees=[tree])


# Calls that tenacity retries.


def calls(name: str, *after: str) -> list[str]:
    lines = []
    for number, outcome in enumerate(("retried Fault*", "retried Fault*", "success"), 1):
        lines += [f"attempt {name} {number} {outcome}", "  . call"]
    return [*lines, ". after"]


def call_of(probe: Probe) -> tuple[Any, Any]:
    """A function that fails twice, async and not."""
    fault = Failing(2)

    def call() -> None:
        probe("call")
        fault()

    async def acall() -> None:
        await asyncio.sleep(0)
        call()

    setattr(call, "sereno_call", "call")  # noqa: B010
    setattr(acall, "sereno_call", "call")  # noqa: B010
    return acall, call


def calling_node(probe: Probe, call: Any) -> Any:
    """A node that calls, and probes afterwards."""
    if inspect.iscoroutinefunction(call):

        async def abody(state: State) -> State:
            await call()
            probe("after")
            return {"log": ["f"]}

        return abody

    def body(state: State) -> State:
        call()
        probe("after")
        return {"log": ["f"]}

    return body


def retries(probe: Probe, call: Any, name: str = "call") -> Scenario:
    graph = chain(("F", calling_node(probe, call)))
    return Scenario(graph=graph, trees=[one("F", *calls(name))])


@scenario
def decorated(probe: Probe) -> Scenario:
    acall, _ = call_of(probe)
    return retries(probe, tenacity.retry(**THRICE)(acall))


@sync_scenario
def decorated_in_a_thread(probe: Probe) -> Scenario:
    _, call = call_of(probe)
    return retries(probe, tenacity.retry(**THRICE)(call))


@tenacity.retry(**THRICE)
async def early(work: Callable[[], None]) -> None:
    """Decorated when nothing is observed yet."""
    work()


@tenacity.retry(**THRICE)
def early_in_a_thread(work: Callable[[], None]) -> None:
    work()


@scenario
def decorated_before_the_seam(probe: Probe) -> Scenario:
    _, call = call_of(probe)

    async def calls_early() -> None:
        await early(call)

    return retries(probe, calls_early, "scenario_graphs.early")


@sync_scenario
def decorated_before_the_seam_in_a_thread(probe: Probe) -> Scenario:
    _, call = call_of(probe)
    name = "scenario_graphs.early_in_a_thread"
    return retries(probe, lambda: early_in_a_thread(call), name)


@scenario
def called_by_async_retrying(probe: Probe) -> Scenario:
    acall, _ = call_of(probe)

    async def calls_it() -> None:
        await AsyncRetrying(**THRICE)(acall)

    return retries(probe, calls_it)


@sync_scenario
def called_by_retrying(probe: Probe) -> Scenario:
    _, call = call_of(probe)
    return retries(probe, lambda: Retrying(**THRICE)(call))


@scenario
def async_loop(probe: Probe) -> Scenario:
    acall, _ = call_of(probe)

    async def loop() -> None:
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                await acall()

    return retries(probe, loop, "F:retrying")


@sync_scenario
def loop_in_a_thread(probe: Probe) -> Scenario:
    _, call = call_of(probe)

    def loop() -> None:
        for attempt in Retrying(**THRICE):
            with attempt:
                call()

    return retries(probe, loop, "F:retrying")


@scenario
def runnable_with_retry(probe: Probe) -> Scenario:
    _, call = call_of(probe)
    runnable = RunnableLambda(lambda _: call()).with_retry(
        stop_after_attempt=3, wait_exponential_jitter=False
    )

    async def calls_it() -> None:
        await runnable.ainvoke(None)

    return retries(probe, calls_it, "F:retrying")


@sync_scenario
def runnable_with_retry_in_a_thread(probe: Probe) -> Scenario:
    _, call = call_of(probe)
    runnable = RunnableLambda(lambda _: call()).with_retry(
        stop_after_attempt=3, wait_exponential_jitter=False
    )
    return retries(probe, lambda: runnable.invoke(None), "F:retrying")


@scenario
def retried_call_that_fails(probe: Probe) -> Scenario:
    """With `reraise` the node fails of the call's own exception, told once."""
    fault = Failing(5)

    @tenacity.retry(stop=stop_after_attempt(2), reraise=True)
    async def call() -> None:
        probe("call")
        fault()

    tree = """
run error Fault
  node F error Fault
    attempt F 1 failed Fault
      attempt {call} 1 retried Fault*
        . call
      attempt {call} 2 exhausted Fault*
        . call"""
    name = "scenario_graphs.retried_call_that_fails.<locals>.call"
    return Scenario(graph=chain(("F", calling_node(probe, call))), trees=[tree.format(call=name)])


@scenario
def retried_call_that_gives_up(probe: Probe) -> Scenario:
    """Without, it fails of tenacity's."""
    fault = Failing(5)

    async def call() -> None:
        async for attempt in AsyncRetrying(stop=stop_after_attempt(2)):
            with attempt:
                probe("call")
                fault()

    tree = """
run error RetryError
  node F error RetryError
    attempt F 1 failed RetryError*
      attempt F:retrying 1 retried Fault*
        . call
      attempt F:retrying 2 exhausted Fault*
        . call"""
    return Scenario(graph=chain(("F", calling_node(probe, call))), trees=[tree])


@scenario
def retries_in_retries(probe: Probe) -> Scenario:
    """A retried call within a retried call within a retried node."""
    fault = Failing(7)

    async def call() -> None:
        async for outer in AsyncRetrying(stop=stop_after_attempt(2), reraise=True):
            with outer:
                async for inner in AsyncRetrying(stop=stop_after_attempt(2), reraise=True):
                    with inner:
                        probe("call")
                        fault()

    def round_(outer: str, inner: tuple[str, ...]) -> list[str]:
        lines = [f"attempt F:retrying {outer}"]
        for number, outcome in enumerate(inner, 1):
            lines += [f"  attempt F:retrying {number} {outcome}", "    . call"]
        return lines

    bad = ("retried Fault*", "exhausted Fault*")
    graph = chain(("F", calling_node(probe, call), {"retry_policy": THREE}))
    attempts = [
        "attempt F 1 retried Fault",
        *(f"  {line}" for line in round_("1 retried Fault", bad)),
        *(f"  {line}" for line in round_("2 exhausted Fault", bad)),
        "attempt F 2 success",
        *(f"  {line}" for line in round_("1 retried Fault", bad)),
        *(f"  {line}" for line in round_("2 success", ("retried Fault*", "success"))),
        "  . after",
    ]
    tree = ["run success", "  node F success", *(f"    {line}" for line in attempts)]
    return Scenario(graph=graph, trees=["\n".join(tree)])


@scenario
def calls_at_the_same_time(probe: Probe) -> Scenario:
    """One is not inside of the other."""
    together = asyncio.Barrier(2)

    async def call(fault: Callable[[], None]) -> None:
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                await together.wait()
                probe("call")
                fault()

    async def body(state: State) -> State:
        await asyncio.gather(call(Failing(1)), call(Failing(1)))
        probe("after")
        return {"log": ["f"]}

    tree = one(
        "F",
        *["attempt F:retrying 1 retried Fault*", "  . call"] * 2,
        *["attempt F:retrying 2 success", "  . call"] * 2,
        ". after",
    )
    return Scenario(graph=chain(("F", body)), trees=[tree])


@scenario
def call_that_the_node_gives_up(probe: Probe) -> Scenario:
    """By a timeout of its own, in an attempt and in a back-off."""

    async def waits() -> None:
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                probe("call")
                await asyncio.Event().wait()

    async def sleeps() -> None:
        async for attempt in AsyncRetrying(wait=wait_fixed(60)):
            with attempt:
                probe("call")
                raise Fault

    async def body(state: State) -> State:
        for call in (waits, sleeps):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await call()
            probe("after")
        return {"log": ["f"]}

    tree = one(
        "F",
        "attempt F:retrying 1 cancelled",
        "  . call",
        ". after",
        "attempt F:retrying 1 retried Fault*",
        "  . call",
        ". after",
    )
    return Scenario(graph=chain(("F", body)), trees=[tree])


@scenario
def body_that_cancels_itself(probe: Probe) -> Scenario:
    """Nobody asked it to stop: it failed. LangGraph makes an error of its own of it."""

    async def body(state: State) -> State:
        probe("f")
        raise asyncio.CancelledError

    tree = """
run error NodeCancelledError
  node F error NodeCancelledError
    attempt F 1 failed CancelledError*
      . f"""
    return Scenario(graph=chain(("F", body)), trees=[tree])


@scenario
def interrupted_in_a_retried_call(probe: Probe) -> Scenario:
    async def call() -> None:
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                probe("call")
                interrupt("question")

    first = """
run interrupted
  node F interrupted
    attempt F 1 interrupted
      attempt F:retrying 1 interrupted
        . call"""
    second = one("F", "attempt F:retrying 1 success", "  . call", ". after")
    return Scenario(
        graph=chain(("F", calling_node(probe, call))),
        inputs=[INPUT, Command(resume="answer")],
        trees=[first, second],
    )


@scenario
def left_loops(probe: Probe) -> Scenario:
    """What a loop had made current is not current after it."""

    async def body(state: State) -> State:
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                probe("call")
                break
        probe("between")
        async for _ in AsyncRetrying(**THRICE):
            probe("bare")
            break
        probe("after")
        return {"log": ["f"]}

    tree = one(
        "F",
        "attempt F:retrying 1 success",
        "  . call",
        ". between",
        "attempt F:retrying 1 cancelled",
        "  . bare",
        ". after",
    )
    return Scenario(graph=chain(("F", body)), trees=[tree])


@sync_scenario
def left_loops_in_a_thread(probe: Probe) -> Scenario:
    def call() -> None:
        for attempt in Retrying(**THRICE):
            with attempt:
                probe("call")
                return

    def body(state: State) -> State:
        call()
        probe("between")
        for _ in Retrying(**THRICE):
            probe("bare")
            break
        probe("after")
        return {"log": ["f"]}

    tree = one(
        "F",
        "attempt F:retrying 1 success",
        "  . call",
        ". between",
        "attempt F:retrying 1 cancelled",
        "  . bare",
        ". after",
    )
    return Scenario(graph=chain(("F", body)), trees=[tree])


# Being stopped.


@scenario
def node_that_times_out(probe: Probe) -> Scenario:
    calls: list[int] = []

    async def body(state: State) -> State:
        calls.append(1)
        probe("f")
        if len(calls) == 1:
            await asyncio.Event().wait()
        return {"log": ["f"]}

    tree = """
run success
  node F success
    attempt F 1 retried NodeTimeoutError*
      . f
    attempt F 2 success
      . f"""
    options = {"timeout": 0.02, "retry_policy": THREE}
    return Scenario(graph=chain(("F", body, options)), trees=[tree])


@scenario
def body_that_outlasts_its_timeout(probe: Probe) -> Scenario:
    """The attempt ends when the timeout is seen, and its successor has begun by then."""
    calls: list[int] = []
    second, gone = asyncio.Event(), asyncio.Event()

    async def body(state: State) -> State:
        calls.append(1)
        probe("f")
        if len(calls) == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await second.wait()
                probe("late")
                gone.set()
                raise
        second.set()
        await gone.wait()
        return {"log": ["f"]}

    tree = """
run success
  node F success
    attempt F 1 retried NodeTimeoutError*
      . f
      . late
    attempt F 2 success
      . f"""
    options = {"timeout": 0.02, "retry_policy": THREE}
    return Scenario(
        graph=chain(("F", body, options)), trees=[tree], outlives=frozenset(["probe:late"])
    )


@scenario
def superstep_that_times_out(probe: Probe) -> Scenario:
    async def body(state: State) -> State:
        probe("f")
        await asyncio.Event().wait()
        return {}

    graph = chain(("F", body))
    graph.step_timeout = 0.02
    tree = """
run error TimeoutError
  node F cancelled
    attempt F 1 cancelled
      . f"""
    return Scenario(graph=graph, trees=[tree])


@scenario
def sibling_that_fails(probe: Probe) -> Scenario:
    waiting = asyncio.Event()

    async def waits(state: State) -> State:
        probe("a")
        waiting.set()
        await asyncio.Event().wait()
        return {}

    async def fails(state: State) -> State:
        await waiting.wait()
        raise Fault

    tree = """
run error Fault
  node A cancelled
    attempt A 1 cancelled
      . a
  node B error Fault
    attempt B 1 failed Fault*"""
    return Scenario(graph=beside(("A", waits), ("B", fails)), trees=[tree])


@scenario
def cancelled(probe: Probe) -> Scenario:
    ready = asyncio.Event()

    async def body(state: State) -> State:
        probe("f")
        ready.set()
        await asyncio.Event().wait()
        return {}

    tree = """
run cancelled
  node SUB cancelled
    attempt SUB 1 cancelled
      node I cancelled
        attempt I 1 cancelled
          . f"""
    graph = chain(("SUB", chain(("I", body))))
    return Scenario(graph=graph, trees=[tree], cancel_when=lambda _: ready.is_set())


@scenario
def cancelled_in_back_off(probe: Probe) -> Scenario:
    async def body(state: State) -> State:
        probe("f")
        raise Fault

    policy = THREE._replace(initial_interval=60.0)
    tree = """
run cancelled
  node F cancelled
    attempt F 1 retried Fault*
      . f"""
    return Scenario(
        graph=chain(("F", body, {"retry_policy": policy})),
        trees=[tree],
        cancel_when=lambda metrics: metrics["node_retries_sleeping"].value("graph", "F") == 1,
    )


@scenario
def cancelled_in_a_calls_back_off(probe: Probe) -> Scenario:
    """Tenacity's hooks never run again."""

    async def body(state: State) -> State:
        async for attempt in AsyncRetrying(wait=wait_fixed(60)):
            with attempt:
                probe("call")
                raise Fault
        return {}

    tree = """
run cancelled
  node F cancelled
    attempt F 1 cancelled
      attempt F:retrying 1 retried Fault*
        . call"""
    return Scenario(
        graph=chain(("F", body)),
        trees=[tree],
        cancel_when=lambda metrics: (
            metrics["call_retries_sleeping"].value("graph", "F:retrying") == 1
        ),
    )


@scenario
def cancelled_in_a_retried_call(probe: Probe) -> Scenario:
    ready = asyncio.Event()

    async def body(state: State) -> State:
        async for attempt in AsyncRetrying(**THRICE):
            with attempt:
                probe("call")
                ready.set()
                await asyncio.Event().wait()
        return {}

    tree = """
run cancelled
  node F cancelled
    attempt F 1 cancelled
      attempt F:retrying 1 cancelled
        . call"""
    return Scenario(graph=chain(("F", body)), trees=[tree], cancel_when=lambda _: ready.is_set())


__all__ = [
    "INPUT",
    "SCENARIOS",
    "SYNC",
    "Chat",
    "Probe",
    "Scenario",
    "node",
    "one",
    "sync_node",
]
